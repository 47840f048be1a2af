"""A gateway and nodes, on the code that serves: dispatcher, node links, links, token streams.

Owns what stands in for the rest: Redis (`Store`), which may be away for a while; the engine, which
makes a token of each choice in every step; and a handoff of one message and its Ack, upon which
nothing here depends (the protocol of real ones has its own proof, tests/support/protocol).
`Schedule` has faults happen, and says what must hold after them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import pickle
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence

from common.errors import LinkLost, ServiceUnavailable
from common.metrics import Metrics
from common.node.gateways import Gateways
from common.node.token_stream import ChoiceKey
from common.sampling import SamplingParams
from common.store.registry import NodeRecord, NodeState, Role, Snapshot
from common.store.requests import Load, Place, Where
from common.wire.bus_links import Down
from common.wire.message import HandoffKey, Message
from common.wire.messages import (
    Ack,
    CacheQuery,
    Cancel,
    Dispatch,
    Failed,
    HoldsQuery,
    Offer,
    Stage,
    TokenRun,
    Tokens,
    TokensAck,
    TookOver,
)
from gateway.dispatch import Dispatcher
from gateway.metrics import GatewayMetrics
from gateway.node_links import NodeLinks
from gateway.open_request import Work
from gateway.placement import DispatchLimits
from gateway.ports import Ending
from gateway.prefix_index import PrefixIndex
from gateway.router import LeastLoadedRouter
from tests.support.asked import a_request
from tests.support.fake_cluster import FINGERPRINT, MODEL, endless
from tests.support.streams.world import Process, VirtualBus, World

STEP_S = 0.2  # of an engine: one token of each choice
PREFILL_S = 0.2
ROUND_TRIP_S = 0.002  # to Redis
GATEWAY = "gateway"
SAVED_S = 1.0
CAPACITY = 3  # choices that a node computes at once; further entries wait, unread
HEALED_S = 60.0  # from the last fault until everything has ended


@dataclasses.dataclass(slots=True)
class _Entry:
    dispatch: Dispatch
    node: str  # "": given back to the gateway
    claim: str = ""


class Store:
    """Redis: records of nodes, queues, claims. Implements what gateway and nodes ask of it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.records: dict[str, NodeRecord] = {}
        self.entries: dict[tuple[str, int], _Entry] = {}
        self.attempts: dict[tuple[str, int], int] = {}  # of each choice, the latest
        self.ended: set[str] = set()
        self.nodes: dict[str, VirtualNode] = {}
        self.away = False
        self.generation = 1
        self._saved: deque[bytes] = deque(maxlen=2)
        self._save()

    def _save(self) -> None:
        """To its disk, once a second."""
        self._saved.append(pickle.dumps((self.entries, self.attempts, self.ended)))
        self.world.later(SAVED_S, self._save)

    def restart(self, *, empty: bool) -> None:
        """What was on its disk is there again, or nothing."""
        self.generation += 1
        saved = ({}, {}, set()) if empty else pickle.loads(self._saved[0])
        self.entries, self.attempts, self.ended = saved
        self.records = {}

    async def _round_trip(self) -> None:
        await asyncio.sleep(ROUND_TRIP_S)
        if self.away:
            raise ServiceUnavailable("Redis is away")

    # RequestStore.

    async def accept(self, node: str, dispatch: Dispatch, *, claimed_by: str = "") -> None:
        await self._round_trip()
        key = (dispatch.request.id, dispatch.attempt)
        if key in self.entries:
            return
        for choice in dispatch.choices:
            if self.attempts.get((dispatch.request.id, choice), 0) > dispatch.attempt:
                return
            self.attempts[dispatch.request.id, choice] = dispatch.attempt
        self.entries[key] = _Entry(dispatch, node, claimed_by)
        if node in self.nodes:
            self.nodes[node].process.soon(self.nodes[node].room.set)

    async def locate(self, choices: Sequence[tuple[str, int, int]]) -> list[Where]:
        await self._round_trip()
        return [self._where(r, n, c) for r, n, c in choices]

    def _where(self, request: str, attempt: int, choice: int) -> Where:
        entry = self.entries.get((request, attempt))
        if entry is None:
            return Where(Place.UNKNOWN)
        if request in self.ended or self.attempts[request, choice] != attempt:
            return Where(Place.NOWHERE)
        if entry.claim:
            return Where(Place.CLAIMED, entry.claim)
        return Where(Place.QUEUED, entry.node) if entry.node else Where(Place.RETURNED)

    async def advance(self, stage: Stage) -> None: ...

    async def finish(self, request: str, endings: Sequence[Ending]) -> None:
        self.ended.add(request)

    async def end(self, request: str, state: str, code: str, message: str) -> None:
        self.ended.add(request)

    async def bury(self, dispatch: Dispatch, reason: str) -> None:
        raise AssertionError(f"{dispatch} is no poison")

    async def open_requests(self, gateway: str) -> set[str]:
        await self._round_trip()
        return {request for request, _ in self.entries} - self.ended

    def is_wanted(self, dispatch: Dispatch) -> bool:
        if dispatch.request.id in self.ended:
            return False
        return any(
            self.attempts.get((dispatch.request.id, choice)) == dispatch.attempt
            for choice in dispatch.choices
        )

    # Registry and loads.

    async def watch(self, interval_s: float) -> AsyncIterator[Snapshot]:
        while True:
            if not self.away:
                yield Snapshot(dict(self.records), dict.fromkeys(self.records, 0.0), str(self.generation))
            await asyncio.sleep(interval_s)

    async def alone(self, incarnation: str) -> str | None:
        await self._round_trip()
        return None

    async def loads(self, incarnations: Sequence[str]) -> dict[str, Load]:
        return {}

    # Nodes.

    def claim(self, node: str, capacity: int) -> list[Dispatch]:
        if self.away:
            return []
        found = [e for e in self.entries.values() if e.node == node and not e.claim]
        if not found and not self.nodes[node].sequences:
            found = self._pull(node)
        wanted = [entry for entry in found if self.is_wanted(entry.dispatch)][:capacity]
        for entry in wanted:
            entry.claim = node
        return [entry.dispatch for entry in wanted]

    def _pull(self, node: str) -> list[_Entry]:
        """What waits, unread, at another node of its role."""
        role = self.nodes[node].role
        alike = {name for name, record in self.records.items() if record.role is role}
        found = [e for e in self.entries.values() if e.node in alike - {node} and not e.claim]
        for entry in found:
            entry.node = node
        return found

    def leave(self, node: str) -> None:
        """It gives back what it has not claimed, to another one or to the gateways."""
        record = self.records.pop(node, None)
        alike = [n for n, r in self.records.items() if record is not None and r.role is record.role]
        for entry in self.entries.values():
            if entry.node == node and not entry.claim:
                entry.node = self.world.random.choice(["", *alike])


