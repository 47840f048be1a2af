"""What is stored comes whole into the memory that is given for it, or is refused by name; on a device whose
copies come late, too, through host memory that is bounded."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.engine.devices.filling import PIECE, Filler, HostFiller, Readers, pieces
from common.engine.devices.reference.backend import ReferenceBackend
from common.engine.devices.staging import FLAGS, StagedFiller
from common.engine.model.decoder import Model, tensor_shapes
from common.engine.model.weights import Checkpoint, StoredWeights
from common.errors import CheckpointError
from common.model_folder.description import read_config
from common.model_folder.model_config import ModelConfig, parse_model_config
from tests.support.fake_accelerator import FakeAccelerator, FakeQueue, Order

HOST = torch.device("cpu")
SLOT = 1 << 12  # bytes: less than most tensors of the models here


class InMemory:
    """Implements `Stored`; `before` is called with each stretch that is read."""

    def __init__(self, name: str, values: Tensor, before: Callable[[int], None] = lambda start: None) -> None:
        self.name, self.where = name, f"tensor {name} in memory"
        self.dtype, self.shape = values.dtype, tuple(values.shape)
        self._bytes = values.contiguous().view(-1).view(torch.uint8).numpy().data
        self._before = before

    def read(self, start: int, into: memoryview) -> None:
        self._before(start)
        into[:] = self._bytes[start : start + len(into)]


def staged(queue: FakeQueue, **fields: int) -> StagedFiller:
    return StagedFiller(queue, HOST, 1, **({"slots": 2, "slot_bytes": SLOT} | fields))


def late_queue() -> FakeQueue:
    return FakeAccelerator(Order.LATE).queue()


FILLERS = {
    "host": lambda: HostFiller(2),
    "staged": lambda: staged(late_queue()),
    "staged in odd order": lambda: staged(FakeAccelerator(Order.RANDOM).queue()),
}


@pytest.fixture(params=FILLERS)
def filler(request: pytest.FixtureRequest) -> Filler:
    made: Filler = FILLERS[request.param]()
    return made


def values(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_tensor_comes_into_any_place_in_any_type(
    stored: torch.dtype, wanted: torch.dtype, interleaved: bool, filler: Filler
) -> None:
    one, other = values(48, 130, dtype=stored), values(48, 130, dtype=stored, seed=2)
    memory = torch.full((96, 130), float("nan"), dtype=wanted)
    places = memory.view(6, 2, 8, 130).unbind(1) if interleaved else memory.split(48)
    with filler:
        for place, name, content in zip(places, "ab", (one, other), strict=True):
            filler.fill(place, InMemory(name, content))
        filler.finish()
    assert torch.equal(places[0].reshape(48, 130), one.to(wanted))
    assert torch.equal(places[1].reshape(48, 130), other.to(wanted))


def test_pieces_are_all_of_a_place_in_order_and_never_larger_than_asked() -> None:
    memory = torch.zeros(7, 2, 3, 50)
    for place in (memory, memory[:, 1], memory[:, 1, ::2], memory[3, 0, 2], memory.transpose(0, 3)):
        place.copy_(torch.arange(place.numel(), dtype=torch.float32).view(place.shape))
        for most in (1, 7, 50, 149, 151, 450, 10_000):
            found = list(pieces(place, most))
            assert all(0 < part.numel() <= most for _, part in found)
            assert all(int(part.reshape(-1)[0]) == start for start, part in found)
            assert torch.cat([part.reshape(-1) for _, part in found]).equal(place.reshape(-1))


def test_a_large_tensor_is_read_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    content = values(5, PIECE // 2 + 3)
    meet = threading.Barrier(2)
    first = {0, 3 * PIECE}  # of either thread

    def both_are_here(start: int) -> None:
        if start in first:
            meet.wait(timeout=30)

    place = torch.empty_like(content)
    with HostFiller(2) as filler:
        filler.fill(place, InMemory("x", content, both_are_here))
    assert torch.equal(place, content)


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [0, -1])
def test_what_is_not_finite_is_refused_by_name(
    fault: float, wanted: torch.dtype, at: int, filler: Filler
) -> None:
    bad = values(3, 5000)
    bad[at, at] = fault
    memory = torch.empty(9, 5000, dtype=wanted)

    def load() -> None:
        with filler:
            for row, (name, content) in enumerate({"a": values(3, 5000), "b": bad, "c": bad}.items()):
                filler.fill(memory[3 * row : 3 * row + 3], InMemory(name, content))
            filler.finish()

    with pytest.raises(CheckpointError, match="tensor b in memory has NaN or infinity") as raised:
        load()
    assert raised.value.param == "b"


def test_what_the_wanted_type_cannot_hold_is_refused_by_name(filler: Filler) -> None:
    def load() -> None:
        with filler:
            filler.fill(torch.empty(4, dtype=torch.float16), InMemory("x", torch.tensor([1.0, 2, 7e4, 3])))
            filler.finish()

    with pytest.raises(CheckpointError, match="x in memory has numbers that are too large for float16"):
        load()


def test_what_is_damaged_on_its_way_is_no_fault_of_the_file() -> None:
    queue, memory = late_queue(), torch.empty(100)
    with staged(queue) as filler:
        filler.fill(memory, InMemory("x", values(100, dtype=torch.float32)))
        taken = queue.waiting[0].action.args[0]  # type: ignore[attr-defined]
        taken[70] = float("nan")
        with pytest.raises(CheckpointError, match="x in memory is finite, but not where it was copied to"):
            filler.finish()


def test_a_tensor_beyond_the_first_array_of_flags_is_named() -> None:
    memory = torch.empty(FLAGS + 3)
    with staged(late_queue()) as filler:
        for number in range(FLAGS + 3):
            content = torch.tensor([float("nan") if number == FLAGS + 1 else 1.0])
            filler.fill(memory[number : number + 1], InMemory(f"x{number}", content))
        with pytest.raises(CheckpointError) as raised:
            filler.finish()
    assert raised.value.param == f"x{FLAGS + 1}"


def test_host_memory_is_bounded_whatever_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, most = late_queue(), 0
    content = values(40, 1000)  # twenty slots
    pinned, give = [], queue.pinned
    monkeypatch.setattr(queue, "pinned", lambda num_bytes: pinned.append(num_bytes) or give(num_bytes))
    with staged(queue, slots=3) as filler:
        for number in range(5):
            memory = torch.empty_like(content)
            filler.fill(memory, InMemory(str(number), content))
            most = max(most, sum(operation.what == "run" for operation in queue.waiting))
    assert pinned == [SLOT] * 3
    assert most <= 3  # what waits is in the slots, in whole ones
    assert queue.accelerator.given.count("run") > 90


def test_small_tensors_share_a_slot() -> None:
    queue = late_queue()
    memory = torch.empty(30, 16)
    content = values(30, 16, dtype=torch.float32)
    with staged(queue) as filler:
        for row in range(30):
            filler.fill(memory[row], InMemory(str(row), content[row]))
        assert queue.accelerator.given.count("run") == 30
        assert queue.accelerator.given.count("record") == 1  # of the first slot, full with 16
        assert len(queue.waiting) == 31  # nobody has waited
    assert torch.equal(memory, content)


def test_the_late_device_shows_a_slot_that_is_reused_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a wait between, everything else alike: the test above would fail."""
    content = values(40, 1000)
    for waits in (True, False):
        queue = late_queue()
        memory = torch.empty_like(content)
        with staged(queue) as filler:
            with monkeypatch.context() as patch:
                if not waits:
                    patch.setattr("tests.support.fake_accelerator.FakeEvent.wait", lambda event: None)
                filler.fill(memory, InMemory("x", content))
            filler.finish()
        assert torch.equal(memory, content) == waits


