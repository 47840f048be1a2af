"""A model by the GPU's kernels, interpreted: a step against the reference, and a whole engine in a queue."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from common.engine import Engine, SamplingParams
from common.engine.devices.cuda.attention import MANTISSAS, Attention
from common.engine.devices.cuda.attention_proof import AttentionProof, prove
from common.engine.devices.cuda.backend import CudaBackend
from common.engine.devices.cuda.card import Card
from common.engine.devices.cuda.sampling import CudaSampling
from common.engine.devices.cuda.settling import QUICK
from common.engine.devices.device import Backend, HeadShape
from common.engine.devices.kv_cache import SCALED_KV_DTYPES
from common.engine.devices.rows import Rows
from common.engine.devices.sampling import StepSampling
from common.engine.runner.model_runner import ModelRunner
from common.engine.runner.queue_runner import QueueRunner
from common.identity import ModelIdentity
from common.kv_layout import ONE_CLASS
from common.request import Request
from common.settings.config import EngineSettings
from tests.support.checkpoints import save_random_model
from tests.support.engines import NoCosts
from tests.support.fake_accelerator import FakeAccelerator, Order
from tests.support.fake_device import CPU, FakeDevice
from tests.support.quick_interpreter import quick_interpreter
from tests.support.redis import HANGS_S

__all__ = ["quick_interpreter"]

pytestmark = pytest.mark.usefixtures("exact_products", "quick_interpreter")
CARD = Card("pretended", 90, 2)


class InterpretedDevice(FakeDevice):
    most_rows = 1
    positions = 20
    kv_dtype: torch.dtype | None = None

    def backend(self, dtype: torch.dtype) -> Backend:
        return CudaBackend(
            CPU,
            dtype,
            CARD,
            block_size=8,
            kv_dtype=self.kv_dtype,
            most_rows=self.most_rows,
            proof=QUICK,
            proven_positions=self.positions,
        )

    def step_sampling(self, vocab_size: int) -> StepSampling:
        return CudaSampling(vocab_size, CPU, max_rows=8, multiprocessors=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(
        tmp_path_factory.mktemp("tiny"),
        "llama",
        seed=1,
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        eos_token_id=None,
        tie_word_embeddings=True,
    )


def settings(folder: Path, **fields: Any) -> EngineSettings:
    small = {
        "num_kv_blocks": 24,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 8,
        "block_size": 8,
        "dtype": "float32",
    }
    return EngineSettings(model=str(folder), **(small | fields))  # type: ignore[arg-type]


GREEDY = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0)
PROMPTS = [[5, 6, 7], list(range(40, 53)), [9]]
PARAMS = [GREEDY, GREEDY, dataclasses.replace(GREEDY, temperature=0.8, seed=7)]


def by_plain_torch(folder: Path, **fields: Any) -> list[tuple[int, ...]]:
    """Step by step."""
    wanted = settings(folder, **fields)
    alone = Engine(wanted, ModelRunner(wanted, device=FakeDevice(wanted)))
    return [completion.token_ids for completion in alone.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[tuple[int, ...]]:
    return by_plain_torch(folder)


@contextmanager
def interpreted(folder: Path, most_rows: int = 1, **fields: Any) -> Iterator[Engine]:
    wanted = settings(folder, **fields)
    device = InterpretedDevice(wanted, FakeAccelerator(Order.LATE))
    device.most_rows, device.kv_dtype = most_rows, SCALED_KV_DTYPES.get(wanted.kv_cache_dtype)
    queue = device.queue()
    assert queue is not None
    runner = QueueRunner(wanted, device, queue)
    engine = Engine(wanted, runner)
    engine.steps_ahead = 1
    with runner.device.accelerator.watching():  # type: ignore[attr-defined]
        yield engine
    engine.check_idle()
    runner.close(HANGS_S)


def given(engine: Engine) -> list[str]:
    found: list[str] = engine.runner.device.accelerator.given  # type: ignore[attr-defined]
    return found


def test_an_engine_in_a_queue_gives_the_tokens_of_the_reference(
    folder: Path, expected: list[tuple[int, ...]]
) -> None:
    """Prompts in chunks, and graphs of one and two rows, with the sampler inside."""
    with interpreted(folder) as engine:
        assert [completion.token_ids for completion in engine.generate(PROMPTS, PARAMS)] == expected
        assert given(engine).count("replay") > 3
        assert engine.fingerprint.numerics.split("/")[-1] == ONE_CLASS
        assert engine.fingerprint.numerics.startswith("cuda/pretended/sm_90/float32/torch-")


def test_an_engine_with_kv_in_8_bits_gives_the_tokens_of_the_reference(folder: Path) -> None:
    wanted = by_plain_torch(folder, kv_cache_dtype="fp8_e5m2")
    with interpreted(folder, kv_cache_dtype="fp8_e5m2") as engine:
        assert [completion.token_ids for completion in engine.generate(PROMPTS, PARAMS)] == wanted
        assert engine.runner.backend.kv_dtypes == ("float8_e5m2",)  # type: ignore[attr-defined]
        assert ONE_CLASS in engine.fingerprint.numerics.split("/")


def test_drafts_are_verified_in_a_graph(
    folder: Path, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.engine.speculation.drafting.StepCosts", NoCosts)
    drafts = {"speculative": "ngram", "num_speculative_tokens": 2, "max_num_seqs": 1}
    with interpreted(folder, most_rows=3, **drafts) as engine:
        model, right = ModelIdentity.of(engine.fingerprint), expected[1]
        request = Request(
            "r", model, tuple(PROMPTS[1]), len(PROMPTS[1]), GREEDY, prediction=(*right[:3], right[3] ^ 1)
        )
        engine.add("r", request)
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        assert tuple(token for output in outputs for token in output.token_ids) == right
        assert sum(output.drafted for output in outputs)
        assert "replay" in given(engine)


def test_where_attention_has_two_classes_generated_rows_keep_to_their_kernels(
    folder: Path, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps with prompts, too; and the class says so."""
    wanted, ways = settings(folder), list[str]()
    for name in ("generated", "prompt"):
        original = getattr(Attention, name)

        def attend(*arguments: Any, name: str = name, original: Any = original) -> None:
            ways.append(name)
            original(*arguments)

        monkeypatch.setattr(Attention, name, attend)

    monkeypatch.setattr(
        "common.engine.devices.cuda.backend.prove", lambda *_: AttentionProof(False, "different")
    )
    runner = ModelRunner(wanted, device=InterpretedDevice(wanted))
    found = Engine(wanted, runner).generate(PROMPTS, PARAMS)
    assert [completion.token_ids for completion in found] == expected
    assert ways.count("generated") > 3
    assert runner.facts.fingerprint.numerics.split("/")[-1].endswith("different")