@dataclasses.dataclass(slots=True)
class _Sequence:
    """One choice in one attempt at a node."""

    dispatch: Dispatch
    choice: int
    position: int  # of the next token
    taken_over_at: int = 0  # where it came by a handoff
    ready_at: float = 0.0
    peer: str = ""  # it is handed over to, and waits for Ack

    @property
    def key(self) -> ChoiceKey:
        return ChoiceKey(self.dispatch.request.id, self.dispatch.attempt, self.choice)


class VirtualNode:
    """A node without an engine; what it owes to gateways is kept by the real `Gateways`."""

    def __init__(self, process: Process, store: Store, role: Role) -> None:
        self.process, self.store, self.role = process, store, role
        self.world, self.name = process.world, process.name
        self.bus = VirtualBus(process)
        self.gateways = Gateways(self.name, self.bus)
        self.gateways.attempts = self
        self.sequences: dict[ChoiceKey, _Sequence] = {}
        self.room = asyncio.Event()
        self.work = asyncio.Event()
        self.beats = 0
        self.lost: dict[str, int] = {}  # peer → beats in its record then
        self.acknowledged: Counter[ChoiceKey] = Counter()  # below which position
        self.gateways.send = self._check_sent  # type: ignore[method-assign]
        store.nodes[self.name] = self
        for loop in (self.bus.beat, self._listen, self._watch, self._announce, self._take, self._compute):
            process.start(loop())

    async def _announce(self) -> None:
        while True:
            self.beats += not self.store.away
            self.store.records[self.name] = NodeRecord(
                self.name,
                self.name,
                self.role,
                NodeState.READY,
                self.bus.endpoint,
                model=FINGERPRINT.model,
                revision=FINGERPRINT.revision,
                layout=FINGERPRINT.layout,
                numerics=FINGERPRINT.numerics,
                tokenizer=FINGERPRINT.tokenizer,
                block_size=16,
                num_blocks=64,
                free_blocks=64,
                max_num_seqs=16,
                max_model_len=512,
                beats=self.beats,
            )
            await asyncio.sleep(0.5)

    async def _take(self) -> None:
        while True:
            self.room.clear()
            claimed = self.store.claim(self.name, max(0, CAPACITY - len(self.sequences)))
            await asyncio.sleep(ROUND_TRIP_S)
            for dispatch in claimed:
                self._connect(dispatch.request.gateway, dispatch.request.gateway_endpoint)
                for choice in dispatch.choices:
                    if ChoiceKey(dispatch.request.id, dispatch.attempt, choice) in self.sequences:
                        continue  # Redis lost it, and its gateway queued it again
                    sequence = _Sequence(dispatch, choice, len(dispatch.request.token_ids))
                    sequence.ready_at = self.world.now + PREFILL_S
                    self.sequences[sequence.key] = sequence
                    self._say_who_has(sequence)
                self.work.set()
            if not claimed:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.room.wait(), 1.0)

    def _connect(self, peer: str, endpoint: str) -> None:
        if self.bus.link(peer) is None:
            self.bus.connect(peer, endpoint)

    async def _listen(self) -> None:
        while True:
            received = await self.bus.receive()
            match received.message:
                case TokensAck() as message:
                    for request, attempt, choice, below in message.acks:
                        key = ChoiceKey(request, attempt, choice)
                        self.acknowledged[key] = max(self.acknowledged[key], below)
                    self.gateways.acknowledged(received.peer, message)
                case HoldsQuery() as message:
                    self.gateways.asked(received.peer, message)
                case Cancel(gateway=gateway, request=request, attempt=attempt, choices=choices):
                    self.gateways.tokens.forget(gateway, request, attempt, choices)
                    for key in [k for k in self.sequences if k[0] == request and k[1] <= attempt]:
                        if not choices or key.choice in choices:
                            del self.sequences[key]
                    self.room.set()
                case Offer() as offer:
                    self._adopt(received.peer, offer)
                case Ack(key):
                    choice = ChoiceKey(key.request, key.attempt, key.choice)
                    self._handed_over(choice, received.peer)
                case CacheQuery():
                    pass
                case message:
                    raise AssertionError(f"{self.name} got {message}")

    async def _watch(self) -> None:
        while True:
            event = await self.bus.next_event()
            if event.up:
                self.gateways.linked(event.peer)
                continue
            self.gateways.unlinked(event.peer)
            if event.peer in self.store.records:
                self.lost[event.peer] = self.store.records[event.peer].beats
            for sequence in [s for s in self.sequences.values() if s.peer == event.peer]:
                self._failed(sequence)  # its peer may have it: it is computed twice, then

    def _check_sent(self, gateway: str, message: Message) -> None:
        """What was acknowledged once is never sent again."""
        for run in message.runs if isinstance(message, Tokens) else ():
            below = self.acknowledged[ChoiceKey(run.request, run.attempt, run.choice)]
            assert run.end > below, f"{run} was acknowledged: {below}"
        Gateways.send(self.gateways, gateway, message)

    # The engine.

    async def _compute(self) -> None:
        while True:
            self.work.clear()
            if not self.sequences:
                await self.work.wait()
            await asyncio.sleep(STEP_S)
            runs, ended = [], []
            for sequence in list(self.sequences.values()):
                if sequence.ready_at <= self.world.now and not sequence.peer:
                    runs.append((sequence.dispatch.request.gateway, self._token(sequence)))
                    if runs[-1][1].finish_reason:
                        ended.append(sequence)
                    elif self.role is Role.PREFILL:
                        self._hand_over(sequence)
            self.gateways.tokens.push(runs)
            for sequence in ended:
                del self.sequences[sequence.key]
            self.room.set()

    def _token(self, sequence: _Sequence) -> TokenRun:
        dispatch, position = sequence.dispatch, sequence.position
        index = position - dispatch.request.prompt_len
        token = _reply(dispatch, sequence.choice)[index]
        reason = "length" if index == dispatch.request.params.max_tokens - 1 else ""
        sequence.position += 1
        return TokenRun(*sequence.key, position, (token,), (), reason)

    # Handoffs.

    def _hand_over(self, sequence: _Sequence) -> None:
        decode = [
            record
            for name, record in self.store.records.items()
            if record.role is Role.DECODE and record.beats > self.lost.get(name, 0)
        ]
        if not decode:
            self._failed(sequence)
            return
        peer = self.world.random.choice(decode)
        sequence.peer = peer.incarnation
        self._connect(peer.incarnation, peer.endpoint)
        d = sequence.dispatch
        key = HandoffKey("link", *sequence.key)
        offer = Offer(key, d.request, (), sequence.position - len(d.request.token_ids), 0)
        with contextlib.suppress(LinkLost):  # the event that follows says it, too
            self.bus.send(sequence.peer, offer)

    def _adopt(self, peer: str, offer: Offer) -> None:
        dispatch = Dispatch(offer.request, offer.key.attempt, (offer.key.choice,), "", "")
        position = len(offer.request.token_ids) + offer.tail_fill
        sequence = _Sequence(dispatch, offer.key.choice, position, position)
        if sequence.key not in self.sequences:
            self.sequences[sequence.key] = sequence
            self._connect(offer.request.gateway, offer.request.gateway_endpoint)
            self._say_who_has(sequence)
            self.work.set()
        with contextlib.suppress(LinkLost):
            self.bus.send(peer, Ack(HandoffKey("link", *sequence.key)))

    def _handed_over(self, key: ChoiceKey, peer: str) -> None:
        sequence = self.sequences.get(key)
        if sequence is not None and sequence.peer == peer:
            del self.sequences[key]
            self.room.set()
            word = TookOver(peer, *key, sequence.position)
            self.gateways.end(sequence.dispatch.request.gateway, word)

    def _failed(self, sequence: _Sequence) -> None:
        del self.sequences[sequence.key]
        self.room.set()
        word = Failed(self.name, *sequence.key, LinkLost.code, "no peer", True)
        self.gateways.end(sequence.dispatch.request.gateway, word)

    # Attempts, for `Gateways`.

    def _say_who_has(self, sequence: _Sequence) -> None:
        word: Message = Stage(self.name, *sequence.key, "prefilling", {}, 0)
        if sequence.taken_over_at:
            word = TookOver(self.name, *sequence.key, sequence.taken_over_at)
        self.gateways.send(sequence.dispatch.request.gateway, word)

    def holds(self, key: ChoiceKey) -> bool:
        return key in self.sequences

    def gateway_linked(self, gateway: str) -> None:
        for sequence in self.sequences.values():
            if sequence.dispatch.request.gateway == gateway:
                self._say_who_has(sequence)

    def gateway_lost(self, gateway: str) -> None:
        for key, sequence in list(self.sequences.items()):
            if sequence.dispatch.request.gateway == gateway:
                del self.sequences[key]
        self.room.set()