def test_after_an_error_nothing_reads_or_copies_any_more() -> None:
    """One thread fails, while the other is in the midst of reading."""
    failed, at_end = threading.Event(), threading.Event()

    def fault(start: int) -> None:
        if start == 0:
            failed.set()
            raise CheckpointError("the disk is broken", param="x")
        failed.wait(timeout=30)
        at_end.set()

    queue = late_queue()
    good, bad = values(10, 1000), InMemory("x", values(4, PIECE), fault)

    def load() -> None:
        with StagedFiller(queue, HOST, 2, slots=2, slot_bytes=16 * PIECE) as filler:
            filler.fill(torch.empty(10, 1000, dtype=torch.bfloat16), InMemory("good", good))
            filler.fill(torch.empty(4, PIECE, dtype=torch.bfloat16), bad)

    with pytest.raises(CheckpointError, match="the disk is broken"):
        load()
    assert at_end.is_set()
    assert not queue.waiting
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_who_interrupts_a_load_waits_for_no_more_than_a_piece() -> None:
    pieces_read = []
    inside, go_on = threading.Event(), threading.Event()

    def slow(start: int) -> None:
        pieces_read.append(start)
        inside.set()
        go_on.wait(timeout=30)

    readers = Readers(1)
    stored, into = InMemory("x", values(8, PIECE), slow), torch.empty(16 * PIECE, dtype=torch.uint8).numpy()
    errors: list[BaseException] = []

    def read() -> None:
        try:
            readers.read(stored, 0, into)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    inside.wait(timeout=30)
    readers.close()
    go_on.set()
    thread.join(timeout=30)
    assert pieces_read == [0]
    assert len(errors) == 1


