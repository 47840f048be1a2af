"""A device is chosen once, by its name, and everything that runs on it comes from it."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor

from common.engine import Engine, SamplingParams
from common.engine.devices.choice import DEVICES, choose_device
from common.engine.devices.cpu.device import CpuDevice
from common.engine.devices.cpu.sampling import NumbaSampling
from common.engine.devices.cuda.device import CudaDevice
from common.engine.devices.cuda.gpus import TorchGpus
from common.engine.devices.cuda.memory_share import GIB, MemoryShare
from common.engine.devices.device import Backend, Sampling, StepLimits
from common.engine.devices.filling import Filler, HostFiller
from common.engine.devices.reference.backend import ReferenceBackend
from common.engine.devices.reference.sampling import TorchSampling
from common.engine.runner.load_runner import load_runner
from common.engine.runner.loading import step_limits
from common.engine.runner.model_runner import ModelRunner
from common.errors import ConfigError, InsufficientMemory
from common.gpu import Gpu
from common.node.kv import SharedMemory
from common.settings.config import EngineSettings
from common.settings.values import DEVICE_FORM, parse_device
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

    def default_limits(self) -> StepLimits:
        self.asked.append("limits")
        return StepLimits(3, 40)

    def preferred_dtype(self, stored: str) -> torch.dtype:
        self.asked.append("dtype")
        return torch.float32

    def backend(self, dtype: torch.dtype) -> Backend:
        self.asked.append("backend")
        return ReferenceBackend(self.torch_device, dtype, "newcomer")

    def sampling(self, vocab_size: int) -> Sampling:
        self.asked.append("sampling")
        return TorchSampling(vocab_size, self.torch_device)

    def queue(self) -> None:
        self.asked.append("queue")

    def filler(self) -> Filler:
        self.asked.append("filler")
        return HostFiller(1)

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
    settings = EngineSettings(model=str(STORIES), device="newcomer")
    engine = Engine(settings, load_runner(settings))
    (completion,) = engine.generate([PROMPT], SamplingParams(max_tokens=20, temperature=0.0))
    assert completion.token_ids == expected.token_ids
    device = engine.runner.device
    assert (engine.facts.max_num_seqs, engine.scheduler.max_num_batched_tokens) == (3, 40)
    parts = ["queue", "limits", "dtype", "backend", "free", "filler", "free", "size of the pool", "pool"]
    parts.append("sampling")
    assert device.asked[: len(parts)] == parts
    assert set(device.asked[len(parts) :]) == {"wait"}
    kind, unique, name, *_ = engine.facts.fingerprint.numerics.split("/")
    assert (kind, unique.partition("-")[0], name) == ("reference", "unrepeatable", "newcomer")
    assert engine.runner.is_lost(RuntimeError())


def test_nobody_is_compatible_with_the_reference_not_even_itself_elsewhere() -> None:
    """It does not keep the numerics rule: nothing is handed over on trust."""
    one, other = (ReferenceBackend(torch.device("cpu"), torch.float32, "cpu") for _ in range(2))
    assert one.numerics_class == one.numerics_class
    assert one.numerics_class != other.numerics_class


def test_the_settings_name_the_devices_of_the_table() -> None:
    names = DEVICE_FORM.split("|")
    assert set(names) == {"auto", *DEVICES, "cuda:N"}
    assert all(parse_device(name.replace("N", "7")) for name in names)


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


def test_an_index_is_one_of_the_gpus_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device(EngineSettings(device="cuda:3")).torch_device == torch.device("cuda", 3)
    assert choose_device(EngineSettings(device="cuda")).torch_device == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="cuda:4 is set, but torch sees 4 GPUs, cuda:0 to cuda:3") as raised:
        choose_device(EngineSettings(device="cuda:4"))
    assert raised.value.param == "device"


def test_a_device_that_nobody_knows_is_refused_by_whoever_names_it() -> None:
    with pytest.raises(ConfigError, match="must be one of auto, cpu, cuda, cuda:N, not 'tpu'"):
        Engine.load(STORIES, device="tpu")
    with pytest.raises(ConfigError, match="'tpu' is none of auto, cuda, cpu"):
        choose_device(EngineSettings(device="tpu"))


def test_gpus_are_listed_with_the_names_that_nvidia_smi_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [
        types.SimpleNamespace(uuid="0a-1b", name="NVIDIA H200", total_memory=140 * GIB),
        types.SimpleNamespace(uuid="2c-3d", name="NVIDIA H200 MIG 1g.18gb", total_memory=17 * GIB),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    assert TorchGpus().visible() == [
        Gpu(0, "GPU-0a-1b", "NVIDIA H200", 140 * GIB),
        Gpu(1, "MIG-2c-3d", "NVIDIA H200 MIG 1g.18gb", 17 * GIB),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not TorchGpus().visible()


@pytest.mark.parametrize(
    ("total", "limits"), [(141 * GIB, StepLimits(256, 8192)), (24 * GIB, StepLimits(256, 2048))]
)
def test_a_gpu_takes_more_in_a_step_than_a_cpu(
    total: int, limits: StepLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = types.SimpleNamespace(total_memory=total)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    settings = EngineSettings()
    assert step_limits(settings, CudaDevice(settings)) == limits
    assert step_limits(settings, CpuDevice(settings)) == StepLimits(64, 512)


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({"max_num_seqs": 5}, StepLimits(5, 512)),
        ({"max_num_seqs": 700}, StepLimits(700, 700)),  # each gets a token
        ({"max_num_batched_tokens": 40}, StepLimits(40, 40)),
        ({"max_num_batched_tokens": 900}, StepLimits(64, 900)),
        ({"max_num_seqs": 50, "max_num_batched_tokens": 40}, StepLimits(50, 40)),  # refused, as ever
    ],
)
def test_what_is_set_counts_and_what_is_not_does_not_contradict_it(
    given: dict[str, int], limits: StepLimits
) -> None:
    settings = EngineSettings(**given)  # type: ignore[arg-type]
    assert step_limits(settings, CpuDevice(settings)) == limits


def test_a_process_takes_its_share_of_all_memory_whatever_is_free() -> None:
    alone = MemoryShare(0.9, 100 * GIB, 98 * GIB, others=False)
    assert alone.left(98 * GIB, 0) == 90 * GIB
    assert alone.left(68 * GIB, 20 * GIB) == 60 * GIB  # libraries have taken 10 more, and those are ours
    assert alone.left(5 * GIB, 0) == 0
    assert alone.left(99 * GIB, 0) == 90 * GIB  # somebody else has given some back


def test_two_processes_on_one_gpu_do_not_both_count_on_the_bytes_that_are_free() -> None:
    """Both begin while everything is free, and look again when the other has loaded."""
    first, second = (MemoryShare(0.45, 100 * GIB, 99 * GIB, others=True) for _ in range(2))
    assert first.left(99 * GIB, 0) == second.left(99 * GIB, 0) == 45 * GIB
    assert first.left(79 * GIB, 10 * GIB) == second.left(79 * GIB, 10 * GIB) == 35 * GIB
    assert first.left(99 * GIB, 0) + second.left(99 * GIB, 0) <= 99 * GIB
    assert first.left(3 * GIB, 10 * GIB) == 3 * GIB  # a third process, of which nobody knew


def test_a_share_that_cannot_be_had_is_refused_with_the_numbers() -> None:
    said = r"gpu_memory_utilization 0\.9 is 90\.0 GiB of a GPU of 100\.0 GiB, of which 80\.0 GiB are free"
    with pytest.raises(InsufficientMemory, match=said) as raised:
        MemoryShare(0.9, 100 * GIB, 80 * GIB, others=False)
    assert raised.value.param == "gpu_memory_utilization"


def test_a_gpu_gives_a_pool_no_more_than_is_left_of_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the weights take in between is taken off it."""
    memory = {"free": 100 * GIB, "own": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (memory["free"], 100 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: memory["own"])
    device = CudaDevice(EngineSettings(gpu_memory_utilization=0.5))
    assert device.free_memory() == 50 * GIB
    memory |= {"free": 84 * GIB, "own": 16 * GIB}
    assert device.free_memory() == 34 * GIB
    assert device.default_pool_bytes(device.free_memory()) <= 34 * GIB


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


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("CUDA error"), False),
    ],
)
def test_an_error_of_cuda_is_for_good_whichever_library_reports_it(error: Exception, is_lost: bool) -> None:
    assert CudaDevice(EngineSettings(device="cuda")).is_lost(error) is is_lost


def test_a_gpu_has_a_queue_unless_the_reference_computes() -> None:
    assert CudaDevice(EngineSettings(device="cuda", kernels="reference")).queue() is None