class VirtualGateway:
    """The gateway's own code, but for HTTP and text."""

    def __init__(self, process: Process, store: Store) -> None:
        self.process = process
        self.bus = VirtualBus(process)
        index = PrefixIndex()
        self.links = NodeLinks(self.bus, store, store, index)  # type: ignore[arg-type]
        self.dispatcher = Dispatcher(
            gateway=process.name,
            store=store,
            bus=self.links,
            directory=self.links,
            router=LeastLoadedRouter(index),
            limits=DispatchLimits(max_attempts=50, placement_timeout_s=60.0),
            metrics=GatewayMetrics(Metrics()),
        )
        self.links.inbox = self.dispatcher
        self.links.on_redis_lost = self.dispatcher.reassert
        self._send, self.links.send = self.links.send, self._check_sent  # type: ignore[method-assign]
        self.asked: dict[str, Work] = {}
        self.got: dict[str, list[list[int]]] = {}
        self.clients: dict[str, asyncio.Task[None]] = {}
        process.start(self.bus.beat())
        process.start(self.links.run())

    def ask(self, name: str, *, max_tokens: int, n: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, seed=len(name))
        work = Work(a_request(range(100, 120), params, name, model=MODEL), n=n)
        self.got[name] = [[] for _ in range(n)]
        self.asked[name] = work
        self.clients[name] = self.process.loop.create_task(self._ask(work))

    async def _ask(self, work: Work) -> None:
        async with self.dispatcher.run(work) as request:
            async for update in request.updates():
                self.got[work.request.id][update.choice] += [t.token_id for t in update.tokens]

    def _check_sent(self, node: str, message: Message) -> None:
        """Nothing is acknowledged that its client has not got."""
        for name, attempt, index, below in message.acks if isinstance(message, TokensAck) else ():
            request = self.dispatcher._open.get(name)
            if request is not None and request.choices[index].stream.attempt == attempt:
                assert below <= request.choices[index].stream.below, f"{message} from nowhere"
        self._send(node, message)


