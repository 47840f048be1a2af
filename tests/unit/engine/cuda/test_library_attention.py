"""Attention of a library: planned once a step, equal to the reference's, and only for who asked for it."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.engine import Engine, SamplingParams
from common.engine.devices.choice import DEVICES, choose_device
from common.engine.devices.cpu.backend import CpuBackend
from common.engine.devices.cpu.device import CpuDevice
from common.engine.devices.cuda import flash_attention
from common.engine.devices.cuda.flash_attention import FlashAttention
from common.engine.devices.cuda.flashinfer import FlashInferAttention
from common.engine.devices.cuda.library_attention import LibraryBackend, PagedRequests
from common.engine.devices.device import Backend, HeadShape
from common.engine.devices.reference.backend import ReferenceBackend
from common.engine.devices.rows import Rows
from common.engine.model.decoder import tensor_shapes
from common.engine.runner.loading import choose_kv_dtype
from common.engine.runner.model_runner import ModelRunner
from common.errors import ConfigError, UnsupportedModel
from common.kv_layout import Fingerprint
from common.model_folder.description import read_config
from common.model_folder.model_config import parse_model_config
from common.settings.config import EngineSettings
from tests.support import fake_flashinfer

HOST = torch.device("cpu")
SHAPE = HeadShape(4, 2, 64, 64, 0)
VERSIONS = {"flashinfer-python": "0.7.4"}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The packages of libraries there are, with their versions."""
    versions = dict(VERSIONS)

    def version(package: str) -> str:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    monkeypatch.setattr(fake_flashinfer, "planned", [])
    return versions


class Compared(LibraryBackend):
    """Computes each attention twice."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps: list[Rows] = []
        self.largest = 0.0

    def prepare(self, rows: Rows) -> Rows:
        self.steps.append(rows)
        return super().prepare(rows)

    def attention(self, qkv: Tensor, *arguments: Any) -> Tensor:
        expected = ReferenceBackend.attention(self, qkv.clone(), *arguments)
        found = super().attention(qkv, *arguments)
        self.largest = max(self.largest, float((found - expected).abs().max()))
        return found


class Pretended(CpuDevice):
    """A GPU with the library, on the host."""

    def __init__(self, settings: EngineSettings) -> None:
        self.torch_device, self._settings = HOST, settings

    def backend(self, dtype: torch.dtype) -> Backend:
        size = self._settings.block_size
        return Compared(HOST, dtype, "pretended", FlashInferAttention(HOST, size), size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Heads of 64, one layer with a window and one without."""
    config = {
        "model_type": "qwen2",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 10,
        "max_window_layers": 1,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(parse_model_config(read_config(tmp_path, {}, required=True)), has_head=False)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.2).bfloat16() for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_steps_of_prompts_replies_and_drafts_equal_the_reference(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEVICES, "cuda", Pretended)
    settings = EngineSettings(
        model=str(folder),
        device="cuda",
        num_kv_blocks=64,
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        speculative="ngram",
        num_speculative_tokens=3,
    )
    runner = ModelRunner(settings)
    engine = Engine(settings, runner)
    prompts = [[5, 6, 7] * 8, [9], list(range(2, 33)), [1, 2, 1, 2, 1, 2, 1]]
    engine.generate(prompts, SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True))
    backend = runner.backend
    assert isinstance(backend, Compared)
    assert 0.0 < backend.largest < 0.05  # values are about 1, of bfloat16
    kinds = {
        (rows.tiles[i, 1].item() > 1, i < rows.num_generated_tiles)
        for rows in backend.steps
        for i in range(len(rows.tiles))
    }
    assert kinds >= {(False, True), (True, True), (True, False)}  # rows alone, drafts, chunks

    plans = fake_flashinfer.planned
    assert {plan["window_left"] for plan in plans} == {-1, 9}
    assert all(plan["causal"] == (plan["wrapper"] == "BatchPrefillWithPagedKVCacheWrapper") for plan in plans)
    expected = sum(2 * len({kind(rows, i) for i in range(len(rows.tiles))}) for rows in backend.steps)
    assert len(plans) == expected  # of either kind of layer: once a step for each wrapper that has rows


