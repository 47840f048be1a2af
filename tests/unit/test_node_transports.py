"""Which transports a node has, and which of them a link takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from common.errors import ConfigError, LinkLost
from common.kv_layout import Fingerprint, KVLayout
from common.node import transports
from common.node.transports import make_transports
from common.settings.config import BusSettings, NodeSettings
from common.wire.bus import new_secret_key
from common.wire.messages import Refuse, Welcome
from kv_transfer import handshake
from kv_transfer.device_memory import DevicePoolMemory
from kv_transfer.lease import Leases
from kv_transfer.pool_memory import HostPoolMemory, PoolMemory
from kv_transfer.transports.base import Source, Target
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_nccl import FakeNccl

LAYOUT = KVLayout.paged_attention(num_layers=1, num_kv_heads=1, head_dim=8, block_size=4, dtype="float32")
KEY_PAIR = new_secret_key()
SAME = Fingerprint("m", "r", "l", "n", 4)


class NoPool:
    def acquire(self, blocks: object) -> None: ...

    def release(self, blocks: object) -> None: ...


@dataclasses.dataclass
class Nodes:
    """Makes nodes' ends, and closes them."""

    memories: list[PoolMemory] = dataclasses.field(default_factory=list)
    sources: list[Source] = dataclasses.field(default_factory=list)
    cuda: FakeCuda = dataclasses.field(default_factory=FakeCuda)

    def memory(self, *, device: bool) -> PoolMemory:
        slab_bytes = LAYOUT.slab_bytes
        made = DevicePoolMemory(2, slab_bytes, self.cuda) if device else HostPoolMemory(2, slab_bytes)
        self.memories.append(made)
        return made

    def make(
        self,
        names: tuple[str, ...] | None,
        *,
        device: bool,
        settings: NodeSettings = NodeSettings(),  # noqa: B008
    ) -> transports.Made:
        if names is not None:
            settings = dataclasses.replace(settings, transports=names)  # type: ignore[arg-type]
        made = make_transports(settings, self.memory(device=device), LAYOUT, Leases(NoPool()))
        self.sources += made[0]
        return made


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    for source in made.sources:
        source.close()
    for memory in made.memories:
        memory.close()
    assert made.cuda.left == 0


def test_the_pool_decides_which_of_the_default_ones_a_node_has(nodes: Nodes) -> None:
    assert list(nodes.make(None, device=False)[1]) == ["shm", "tcp"]
    assert list(nodes.make(None, device=True)[1]) == ["cuda_ipc", "tcp"]


def test_one_that_a_setting_names_is_the_only_one(nodes: Nodes) -> None:
    sources, openers = nodes.make(("tcp",), device=True)
    assert [source.name for source in sources] == list(openers) == ["tcp"]


@pytest.mark.parametrize(
    ("encrypt_blocks", "scheme", "remark"),
    [
        (None, b"tcp", "blocks are in plain text"),
        (False, b"tcp", "blocks are in plain text"),
        (True, b"zmq", "blocks are encrypted"),
    ],
)
def test_on_loopback_blocks_are_encrypted_only_where_a_setting_says_so(
    nodes: Nodes, encrypt_blocks: bool | None, scheme: bytes, remark: str
) -> None:
    settings = NodeSettings(bus=BusSettings(secret_key=KEY_PAIR), encrypt_blocks=encrypt_blocks)
    (source,), openers = nodes.make(("tcp",), device=False, settings=settings)
    proof = source.open_link("link")
    assert proof[16:].partition(b"://")[0] == scheme
    target = Target(nodes.memory(device=False), LAYOUT)
    hello = handshake.hello("link", "a", SAME, LAYOUT.slab_bytes, {"tcp": proof})
    answer, reader = handshake.answer(hello, "b", SAME, target, openers, credits=1)
    assert isinstance(answer, Welcome)
    assert reader is not None
    reader.close()
    assert answer.reason.endswith(remark)


@pytest.mark.parametrize(("encrypt_blocks", "scheme"), [(None, b"zmq"), (True, b"zmq"), (False, b"tcp")])
def test_between_hosts_blocks_are_encrypted_unless_a_setting_says_no(
    nodes: Nodes, encrypt_blocks: bool | None, scheme: bytes
) -> None:
    bus = BusSettings(secret_key=KEY_PAIR, advertise_host="198.51.100.1")
    settings = NodeSettings(bus=bus, encrypt_blocks=encrypt_blocks)
    (source,), _ = nodes.make(("tcp",), device=False, settings=settings)
    assert source.open_link("link")[16:].partition(b"://")[0] == scheme


def test_a_node_that_encrypts_takes_no_plain_text_of_another_host(nodes: Nodes) -> None:
    settings = NodeSettings(bus=BusSettings(secret_key=KEY_PAIR))
    _, openers = nodes.make(("tcp",), device=False, settings=settings)
    target = Target(nodes.memory(device=False), LAYOUT)
    proof = bytes(16) + b"tcp://198.51.100.1:1"
    with pytest.raises(LinkLost, match="plain text"):
        openers["tcp"]("link", proof, target)


def test_none_is_none(nodes: Nodes) -> None:
    assert nodes.make((), device=False) == ([], {})