FAULTS = (
    "stop gateway",
    "stop node",
    "cut",
    "part",
    "kill",
    "kill two",
    "drain",
    "empty Redis",
    "older Redis",
    "forget link",
    "forget choice",
    "Redis",
)


class Schedule:
    """Requests and faults, as the seed will have them; then all heals, and everything must end."""

    def __init__(self, seed: int, *, faults: Sequence[str] = FAULTS, lasting: float = 0.0) -> None:
        """`lasting`: how long each stop and parting lasts, else it is drawn."""
        self.world = World(seed)
        self.random = self.world.random
        self.store = Store(self.world)
        self._faults, self._lasting = faults, lasting
        self.log: list[str] = []
        self._serial = 0
        self._ends_at = self.world.now

    def run(self) -> None:
        """Raises `AssertionError` with the faults that happened, if anything that must hold does not."""
        with self.world.clock():
            try:
                self._run()
            except BaseException as error:
                error.add_note("\n".join(self.log))
                raise

    def _run(self) -> None:
        random, world = self.random, self.world
        self.gateway = VirtualGateway(Process(world, GATEWAY), self.store)
        roles = random.choice(
            [[Role.UNIFIED] * 2, [Role.PREFILL, Role.DECODE], [Role.PREFILL] * 2 + [Role.DECODE] * 2]
        )
        for role in roles:
            self._start_node(role)
        world.run_until(lambda: len(self.gateway.bus.peers()) == len(roles), 5.0)
        for number in range(random.randint(1, 4)):
            world.later(random.uniform(0.0, 4.0), self._ask, f"r{number}")
        for _ in range(random.randint(1, 3)):
            world.later(random.uniform(0.0, 10.0), self._fault, random.choice(list(self._faults)))
        world.run_until(lambda: False, 10.0)
        world.run_until(lambda: world.now > self._ends_at, 100.0)
        if random.random() < 0.1:
            self._note("the gateway is killed")
            self.gateway.process.kill()
            assert world.run_until(lambda: not self._held(), HEALED_S), self._held()
            return
        self._note("all is healed")
        clients = self.gateway.clients.values()
        assert world.run_until(lambda: all(c.done() for c in clients), HEALED_S), self._left()
        for name, client in self.gateway.clients.items():
            if not isinstance(client.exception(), ServiceUnavailable):  # not accepted: Redis was away
                assert client.exception() is None, client.exception()
                assert self.gateway.got[name] == _truth(self.gateway.asked[name])
        assert world.run_until(lambda: not self._held(), HEALED_S), self._held()

    def _left(self) -> list[str]:
        """Requests that have not ended."""
        clients = self.gateway.clients
        return [f"{n}: {self.gateway.got[n]}" for n, client in clients.items() if not client.done()]

    def _held(self) -> list[str]:
        """What nodes keep."""
        held = []
        for name, node in self.store.nodes.items():
            if tokens := node.gateways.tokens.num_unacknowledged:
                held.append(f"{name} has {tokens} unacknowledged")
            if node.sequences:
                held.append(f"{name} computes {list(node.sequences)}")
        return held

    def _start_node(self, role: Role) -> None:
        self._serial += 1
        VirtualNode(Process(self.world, f"{role}-{self._serial}"), self.store, role)

    def _ask(self, name: str) -> None:
        tokens, n = self.random.randint(1, 60), self.random.choice([1, 1, 2])
        self.gateway.process.soon(lambda: self.gateway.ask(name, max_tokens=tokens, n=n))

    def _note(self, what: str) -> None:
        self.log.append(f"{self.world.now - 1000.0:7.3f} {what}")

    # Faults.

    def _fault(self, kind: str) -> None:
        random, world = self.random, self.world
        lasting = self._lasting or random.choice([0.5, 1.0, 2.9, 4.0, 5.0, 6.1, 7.0, 8.0, 12.0, 30.0])
        if not self.store.nodes:
            return
        node = random.choice(list(self.store.nodes.values()))
        if kind.startswith("stop"):
            process = self.gateway.process if kind == "stop gateway" else node.process
            if not process.stopped:
                process.stop()
                self._until(lasting, f"{process.name} is stopped", process.go_on)
        elif kind == "part":
            names = random.sample([GATEWAY, *self.store.nodes], 2)
            world.parted.add(frozenset(names))
            self._until(lasting, f"{names} are parted", lambda: world.parted.discard(frozenset(names)))
        elif kind == "cut":
            live = [c for c in world.connections.values() if not (c.broken or c.closed)]
            if live:
                connection = random.choice(live)
                connection.cut()
                self._note(f"cut {connection.address!r}")
        elif kind.startswith("kill"):
            self._end(node, "is killed")
            if kind == "kill two" and self.store.nodes:
                self._end(random.choice(list(self.store.nodes.values())), "is killed with it")
        elif kind == "drain":  # its grace period is over at once
            if not node.process.stopped:
                node.bus.close()
                if not self.store.away:
                    self.store.leave(node.name)
            self._end(node, "leaves")
        elif kind.endswith(" Redis"):
            self.store.restart(empty=kind == "empty Redis")
            self._until(lasting, f"{kind}, and away", lambda: setattr(self.store, "away", False))
            self.store.away = True
        elif kind == "Redis":
            self.store.away = True
            self._until(lasting, "Redis is away", lambda: setattr(self.store, "away", False))
        elif kind == "forget link":
            bus = random.choice([self.gateway.bus, *(n.bus for n in self.store.nodes.values())])
            if links := list(bus._links):
                link = random.choice(links)
                bus.process.soon(lambda: bus._links.end(link, Down.SILENT, silently=True))
                self._note(f"{bus.incarnation} forgets {link.id} with {link.peer}")
        elif node.sequences:
            key = random.choice(list(node.sequences))
            node.process.soon(lambda: node.sequences.pop(key, None))
            self._note(f"{node.name} forgets {key}")

    def _end(self, node: VirtualNode, what: str) -> None:
        if not node.process.stopped:
            node.process.kill()
            del self.store.nodes[node.name]
            self._until(1.0, f"{node.name} {what}", lambda: self._start_node(node.role))

    def _until(self, lasting: float, what: str, healed: Callable[[], None]) -> None:
        self._note(f"{what} for {lasting} s")
        self._ends_at = max(self._ends_at, self.world.now + lasting)
        self.world.later(lasting, healed)


def _reply(dispatch: Dispatch, choice: int) -> tuple[int, ...]:
    asked = dispatch.request
    prompt = asked.token_ids[: asked.prompt_len]
    return _known(prompt, asked.params, choice)


@functools.lru_cache(1024)
def _known(prompt: tuple[int, ...], params: SamplingParams, choice: int) -> tuple[int, ...]:
    return tuple(endless(a_request(prompt, params), choice))


def _truth(work: Work) -> list[list[int]]:
    return [endless(work.request, choice)[: work.request.params.max_tokens] for choice in range(work.n)]