class Remembering(ReferenceBackend):
    """All memory that it gave."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(torch.device("cpu"), dtype, "cpu")
        self.given: list[Tensor] = []

    def memory(self, *shape: int) -> Tensor:
        self.given.append(torch.full(shape, float("nan"), dtype=self.dtype))
        return self.given[-1]


SMALL = {
    "vocab_size": 150,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 16},
}


def write_model(folder: Path, family: str, shards: int) -> dict[str, Tensor]:
    """A random checkpoint in float32; all its tensors."""
    config = SMALL | FAMILIES[family] | {"model_type": family}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(config_of(folder), has_head=not config["tie_word_embeddings"])
    tensors = {
        name: values(*shape, dtype=torch.float32, seed=seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    where = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return tensors


def config_of(folder: Path) -> ModelConfig:
    return parse_model_config(read_config(folder, {}, required=True))


def loaded(folder: Path, filler: Filler, dtype: torch.dtype) -> list[Tensor]:
    backend = Remembering(dtype)
    with Checkpoint(folder) as checkpoint, filler:
        Model(config_of(folder), backend, StoredWeights(checkpoint, filler), 64)
    return backend.given


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_of_a_model_lies_where_its_backend_wants_it(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {name: x.to(dtype) for name, x in write_model(tmp_path, family, shards=3).items()}
    on_host = loaded(tmp_path, HostFiller(1), dtype)
    on_device = loaded(tmp_path, staged(late_queue()), dtype)
    assert len(on_host) == len(on_device)
    assert all(torch.equal(one, other) for one, other in zip(on_host, on_device, strict=True))
    assert sum(x.numel() for x in on_host) == sum(x.numel() for x in tensors.values())
    layer = "model.layers.1"
    qkv = torch.cat([tensors[f"{layer}.self_attn.{n}_proj.weight"] for n in "qkv"])
    gate, up = (tensors[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up"))
    gate_up = torch.cat((gate, up))
    alone = [name for name in tensors if not re.search(r"(q|k|v|gate|up)_proj", name)]
    assert len(alone) > 6
    for expected in (qkv, gate_up, *(tensors[name] for name in alone)):
        assert any(x.shape == expected.shape and torch.equal(x, expected) for x in on_host)


@pytest.mark.parametrize("differs", [False, True])
def test_a_stored_head_of_a_tied_model_is_compared_when_it_has_arrived(tmp_path: Path, differs: bool) -> None:
    """On a late device nothing of it is there yet when the layers are made."""
    tensors = write_model(tmp_path, "qwen2", shards=1)
    head = tensors["model.embed_tokens.weight"].clone()
    head[149, 63] += float(differs)
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    backend = ReferenceBackend(torch.device("cpu"), torch.float32, "cpu")
    with Checkpoint(tmp_path) as checkpoint, staged(late_queue()) as filler:
        model = Model(config_of(tmp_path), backend, StoredWeights(checkpoint, filler), 64)
    assert torch.equal(model._head(torch.eye(64), 0).T, head)
    assert (model._head._weight is model._embedding) != differs  # type: ignore[attr-defined]
