"""No kernel races in shared memory or leaves its memory, by the word of compute-sanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import save_random_model

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
WITHIN_S = 150.0
PLACES = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
FOUND = 9  # its exit status


@pytest.mark.parametrize("tool", ["racecheck", "memcheck"])
def test_the_sanitizer_finds_nothing(tool: str, tmp_path: Path) -> None:
    sanitizer = next(filter(None, map(shutil.which, PLACES)), None)
    if sanitizer is None or not torch.cuda.is_available():
        pytest.skip("no compute-sanitizer, or no CUDA device")
    folder = save_random_model(
        tmp_path,
        "qwen3",
        1,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
    )
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND)]
    command += [sys.executable, "-m", "tests.gpu.few_steps", str(folder)]
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WITHIN_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} took more than {WITHIN_S:.0f} s")
    assert ended.returncode != FOUND, ended.stdout[-4000:]
    assert ended.returncode == 0, ended.stderr[-4000:]
