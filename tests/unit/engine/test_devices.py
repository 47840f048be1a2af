"""A device is chosen once, by its name, and everything that runs on it comes from it."""

from __future__ import annotations

import typing

import pytest
import torch
from torch import Tensor

from common.engine import Engine, SamplingParams
from common.engine.devices.choice import DEVICES, choose_device
from common.engine.devices.cpu.device import CpuDevice
from common.engine.devices.cpu.sampling import NumbaSampling
from common.engine.devices.cuda.device import CudaDevice
from common.engine.devices.device import Backend, Sampling
from common.engine.devices.reference.backend import ReferenceBackend
from common.engine.devices.reference.sampling import TorchSampling
from common.engine.runner.model_runner import ModelRunner
from common.errors import ConfigError
from common.node.kv import SharedMemory
from common.settings.config import EngineSettings
from tests.support.checkpoints import STORIES

PROMPT = [1, 403, 407, 261, 378]


class Newcomer:
    """A device that only the table knows: plain torch throughout, and what was asked of it."""

    def __init__(self, settings: EngineSettings) -> None:
        self.torch_device = torch.device("cpu")
        self.asked: list[str] = []

    @staticmethod
    def is_present() -> bool:
        return True

    def preferred_dtype(self, stored: str) -> torch.dtype:
        self.asked.append("dtype")
        return torch.float32

    def backend(self, dtype: torch.dtype) -> Backend:
        self.asked.append("backend")
        return ReferenceBackend(self.torch_device, dtype, "newcomer")

    def sampling(self, vocab_size: int) -> Sampling:
        self.asked.append("sampling")
        return TorchSampling(vocab_size, self.torch_device)

    def pool(self, num_blocks: int, slab_bytes: int) -> Tensor:
        self.asked.append("pool")
        return torch.zeros(num_blocks, slab_bytes, dtype=torch.uint8)

    def free_memory(self) -> int:
        self.asked.append("free")
        return 1 << 30

    def default_pool_bytes(self, free: int) -> int:
        self.asked.append("size of the pool")
        return free // 16

    def synchronize(self) -> None:
        self.asked.append("wait")

    def is_lost(self, error: BaseException) -> bool:
        return True


def test_a_line_in_the_table_is_all_that_an_engine_needs_of_a_new_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (expected,) = Engine.load(STORIES, kernels="reference", dtype="float32").generate(
        [PROMPT], SamplingParams(max_tokens=20, temperature=0.0)
    )
    monkeypatch.setitem(DEVICES, "newcomer", Newcomer)
    monkeypatch.delattr(CpuDevice, "backend")
    monkeypatch.delattr(NumbaSampling, "sample")
    settings = EngineSettings(model=str(STORIES), device="newcomer")  # type: ignore[arg-type]
    engine = Engine(settings, ModelRunner(settings))
    (completion,) = engine.generate([PROMPT], SamplingParams(max_tokens=20, temperature=0.0))
    assert completion.token_ids == expected.token_ids
    device = engine.runner.device
    parts = ["dtype", "backend", "free", "free", "size of the pool", "pool", "sampling"]
    assert device.asked[: len(parts)] == parts
    assert set(device.asked[len(parts) :]) == {"wait"}
    assert engine.facts.fingerprint.numerics.startswith("reference/newcomer/")
    assert engine.runner.is_lost(RuntimeError())


def test_the_settings_name_the_devices_of_the_table() -> None:
    names = typing.get_args(typing.get_type_hints(EngineSettings)["device"])
    assert set(names) == {"auto", *DEVICES}


def test_auto_takes_the_first_device_that_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(choose_device(EngineSettings()), CpuDevice)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert isinstance(choose_device(EngineSettings()), CudaDevice)
    assert isinstance(choose_device(EngineSettings(device="cpu")), CpuDevice)


def test_a_device_that_the_machine_lacks_is_refused_before_a_model_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device cuda is set") as raised:
        ModelRunner(EngineSettings(model="./no/such/folder", device="cuda"))
    assert raised.value.param == "device"


def test_a_pool_is_shared_from_where_the_engine_has_put_it() -> None:
    shared = SharedMemory()
    settings = EngineSettings(model=str(STORIES), num_kv_blocks=5)
    runner = ModelRunner(settings, storage=shared.allocate)
    assert shared.memory is not None
    assert shared.memory.slabs.device == runner.device.torch_device
    assert runner.cache.slabs.data_ptr() == shared.memory.address(0)
    shared.memory.close()


def test_a_pool_that_no_peer_could_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="blocks on meta cannot be handed over") as raised:
        SharedMemory().allocate(torch.device("meta"), 1, 64)
    assert raised.value.param == "device"
