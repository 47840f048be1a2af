"""The reference backend on every device there is: same logits as transformers, same text, no leak.

Self-contained: torch, transformers, and the model that ships. Run on a GPU by `make test-gpu`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.engine import Engine, SamplingParams
from common.model_files import SHIPPED_MODEL
from common.settings.config import EngineSettings
from tests.support.checkpoints import save_random_model, transformers_model
from tests.support.engines import prompt_logits, with_poison

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


def reference_engine(folder: Path, device: str, dtype: str = "float32", **fields: object) -> Engine:
    settings: dict[str, object] = {
        "model": str(folder),
        "device": device,
        "dtype": dtype,
        "kernels": "reference",
        "num_kv_blocks": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 96,
    }
    return with_poison(EngineSettings(**(settings | fields)))  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_logits_equal_transformers(model_type: str, device: str, tmp_path: Path) -> None:
    window = {"sliding_window": 20} if model_type == "mistral" else {}
    folder = save_random_model(
        tmp_path,
        model_type,
        4,
        vocab_size=300,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        **window,
    )
    token_ids = torch.randint(0, 300, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    mine = prompt_logits(reference_engine(folder, device), token_ids)
    with torch.inference_mode():
        theirs = transformers_model(folder)(torch.tensor([token_ids])).logits[0]
    assert float((mine - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


@pytest.mark.parametrize("device", DEVICES)
def test_the_shipped_model_writes_what_transformers_writes(device: str) -> None:
    engine = reference_engine(SHIPPED_MODEL, device)
    prompt = [5, 90, 300, 77]
    params = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    (mine,) = engine.generate([prompt], params)
    with torch.inference_mode():
        theirs = transformers_model(SHIPPED_MODEL).generate(
            torch.tensor([prompt]), max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert list(mine.token_ids) == theirs[0, len(prompt) :].tolist()
    engine.check_idle()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_batches_choices_and_preemption_leave_nothing_behind(device: str, dtype: str) -> None:
    engine = reference_engine(SHIPPED_MODEL, device, dtype, num_kv_blocks=24)
    params = SamplingParams(
        max_tokens=60, temperature=0.8, top_p=0.95, seed=3, presence_penalty=0.3, logprobs=2, ignore_eos=True
    )
    prompts = [list(range(3, 3 + length)) for length in (1, 17, 40, 90)]
    completions = engine.generate(prompts, params, n=2)
    assert [len(c.token_ids) for c in completions] == [60] * 8
    assert all(len(c.logprobs) == 60 for c in completions)
    assert engine.scheduler.num_preemptions > 0
    engine.check_idle()