def kind(rows: Rows, tile: int) -> bool:
    """Whether a tile is among the first, whose rows are all alone."""
    return bool((rows.tiles[: tile + 1, 1] == 1).all())


def test_a_plan_says_which_pages_each_request_has() -> None:
    tiles = np.array([[0, 1, 6, 0], [1, 1, 0, 4], [2, 3, 3, 8], [5, 4, 0, 12]], np.int32)
    tables = np.array([30, 31, 0, 0, 7, 0, 0, 0, 9, 8, 0, 0, 5, 0, 0, 0], np.int32)
    attention = FlashInferAttention(HOST, 4)
    shape = HeadShape(8, 2, 64, 64, 12)
    attention.plan(PagedRequests.from_tiles(tiles, tables, 4), [shape], torch.bfloat16)
    decode, prefill = fake_flashinfer.planned
    assert (decode["queries"], decode["indptr"], decode["indices"]) == ([0, 1, 2], [0, 2, 3], [30, 31, 7])
    assert decode["last_page_len"] == [3, 1]
    assert (prefill["queries"], prefill["indptr"]) == ([0, 3, 7], [0, 2, 3])
    assert (prefill["indices"], prefill["last_page_len"]) == ([9, 8, 5], [2, 4])
    assert decode["heads"] == prefill["heads"] == (8, 2, 64)
    assert (decode["window_left"], prefill["causal"]) == (11, True)


def test_the_class_says_that_it_is_unrepeatable_and_what_it_is() -> None:
    def fingerprint(version: str, card: str = "H200") -> Fingerprint:
        attention = FlashInferAttention(HOST, 16)
        attention.name = f"flashinfer-{version}"
        backend = LibraryBackend(HOST, torch.bfloat16, card, attention, 16)
        return Fingerprint("m", "r", "l", backend.numerics_class, 16)

    one = fingerprint("0.7.4")
    assert not one.is_repeatable
    assert "/flashinfer-0.7.4/" in one.numerics
    assert one.mismatch(fingerprint("0.7.4")) is None  # prompts are handed over between such nodes
    for other in (fingerprint("0.7.5"), fingerprint("0.7.4", "H100")):
        assert one.mismatch(other) is not None
    plain = Fingerprint("m", "r", "l", ReferenceBackend(HOST, torch.bfloat16, "H200").numerics_class, 16)
    assert not plain.is_repeatable  # torch chooses kernels by the batch, too
    assert one.mismatch(plain) is not None
    assert Fingerprint("m", "r", "l", CpuBackend(torch.float32, 1).numerics_class, 16).is_repeatable


def test_a_library_that_is_missing_or_too_old_is_refused(installed: dict[str, str]) -> None:
    for version, said in (("0.6.14", "is 0.6.14; it takes 0.7 or later"), (None, "is not installed")):
        installed.pop("flashinfer-python")
        if version is not None:
            installed["flashinfer-python"] = version
        with pytest.raises(ConfigError, match=said) as raised:
            FlashInferAttention(HOST, 16)
        assert raised.value.param == "attention"
        installed["flashinfer-python"] = "0.7.4"


def test_a_library_that_cannot_be_imported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ConfigError, match="flashinfer cannot be imported") as raised:
        FlashInferAttention(HOST, 16)
    assert raised.value.param == "attention"


def test_heads_and_types_that_a_library_lacks_are_refused() -> None:
    backend = LibraryBackend(HOST, torch.bfloat16, "x", FlashInferAttention(HOST, 16), 16)
    with pytest.raises(UnsupportedModel, match="heads of 64, 128, 256, and this model's have 80"):
        backend.check(HeadShape(4, 2, 80, 80, 0))
    wide = LibraryBackend(HOST, torch.float32, "x", FlashInferAttention(HOST, 16), 16)
    with pytest.raises(ConfigError, match="bfloat16 or float16, not in float32"):
        wide.check(SHAPE)