def attention(kv_dtype: torch.dtype | None = None) -> Attention:
    shape = HeadShape(num_heads=2, num_kv_heads=1, head_dim=16, rotary_dim=16, window=0)
    return Attention(shape, torch.float32, 8, capability=90, multiprocessors=2, kv_dtype=kv_dtype)


def test_the_proof_of_attention_finds_one_class() -> None:
    proof = prove(attention(), 1, 8, CPU, positions=20)
    assert proof.is_one_class
    assert proof == prove(attention(), 1, 4, CPU, positions=20)


def test_the_proof_of_attention_is_of_the_type_that_keys_are_kept_in() -> None:
    proofs = [prove(attention(of), 1, 8, CPU, positions=20) for of in (None, *MANTISSAS)]
    assert all(proof.is_one_class for proof in proofs)
    assert len({proof.digest for proof in proofs}) == 3


@pytest.mark.parametrize("name", ["generated", "prompt"])
def test_the_proof_of_attention_sees_a_last_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(Attention, name)

    def differ(self: Attention, qkv: torch.Tensor, *further: Any) -> None:
        original(self, qkv, *further)
        out = next(one for one in reversed(further) if isinstance(one, torch.Tensor))
        out[-1, -1] = torch.nextafter(out[-1, -1], torch.tensor(torch.inf))

    monkeypatch.setattr(Attention, name, differ)
    assert not prove(attention(), 1, 8, CPU, positions=20).is_one_class


def test_steps_that_fit_into_no_bucket_leave_no_memory_behind() -> None:
    """With drafts, there are as many kinds of them as there are numbers of sequences and of rows."""
    backend = CudaBackend(CPU, torch.float32, CARD, block_size=8, most_rows=4)
    backend.check(HeadShape(4, 2, 16, 16, 0))
    sizes = [(2, 2), *((tiles + drafts, tiles) for tiles in (1, 2, 3) for drafts in (1, 2, 3))]
    for rows, tiles in sizes:
        none = torch.zeros(rows, dtype=torch.int64)
        backend.prepare(
            Rows(
                token_ids=none,
                positions=none,
                slots=none - 1,
                num_generated=rows,
                padded_generated=rows,
                prompt_chunks=(),
                tiles=torch.zeros((tiles, 4), dtype=torch.int32),
                num_generated_tiles=tiles,
                tables=torch.zeros(1, dtype=torch.int32),
            )
        )
    assert [each.rows for each in backend._workspaces.values()] == [2]
