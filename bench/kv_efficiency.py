"""What of the KV pool is reserved and not used, and what continuous batching gains.

The real core (line for room, scheduler, block pool) plans every step, of requests with the lengths of a
trace; a clock takes what the step would cost, and nothing is computed. Where prompts come from prefill nodes,
they are offered when the role would offer them, and land chunk by chunk. Shares are over time, of all slots
of the pool (`pdq_kv_cache_unfilled_perc`).

Static batching is the same engine given one batch at a time: the next one begins when all of the last have
ended. Its batch has as many sequences as run at once here, or only as many as there is room for when each has
room for the longest request, as before blocks were paged.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from common.commands.bench.workload import arrivals, draw_lengths, read_trace
from common.engine.core.admission import ExpectedPrompt, Room
from common.engine.core.engine_core import EngineCore
from common.engine.core.output import StepOutput
from common.engine.core.sequence import Sequence as Running
from common.engine.core.step import Step
from common.engine.interface import EngineFacts, StepInput, StepResult
from common.engine.sampling.records import SampleOutput
from common.identity import ModelIdentity
from common.kv_layout import Fingerprint, KVLayout
from common.request import Request
from common.sampling import FinishReason, SamplingParams
from common.settings.config import EngineSettings
from prefill_node.offer_times import OfferTimes

TRACE = Path("../shared/data/traces/AzureLLMInferenceTrace_conv.csv")
VOCABULARY = 32_000
TOKEN = 7  # what every row samples


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """Milliseconds of a step: products by its number of rows, attention by pairs of query and key, the
    rest by rows."""

    source: str
    layers: int
    kv_heads: int
    head_dim: int
    product_rows: tuple[int, ...]
    product_ms: tuple[float, ...]  # more rows than the last cost as much each as those between the last two
    generated_pair_ms: float
    prompt_pair_ms: float
    step_ms: float
    generated_row_ms: float
    prompt_row_ms: float

    def seconds(self, step: StepInput) -> float:
        rows, ms = self.product_rows, self.product_ms
        ends = step.starts + step.lengths
        pairs = step.lengths * (step.starts + ends + 1) / 2
        count, generated = int(step.lengths.sum()), int(step.lengths[: step.num_generated].sum())
        slope = (ms[-1] - ms[-2]) / (rows[-1] - rows[-2])
        total = float(np.interp(count, rows, ms)) + max(0, count - rows[-1]) * slope
        total += self.generated_pair_ms * float(pairs[: step.num_generated].sum())
        total += self.prompt_pair_ms * float(pairs[step.num_generated :].sum())
        total += self.step_ms + self.generated_row_ms * generated + self.prompt_row_ms * (count - generated)
        return total / 1000


COSTS = {
    "cpu": Costs(
        "454M parameters in bfloat16 on two cores of a Zen 5: bench/results/profile.txt at c6a1a2c",
        24,
        2,
        64,
        (1, 16, 64, 256, 2048),
        (33.7, 53.4, 164.0, 577.0, 4643.0),
        generated_pair_ms=2.76e-3,
        prompt_pair_ms=0.9e-3,
        step_ms=3.0,
        generated_row_ms=0.24,
        prompt_row_ms=0.14,
    ),
    "h100": Costs(
        "Llama 2 70B on 8 H100: splitwise_perf_model.csv of splitwise-sim",
        80,
        8,
        128,
        (1, 64),
        (29.5, 50.2),
        generated_pair_ms=0.0,
        prompt_pair_ms=3.5e-5,
        step_ms=0.0,
        generated_row_ms=0.0,
        prompt_row_ms=0.0,
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    name: str
    due_s: float
    prompt: tuple[int, ...]
    generated: int


class SimulatedNode:
    """An engine's core, a clock for a runner, and how much was unfilled for how long."""

    def __init__(self, arguments: argparse.Namespace, costs: Costs) -> None:
        layout = KVLayout.paged_attention(
            num_layers=costs.layers,
            num_kv_heads=costs.kv_heads,
            head_dim=costs.head_dim,
            block_size=arguments.block_size,
            dtype="bfloat16",
        )
        fingerprint = Fingerprint("simulated", "", "", "", arguments.block_size)
        longest = arguments.num_kv_blocks * arguments.block_size
        facts = EngineFacts(
            fingerprint,
            layout,
            arguments.num_kv_blocks,
            VOCABULARY,
            longest,
            arguments.max_num_seqs,
            arguments.max_num_batched_tokens,
            (),
            Path("/nowhere"),
        )
        self.core, self._costs = EngineCore(facts, EngineSettings()), costs
        self.offer_times = OfferTimes(layout.bytes_per_token)
        self.step: Step | None = None
        self.step_s = 0.0
        self.busy_s = 0.0
        self.shares: list[tuple[float, float, float]] = []  # seconds, unfilled, used, as shares of the pool
        self._since = 0.0

    def request(self, job: Job, *, first: int | None = None, most: int | None = None) -> Request:
        params = SamplingParams(max_tokens=most or job.generated, ignore_eos=True, temperature=0.0)
        known = job.prompt if first is None else (*job.prompt, first)
        return Request(job.name, ModelIdentity("simulated", "", ""), known, len(job.prompt), params)

    def begin(self, now: float) -> float | None:
        """When the step that begins now ends; None: nothing can run."""
        self.note(now)
        assert self.step is None
        self.step = self.core.plan()
        if self.step is None:
            return None
        self.step_s = self._costs.seconds(self.step.input)
        self.busy_s += self.step_s
        return now + self.step_s

    def end(self, now: float) -> tuple[Step, list[StepOutput]]:
        self.note(now)
        step = self.step
        assert step is not None
        self.step = None
        self.offer_times.took(step, self.step_s)
        rows = len(step.input.sampled.slots)
        sampled = SampleOutput(np.full(rows, TOKEN, np.int64), np.zeros(rows, np.uint8), None)
        accepted = np.ones(len(step.sampling), np.int64)
        result = StepResult(sampled if rows else None, accepted, (), frozenset())
        return step, self.core.commit(step, result)

    def note(self, now: float) -> None:
        """The pool has been as it is since the last call; call it before every change."""
        pool = self.core.pool
        if now > self._since:
            slots = pool.num_blocks * pool.block_size
            unfilled = pool.num_unfilled_slots
            used = pool.num_used * pool.block_size
            self.shares.append((now - self._since, unfilled / slots, used / slots))
            self._since = now

    def report(self, title: str) -> str:
        seconds, unfilled, used = np.array(self.shares).T
        of_used = (seconds * unfilled).sum() / max(1e-9, (seconds * used).sum())
        return (
            f"  {title:34} mean {mean(unfilled, seconds):6.2%}  p50 {quantile(unfilled, seconds, 0.5):6.2%}  "
            f"p99 {quantile(unfilled, seconds, 0.99):6.2%}  max {unfilled.max():6.2%}   "
            f"used blocks {mean(used, seconds):4.0%} of the pool, unfilled {of_used:5.1%} of them; "
            f"{self.core.scheduler.num_preemptions} preemptions"
        )


def mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float((values * weights).sum() / weights.sum())


def quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    """The value below which the pool was for that share of the time."""
    order = np.argsort(values)
    passed = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][np.searchsorted(passed, share)])


def run_unified(node: SimulatedNode, jobs: Sequence[Job], batch: int | None = None) -> float:
    """Seconds until all have ended; with a `batch`, that many at a time."""
    waiting, now = deque(jobs), 0.0
    while waiting or node.core.has_work:
        if batch is None:
            while waiting and waiting[0].due_s <= now:
                add(node, waiting.popleft())
        elif not node.core.has_work:
            for _ in range(min(batch, len(waiting))):
                add(node, waiting.popleft())
        ends = node.begin(now)
        if ends is None:
            assert batch is None
            now = waiting[0].due_s
            continue
        now = ends
        node.end(now)
    node.core.check_idle()
    return now


def add(node: SimulatedNode, job: Job) -> None:
    node.core.add(job.name, node.request(job))


@dataclasses.dataclass(slots=True)
class Handoff:
    """A prompt that `sender` computes, for the decode node."""

    job: Job
    sender: SimulatedNode
    hashes: list[bytes]
    expected: ExpectedPrompt
    room: Room | None = None
    computed: int = 0
    landed: int = 0  # positions
    held: list[int] = dataclasses.field(default_factory=list)  # blocks at the sender, of an ended sequence


