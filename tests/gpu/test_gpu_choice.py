"""The GPU that the settings name, and the share of its memory: what a pretended one cannot show."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch

from common.engine import Engine, SamplingParams
from common.engine.devices.cuda.gpus import TorchGpus
from common.engine.runner.model_runner import ModelRunner
from common.errors import ConfigError
from common.model_files import SHIPPED_MODEL
from common.settings.config import EngineSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_a_gpu_has_the_uuid_that_nvidia_smi_shows() -> None:
    if shutil.which("nvidia-smi") is None:
        pytest.skip("there is no nvidia-smi")
    said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    found = TorchGpus().visible()
    assert len({gpu.uuid for gpu in found}) == len(found) == torch.cuda.device_count()
    for gpu in found:
        assert gpu.uuid in said, said


def test_an_engine_is_on_the_gpu_that_is_named_and_on_no_other() -> None:
    last = torch.cuda.device_count() - 1
    before = [torch.cuda.memory_allocated(index) for index in range(last)]
    settings = EngineSettings(model=str(SHIPPED_MODEL), device=f"cuda:{last}", num_kv_blocks=64)
    engine = Engine(settings, runner := ModelRunner(settings))
    (completion,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(completion.token_ids) == 4
    assert runner.cache.slabs.device == torch.device("cuda", last)
    assert [torch.cuda.memory_allocated(index) for index in range(last)] == before
    with pytest.raises(ConfigError, match=f"cuda:{last + 1} is set, but torch sees {last + 1} GPU"):
        ModelRunner(EngineSettings(model=str(SHIPPED_MODEL), device=f"cuda:{last + 1}"))


def test_a_process_stays_within_its_share_of_the_memory() -> None:
    share = 0.1
    settings = EngineSettings(model=str(SHIPPED_MODEL), device="cuda", gpu_memory_utilization=share)
    free, total = torch.cuda.mem_get_info(0)
    runner = ModelRunner(settings)
    assert free - torch.cuda.mem_get_info(0)[0] <= share * total + (1 << 30)  # and the context
    assert runner.device.free_memory() >= 0