@pytest.mark.parametrize(("name", "device"), [("shm", True), ("cuda_ipc", False)])
def test_a_node_whose_pool_none_of_them_reads_does_not_start(nodes: Nodes, name: str, device: bool) -> None:
    with pytest.raises(ConfigError, match="--transports"):
        nodes.make((name,), device=device)


def test_one_that_is_named_and_cannot_be_had_is_an_error(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ConfigError("no libnccl here")

    monkeypatch.setattr(transports, "NcclLibrary", missing)
    with pytest.raises(ConfigError, match="nccl: no libnccl here"):
        nodes.make(("tcp", "nccl"), device=True)


def test_beside_nccl_no_call_of_cuda_keeps_the_interpreter(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.make(("cuda_ipc", "tcp"), device=True)
    assert not nodes.cuda.gives_way
    monkeypatch.setattr(transports, "NcclLibrary", lambda: FakeNccl(nodes.cuda))
    nodes.make(("cuda_ipc", "nccl"), device=True)
    assert nodes.cuda.gives_way


def test_a_device_without_handles_for_its_memory_has_the_others(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_supported(address: int) -> bytes:
        raise ConfigError("not supported")

    monkeypatch.setattr(nodes.cuda, "ipc_handle", not_supported)
    assert list(nodes.make(None, device=True)[1]) == ["tcp"]


@pytest.mark.parametrize(
    ("device", "theirs", "chosen"),
    [
        (False, ("shm", "tcp"), "shm"),
        (False, ("tcp",), "tcp"),
        (True, ("cuda_ipc", "tcp"), "cuda_ipc"),
        (True, ("tcp",), "tcp"),
    ],
)
def test_a_link_takes_the_first_that_both_ends_prove(
    nodes: Nodes, device: bool, theirs: tuple[str, ...], chosen: str
) -> None:
    sources, _ = nodes.make(None, device=device)
    proofs = {source.name: source.open_link("link") for source in sources}
    hello = handshake.hello("link", "sender", SAME, LAYOUT.slab_bytes, proofs)
    _, openers = nodes.make(theirs, device=device)
    target = Target(nodes.memories[-1], LAYOUT)
    answer, reader = handshake.answer(hello, "me", SAME, target, openers, credits=1)
    assert isinstance(answer, Welcome)
    assert reader is not None
    assert answer.transport == chosen
    reader.close()


def test_why_a_faster_one_was_not_taken_is_kept(nodes: Nodes) -> None:
    """A sender on another host: its proof opens nothing here, and tcp is left."""
    sources, openers = nodes.make(None, device=True)
    proofs = {source.name: source.open_link("link") for source in sources}
    proofs["cuda_ipc"] = b"0123456789abcdef" + bytes(32)
    hello = handshake.hello("link", "sender", SAME, LAYOUT.slab_bytes, proofs)
    target = Target(nodes.memories[-1], LAYOUT)
    answer, reader = handshake.answer(hello, "me", SAME, target, openers, credits=1)
    assert isinstance(answer, Welcome)
    assert reader is not None
    assert answer.transport == "tcp"
    assert answer.reason.startswith("cuda_ipc: not on this host")
    reader.close()


def test_device_memory_keeps_generations_in_host_memory_and_no_digests(nodes: Nodes) -> None:
    memory = nodes.memory(device=True)
    memory.begin_write(1)
    memory.slabs[1] = torch.arange(LAYOUT.slab_bytes).to(torch.uint8)
    assert memory.seal(1, b"a block's hash..") == 2
    assert memory.generations.tolist() == [0, 2]
    assert memory.digests == [b"", b""]
    assert [bytes(slab) for [slab] in memory.to_host([1])] == [bytes(memory.slabs[1].numpy())]


OTHER_DRAFT = dataclasses.replace(SAME, draft="small@1")


@pytest.mark.parametrize(("surplus", "is_welcome"), [(0, True), (160, True), (-1, False)])
def test_nodes_with_different_draft_models_exchange_the_models_own_kv(
    nodes: Nodes, surplus: int, is_welcome: bool
) -> None:
    """How long the draft's part of the peer's slabs is this node can't know; without the model's own it is
    no slab."""
    (source,), openers = nodes.make(("tcp",), device=False)
    hello = handshake.hello(
        "link", "a", OTHER_DRAFT, LAYOUT.slab_bytes + surplus, {"tcp": source.open_link("link")}
    )
    target = Target(nodes.memory(device=False), LAYOUT)
    answer, reader = handshake.answer(hello, "b", SAME, target, openers, credits=1)
    if not is_welcome:
        assert isinstance(answer, Refuse)
        assert answer.field == "slab_bytes"
        return
    assert isinstance(answer, Welcome)
    assert reader is not None
    reader.close()
    assert answer.reason.endswith("a draft model's KV is not sent: small@1 there, no draft model here")


def test_a_peer_that_says_a_wrong_length_of_its_slabs_is_not_read(nodes: Nodes) -> None:
    (source, _), openers = nodes.make(("shm", "tcp"), device=False)
    hello = handshake.hello(
        "link", "a", OTHER_DRAFT, LAYOUT.slab_bytes + 8, {"shm": source.open_link("link")}
    )
    target = Target(nodes.memory(device=False), LAYOUT)
    answer, _ = handshake.answer(hello, "b", SAME, target, openers, credits=1)
    assert isinstance(answer, Refuse)
    assert "slabs have another size" in answer.yours