def test_keys_in_8_bits_with_our_scales_are_refused() -> None:
    backend = LibraryBackend(HOST, torch.bfloat16, "x", FlashInferAttention(HOST, 16), 16)
    with pytest.raises(ConfigError, match=r"the kernels in use \(library\) do not keep") as raised:
        choose_kv_dtype(EngineSettings(kv_cache_dtype="fp8"), backend)
    assert raised.value.param == "kv_cache_dtype"


def test_no_library_computes_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="a library for GPUs") as raised:
        choose_device(EngineSettings(device="cpu", attention="flashinfer"))
    assert raised.value.param == "attention"


def test_flash_attention_2_takes_large_blocks_only(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["flash-attn"] = "2.8.3"
    monkeypatch.setattr(flash_attention, "_imported", lambda name: name)
    for capability in (8, 9):
        with pytest.raises(ConfigError, match="blocks of 256 positions or multiples of that, not of 16"):
            FlashAttention(HOST, 16, capability)
        assert FlashAttention(HOST, 512, capability).name == "flash-attn-2.8.3"
    installed["flash-attn-3"] = "3.0.0b1"
    assert FlashAttention(HOST, 16, 9).name == "flash-attn-3.0.0b1"
    with pytest.raises(ConfigError, match="256"):
        FlashAttention(HOST, 16, 8)


class FakeFlash:
    """The two functions of FlashAttention, by those of the fake FlashInfer: which arrays they are given."""

    def __init__(self) -> None:
        self.calls = 0

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        page_table: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        causal: bool,
        window_size: tuple[int, int],
    ) -> Tensor:
        size = k_cache.shape[1]
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert window_size[1] == (0 if window_size[0] >= 0 else -1)
        counts = (cache_seqlens + size - 1) // size
        indices = torch.cat([row[:count] for row, count in zip(page_table, counts.tolist(), strict=True)])
        wrapper = fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            torch.zeros(128 << 20, dtype=torch.uint8), "NHD"
        )
        wrapper.plan(
            cu_seqlens_q,
            torch.cat((torch.zeros(1), counts.cumsum(0))).int(),
            indices,
            (cache_seqlens - 1) % size + 1,
            q.shape[1],
            k_cache.shape[2],
            q.shape[2],
            size,
            causal=causal,
            window_left=window_size[0],
            q_data_type=q.dtype,
            kv_data_type=q.dtype,
        )
        self.calls += 1
        return wrapper.run(q.contiguous(), (k_cache, v_cache))

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        causal: bool,
        window_size: tuple[int, int],
        block_table: Tensor,
    ) -> Tensor:
        lengths = cu_seqlens_k.diff()
        assert max_seqlen_k == int(lengths.max())
        return self.flash_attn_with_kvcache(
            q,
            k,
            v,
            cache_seqlens=lengths,
            page_table=block_table,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q,
            causal=causal,
            window_size=window_size,
        )


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("window", [0, 300])
def test_flash_attention_is_given_the_same_requests(
    third: bool, window: int, installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["flash-attn-3" if third else "flash-attn"] = "3.0" if third else "2.8"
    library = FakeFlash()
    monkeypatch.setattr(flash_attention, "_imported", lambda name: library)
    attention = FlashAttention(HOST, 256, 9)
    shape = HeadShape(4, 2, 64, 64, window)
    generator = torch.Generator().manual_seed(1)
    keys, values = (
        torch.randn(4, 2, 256, 2, 64, generator=generator).bfloat16()[:, i] for i in (0, 1)
    )  # strided, as in slabs
    query = torch.randn(6, 4, 64, generator=generator).bfloat16()
    tiles = np.array([[0, 1, 300, 0], [1, 5, 0, 2]], np.int32)
    requests = PagedRequests.from_tiles(tiles, np.array([3, 1, 2, 0], np.int32), 256)
    attention.plan(requests, [shape], torch.bfloat16)
    found = attention.run(query, keys, values, shape)
    other = FlashInferAttention(HOST, 256)
    other.plan(requests, [shape], torch.bfloat16)
    assert torch.equal(found, other.run(query, keys, values, shape))
    assert library.calls == 1