class Disaggregated:
    """Prefill nodes that share a queue, and one decode node."""

    def __init__(self, prefill: Sequence[SimulatedNode], decode: SimulatedNode, jobs: Sequence[Job]) -> None:
        self.prefill, self.decode = prefill, decode
        self.jobs = {job.name: job for job in jobs}
        self._due = deque(jobs)
        self._offers: deque[Handoff] = deque()  # that wait for room, in their order
        self._handoffs: dict[str, Handoff] = {}
        self._offered: set[str] = set()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()

    def run(self) -> float:
        """Seconds until all have ended."""
        for job in self._due:
            self._at(job.due_s, lambda now: None)  # whoever is idle looks for prompts
        now = 0.0
        while True:
            for node in (*self.prefill, self.decode):
                if node.step is None:
                    self._begin(node, now)
            if not self._events:
                break
            now, _, happens = heapq.heappop(self._events)
            happens(now)
        for node in (*self.prefill, self.decode):
            node.core.check_idle()
        assert not self._due
        return now

    def _at(self, moment: float, happens: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._numbers), happens))

    def _begin(self, node: SimulatedNode, now: float) -> None:
        if node is not self.decode:
            self._take(node, now)
        ends = node.begin(now)
        if ends is None:
            return
        assert node.step is not None
        self._at(ends, functools.partial(self._end, node))
        if node is not self.decode:
            for chunk in node.step.chunks:
                job = self.jobs[chunk.sequence.request_id]
                due_s = node.offer_times.until_due(node.step, chunk, len(job.prompt))
                if job.generated > 1 and due_s < math.inf:
                    self._at(now + due_s, functools.partial(self._offer, node, chunk.sequence))

    def _take(self, node: SimulatedNode, now: float) -> None:
        """As many queue entries as fill the next steps (prefill_node/role.py)."""
        scheduler = node.core.scheduler
        while self._due and self._due[0].due_s <= now:
            ahead = sum(len(sequence.token_ids) for sequence in scheduler.waiting)
            if ahead >= scheduler.max_num_batched_tokens:
                return
            job = self._due.popleft()
            node.core.add(job.name, node.request(job, most=min(2, job.generated)))

    def _offer(self, node: SimulatedNode, sequence: Running, now: float) -> None:
        core, job = self.decode.core, self.jobs[sequence.request_id]
        if job.name in self._offered:
            return
        self._offered.add(job.name)
        size = core.pool.block_size
        hashes = list(sequence.hashes(len(job.prompt) // size, size))
        params = self.decode.request(job).params
        expected = core.expect(len(job.prompt), len(job.prompt), params, block_hashes=hashes)
        handoff = Handoff(job, node, hashes, expected, computed=sequence.num_computed)
        self._handoffs[job.name] = handoff
        self._offers.append(handoff)
        self._grant(now)

    def _grant(self, now: float) -> None:
        self.decode.note(now)
        while self._offers:
            handoff = self._offers[0]
            handoff.room = self.decode.core.scheduler.hold(handoff.expected)
            if handoff.room is None:
                return
            self._offers.popleft()
            self._land(handoff, now)

    def _land(self, handoff: Handoff, now: float) -> None:
        """Copy at once what is computed and has room: a copy takes far less than a chunk."""
        room, pool = handoff.room, self.decode.core.pool
        if room is None:
            return
        self.decode.note(now)
        size, length = pool.block_size, len(handoff.job.prompt)
        for index in range(handoff.landed // size, handoff.computed // size):
            if index >= room.num_cached:
                pool.publish(room.blocks[index], handoff.hashes[index])
        handoff.landed = handoff.computed
        if handoff.computed < length:
            return
        self.decode.core.pool.fill(room.blocks, length - 1, length)
        request = self.decode.request(handoff.job, first=TOKEN)
        sequence = self.decode.core.make_sequence(handoff.job.name, request)
        sequence.num_computed = length
        sequence.block_hashes = list(handoff.hashes)
        self.decode.core.scheduler.adopt(sequence, room)
        handoff.sender.note(now)
        handoff.sender.core.pool.release(handoff.held)
        del self._handoffs[handoff.job.name]

    def _end(self, node: SimulatedNode, now: float) -> None:
        step, outputs = node.end(now)
        if node is not self.decode:
            for output in outputs:
                if output.finish_reason is None:  # where its time was estimated too long
                    self._offer(node, output.sequence, now)
                handoff = self._handoffs.get(output.request_id)
                if handoff is not None:
                    handoff.held = node.core.finish(output.sequence, FinishReason.CANCELLED)
            for chunk in step.chunks:
                handoff = self._handoffs.get(chunk.sequence.request_id)
                if handoff is not None:
                    handoff.computed = chunk.end
                    self._land(handoff, now)
        self._grant(now)


def jobs_of(lengths: Sequence[tuple[int, int]], moments: Sequence[float], seed: int) -> list[Job]:
    generator = np.random.default_rng(seed)
    return [
        Job(f"r{number}", due, tuple(generator.integers(0, VOCABULARY, prompt).tolist()), generated)
        for number, ((prompt, generated), due) in enumerate(zip(lengths, moments, strict=True))
    ]


def report(arguments: argparse.Namespace, costs: Costs) -> Iterator[str]:
    rng = random.Random(arguments.seed)
    lengths = draw_lengths(read_trace(arguments.trace), arguments.requests, 1.0, rng)
    prompts, outputs = zip(*lengths, strict=True)
    slots = arguments.num_kv_blocks * arguments.block_size
    yield (
        f"{len(lengths)} requests of {arguments.trace.name}: prompts of {np.mean(prompts):.0f} tokens "
        f"(p50 {np.median(prompts):.0f}, longest {max(prompts)}), replies of {np.mean(outputs):.0f} "
        f"(p50 {np.median(outputs):.0f}, longest {max(outputs)})"
    )
    yield (
        f"a pool of {slots} slots in blocks of {arguments.block_size}, {arguments.max_num_seqs} sequences, "
        f"{arguments.max_num_batched_tokens} tokens to a step"
    )
    yield f"costs: {costs.source}"
    at_once = jobs_of(lengths, [0.0] * len(lengths), arguments.seed)

    def node() -> SimulatedNode:
        return SimulatedNode(arguments, costs)

    yield "\nreserved and not used, of all slots of the pool, over time"
    unified = node()
    whole = run_unified(unified, at_once)
    yield unified.report("unified, all at once")
    rate = 0.8 * len(lengths) / whole
    spread = jobs_of(lengths, arrivals(len(lengths), rate, rng), arguments.seed)
    calm = node()
    run_unified(calm, spread)
    yield calm.report("unified, 0.8 of what it can do")
    for count in arguments.prefill_nodes:
        prefill, decode = [node() for _ in range(count)], node()
        seconds = Disaggregated(prefill, decode, at_once).run()
        yield prefill[0].report(f"{count}P1D, all at once: prefill")
        yield decode.report(f"{count}P1D, all at once: decode") + f"; busy {decode.busy_s / seconds:.0%}"

    yield "\ncontinuous against static batching, all requests at once: generated tokens a second"
    tokens = sum(outputs)
    yield f"  continuous: {tokens / whole:.1f}"
    longest = max(prompts) + max(outputs)
    for title, batch in (
        (f"static, {arguments.max_num_seqs} to a batch", arguments.max_num_seqs),
        (f"static, {slots // longest} to a batch, room for {longest} tokens each", slots // longest),
        ("one after the other", 1),
    ):
        seconds = run_unified(node(), at_once, batch)
        yield f"  {title}: {tokens / seconds:.1f}; continuous is {seconds / whole:.2f} times that"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--costs", choices=COSTS, default="cpu")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--num-kv-blocks", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--prefill-nodes", type=int, nargs="*", default=[1, 3])
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    for line in report(arguments, COSTS[arguments.costs]):
        print(line, flush=True)


if __name__ == "__main__":
    main()
