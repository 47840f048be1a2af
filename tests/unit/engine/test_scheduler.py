"""The scheduler with a model that can be computed by hand.

`Machine` stands for engine and KV tensors. The cell of a position holds a digest of all tokens up
to it and of their side of the border, and the next token is a function of that cell: whoever reads
garbage, somebody else's block, a rejected draft or a position computed on the wrong side gets
another token, or fails the comparison before that.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Sequence as AbstractSequence

import pytest
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st

from common.engine.core.admission import ExpectedPrompt, Room
from common.engine.core.block_pool import BlockPool
from common.engine.core.prompt_share import DecodePace, StepSeconds
from common.engine.core.scheduler import Scheduler
from common.engine.core.sequence import Sequence, SequenceStatus
from common.engine.core.step import Chunk, Delivery, Step
from common.errors import ConfigError, ContextLengthExceeded, InvalidRequest, NeverFits
from common.sampling import FinishReason, SamplingParams
from tests.support.hashes import chain_hashes

STOP = 0
ROOT = b"root"


def digests(token_ids: AbstractSequence[int], prompt_len: int) -> list[int]:
    """What the cells of a sequence's positions must hold."""
    state, cells = 0, []
    for position, token in enumerate(token_ids):
        state = zlib.crc32(b"%d %d %d" % (state, token, position < prompt_len))
        cells.append(state)
    return cells


def next_token(cell: int, choice: int) -> int:
    return zlib.crc32(b"%d %d" % (cell, choice)) % 11


def expected_output(prompt: list[int], params: SamplingParams, choice: int) -> list[int]:
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + params.max_tokens:
        token_ids.append(next_token(digests(token_ids, len(prompt))[-1], choice))
        generated = len(token_ids) - len(prompt)
        if token_ids[-1] == STOP and generated >= params.min_tokens and not params.ignore_eos:
            break
    return token_ids[len(prompt) :]


class Machine:
    """Engine and KV memory around a scheduler; checks each step before it runs it."""

    def __init__(
        self,
        num_blocks: int = 16,
        block_size: int = 4,
        *,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 32,
        max_model_len: int = 64,
        watermark: float = 0.0,
        enable_prefix_cache: bool = True,
        pace: DecodePace | None = None,
    ) -> None:
        self.cells: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.pool = BlockPool(
            num_blocks, block_size, enable_prefix_cache=enable_prefix_cache, on_free=self.spoil
        )
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            watermark=watermark,
            pace=pace,
        )
        self.unforked: dict[Sequence, list[Sequence]] = {}
        self.outputs: dict[Sequence, list[int]] = {}
        self.num_sequences = 0
        self.tables: dict[int, list[int]] = {}  # by id of a chunk that was handed over

    def spoil(self, block_ids: AbstractSequence[int]) -> None:
        for block_id in block_ids:
            self.cells[block_id] = [None] * self.pool.block_size

    def sequence(
        self,
        prompt: list[int],
        *,
        request_id: str = "",
        choice: int = 0,
        replayed: int = 0,
        priority: int = 0,
        **params: object,
    ) -> Sequence:
        params.setdefault("ignore_eos", True)
        sampling = SamplingParams(**params)  # type: ignore[arg-type]
        number = self.num_sequences
        self.num_sequences += 1
        sequence = Sequence(
            sequence_id=number,
            request_id=request_id or f"request-{number}",
            choice=choice,
            prompt_len=len(prompt),
            token_ids=prompt + expected_output(prompt, sampling, choice)[:replayed],
            params=sampling,
            stop_ids=frozenset({STOP}),
            priority=priority,
            arrival=number,
            cache_root=ROOT,
        )
        self.outputs[sequence] = sequence.token_ids[len(prompt) :]
        return sequence

    def add(self, prompt: list[int], **options: object) -> Sequence:
        sequence = self.sequence(prompt, **options)  # type: ignore[arg-type]
        self.scheduler.add(sequence)
        return sequence

    def expect(self, sequence: Sequence) -> ExpectedPrompt:
        """Another node computes its prompt."""
        prompt, size = sequence.token_ids[: sequence.prompt_len], self.pool.block_size
        hashes = chain_hashes(ROOT, prompt, size, len(prompt))
        return ExpectedPrompt(sequence.order, hashes, len(prompt))

    def land(self, sequence: Sequence, room: Room) -> None:
        """The KV of the prompt has arrived from another node, and its sequence runs."""
        prompt, size = sequence.token_ids[: sequence.prompt_len], self.pool.block_size
        for position, cell in enumerate(digests(prompt, len(prompt))):
            index, offset = divmod(position, size)
            if index >= room.num_cached:
                self.cells[room.blocks[index]][offset] = cell
        sequence.num_computed = sequence.prompt_len
        self.scheduler.adopt(sequence, room)

    def step(self) -> Step:
        """One whole step."""
        step = self.scheduler.schedule()
        self.finish_step(step)
        return step

    def finish_step(self, step: Step) -> list[Delivery]:
        self.begin(step)
        return self.end_step(step)

    def end_step(self, step: Step) -> list[Delivery]:
        accepted = self.run(step)
        deliveries = self.scheduler.postprocess(step, accepted)
        for delivery in deliveries:
            output = self.outputs[delivery.sequence]
            assert delivery.position == delivery.sequence.prompt_len + len(output)
            output += delivery.token_ids
            assert delivery.finish_reason is delivery.sequence.finish_reason
            self.assert_output(delivery.sequence)
        self.assert_published()
        return deliveries

    def begin(self, step: Step) -> None:
        """What is settled when a step is handed over: the choices that take part, the block tables."""
        self.assert_legal(step)
        for chunk in list(step.chunks):
            children = self.unforked.get(chunk.sequence)
            if children and chunk.samples and chunk.sequence.status is not SequenceStatus.FINISHED:
                del self.unforked[chunk.sequence]
                self.scheduler.fork(chunk.sequence, children)
        self.tables |= {id(chunk): list(chunk.sequence.block_table) for chunk in step.chunks}

    def run(self, step: Step) -> dict[int, list[int]]:
        for source, target in step.copies:
            self.cells[target] = list(self.cells[source])
        accepted: dict[int, list[int]] = {}
        for chunk in step.chunks:
            self.compute(chunk)
            if chunk.samples and chunk.sequence.status is not SequenceStatus.FINISHED:
                accepted[chunk.sequence.sequence_id] = self.sample(chunk, chunk.sequence.choice)
        for parent, forked in zip(step.parents, step.forked, strict=True):
            if forked.sequence.status is not SequenceStatus.FINISHED:
                accepted[forked.sequence.sequence_id] = self.sample(parent, forked.sequence.choice)
        return accepted

    def compute(self, chunk: Chunk) -> None:
        """Writes into the blocks that the sequence had when the step was handed over, even if it has
        ended: whoever has them by now finds garbage."""
        sequence, table = chunk.sequence, self.tables.pop(id(chunk))
        block_size = self.pool.block_size
        if sequence.status is SequenceStatus.FINISHED:
            for position in range(chunk.start, min(chunk.end, len(table) * block_size)):
                self.cells[table[position // block_size]][position % block_size] = None
            return
        tokens = sequence.token_ids + sequence.draft_token_ids
        truth = digests(tokens, sequence.prompt_len)
        for position in range(chunk.end):
            cells = self.cells[table[position // block_size]]
            if position >= chunk.start:
                cells[position % block_size] = truth[position]
            assert cells[position % block_size] == truth[position], f"wrong KV at {position}"

    def sample(self, chunk: Chunk, choice: int) -> list[int]:
        sequence = chunk.sequence
        tokens = sequence.token_ids + sequence.draft_token_ids
        truth = digests(tokens, sequence.prompt_len)
        sampled: list[int] = []
        for position in range(chunk.end - chunk.num_drafted - 1, chunk.end):
            sampled.append(next_token(truth[position], choice))
            if tokens[position + 1 : position + 2] != sampled[-1:]:
                break
        return sampled

    def assert_legal(self, step: Step) -> None:
        scheduler, pool = self.scheduler, self.pool
        assert sum(chunk.length for chunk in step.chunks) == step.num_tokens
        assert step.num_tokens <= scheduler.max_num_batched_tokens
        assert scheduler.num_running <= scheduler.max_num_seqs
        sides = [chunk.is_prompt for chunk in step.chunks]
        assert sides == sorted(sides), "generated chunks come first"
        assert len({chunk.sequence for chunk in step.chunks}) == len(step.chunks)
        written: Counter[int] = Counter()
        for chunk in step.chunks:
            sequence = chunk.sequence
            if sequence.status is SequenceStatus.FINISHED:
                continue
            known = sequence.num_known - chunk.samples
            assert chunk.length > 0
            assert chunk.end == sequence.next_position
            assert chunk.num_drafted == len(sequence.draft_token_ids)
            assert chunk.is_prompt == (chunk.start < sequence.prompt_len)
            if chunk.is_prompt:
                assert chunk.end <= sequence.prompt_len, "a chunk straddles the border"
                assert chunk.num_drafted == 0
            assert chunk.samples == (chunk.end == known + chunk.num_drafted)
            assert chunk.end <= known + chunk.num_drafted
            first, last = chunk.start // pool.block_size, (chunk.end - 1) // pool.block_size
            for block_id in sequence.block_table[first : last + 1]:
                written[block_id] += 1
                assert not pool.is_shared(block_id), "a shared block is written"
                assert pool.hash_of(block_id) is None, "a published block is written"
        assert all(count == 1 for count in written.values())
        for source, target in step.copies:
            assert written[source] == 0
            assert not self.pool.is_shared(target)

    def assert_output(self, sequence: Sequence) -> None:
        output = self.outputs[sequence]
        prompt = sequence.token_ids[: sequence.prompt_len]
        expected = expected_output(prompt, sequence.params, sequence.choice)
        assert output == expected[: len(output)]
        assert output == sequence.token_ids[sequence.prompt_len :]
        if sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert output == expected

    def assert_published(self) -> None:
        """Blocks carry the chain hash of the tokens in them, and only full, computed ones do."""
        size = self.pool.block_size
        for sequence in self.scheduler.running:
            truth = digests(sequence.token_ids, sequence.prompt_len)
            hashes = chain_hashes(ROOT, sequence.token_ids, size, sequence.prompt_len)
            full = sequence.num_computed // size
            for index, block_id in enumerate(sequence.block_table):
                published = self.pool.hash_of(block_id)
                if index >= full:
                    assert published is None
                    continue
                assert self.cells[block_id] == truth[index * size : (index + 1) * size]
                assert published in (None, hashes[index])
                for canonical in self.pool.lookup([hashes[index]]):
                    assert self.cells[canonical] == self.cells[block_id]

    def run_until_idle(self) -> None:
        for _ in range(2000):
            if not self.scheduler.has_work:
                break
            assert self.step().chunks, "work is left and nothing runs"
        assert not self.scheduler.has_work
        assert self.pool.num_used == 0
        self.scheduler.check()


def chunks_of(step: Step) -> list[tuple[int, int, int]]:
    return [(chunk.sequence.sequence_id, chunk.start, chunk.end) for chunk in step.chunks]


PROMPT = list(range(1, 30))


# The border, the budget and the order of a step.


def test_a_prompt_is_computed_in_chunks_under_the_budget() -> None:
    machine = Machine(max_num_batched_tokens=6)
    machine.add(PROMPT[:10], max_tokens=2)
    assert chunks_of(machine.step()) == [(0, 0, 6)]
    assert chunks_of(machine.step()) == [(0, 6, 10)]
    assert chunks_of(machine.step()) == [(0, 10, 11)]
    assert not machine.scheduler.has_work


def test_a_replay_stops_at_the_border_and_goes_on_as_generated() -> None:
    machine = Machine()
    machine.add(PROMPT[:6], replayed=5, max_tokens=7)
    first, second = machine.step(), machine.step()
    assert [(c.start, c.end, c.is_prompt, c.samples) for c in first.chunks] == [(0, 6, True, False)]
    assert [(c.start, c.end, c.is_prompt, c.samples) for c in second.chunks] == [(6, 11, False, True)]
    machine.run_until_idle()


def test_decoding_goes_before_prompts_and_every_running_prompt_budget_is_in_order() -> None:
    machine = Machine(max_num_batched_tokens=8)
    machine.add(PROMPT[:4], max_tokens=8)
    machine.step()
    machine.add(PROMPT[5:25], max_tokens=1)
    machine.add(PROMPT[9:29], max_tokens=1, priority=-1)
    assert chunks_of(machine.step()) == [(0, 4, 5), (2, 0, 7)]
    assert chunks_of(machine.step()) == [(0, 5, 6), (2, 7, 14)]
    assert chunks_of(machine.step()) == [(0, 6, 7), (2, 14, 20), (1, 0, 1)]


def test_drafts_leave_a_running_prompt_one_token() -> None:
    machine = Machine(max_num_batched_tokens=6)
    decoding = machine.add(PROMPT[:4], max_tokens=12)
    machine.step()
    machine.add(PROMPT[10:29], max_tokens=1)
    machine.step()
    decoding.draft_token_ids = [1] * 9
    assert [chunk.length for chunk in machine.step().chunks] == [5, 1]


def test_drafts_never_pass_the_last_token() -> None:
    machine = Machine()
    sequence = machine.add(PROMPT[:4], max_tokens=4)
    machine.step()
    sequence.draft_token_ids = [*expected_output(PROMPT[:4], sequence.params, 0)[1:], 7, 7]
    assert machine.step().chunks[0].num_drafted == 2
    assert sequence.finish_reason is FinishReason.LENGTH


# Blocks.


def test_a_slot_counts_as_unfilled_until_a_step_computes_its_token() -> None:
    machine = Machine(max_num_batched_tokens=6)
    sequence = machine.add(PROMPT[:9], max_tokens=12)
    unfilled = []
    for _ in range(4):
        step = machine.scheduler.schedule()
        unfilled.append(machine.pool.num_unfilled_slots)
        machine.finish_step(step)
        machine.scheduler.check()
    assert unfilled == [8 - 6, 12 - 9, 12 - 10, 12 - 11]
    wrong = (expected_output(PROMPT[:9], sequence.params, 0)[4] + 1) % 11
    sequence.draft_token_ids = [*expected_output(PROMPT[:9], sequence.params, 0)[3:4], wrong]
    step = machine.scheduler.schedule()
    assert machine.pool.num_unfilled_slots == 16 - 12, "a draft is no token"
    machine.finish_step(step)
    assert machine.pool.num_unfilled_slots == 16 - 13, "one of the drafts was right"
    machine.run_until_idle()
    assert machine.pool.num_unfilled_slots == 0


def test_a_prompt_takes_blocks_chunk_by_chunk_and_what_it_lacks_is_nobody_elses_to_begin_with() -> None:
    machine = Machine(num_blocks=8, max_num_batched_tokens=9)
    cached = machine.add(PROMPT[20:28], max_tokens=1)
    machine.run_until_idle()
    long = machine.add(PROMPT[:20], max_tokens=4)
    short = machine.add([50, 51, 52, 53], max_tokens=9)
    machine.step()
    assert (len(long.block_table), machine.pool.num_used) == (3, 3)
    assert machine.pool.num_cached >= 2, "the cache has what the prompt has not come to"
    assert machine.pool.lookup(cached.block_hashes) != []
    late = machine.sequence(PROMPT[:17], replayed=1, max_tokens=3, priority=-1)
    assert machine.scheduler.hold(machine.expect(late)) is None, "its 5 blocks would be those of the first"
    machine.scheduler.forget()
    step = machine.step()
    assert [chunk.sequence for chunk in step.chunks] == [long]
    step = machine.step()
    assert {chunk.sequence for chunk in step.chunks} == {long, short}
    assert machine.scheduler.num_preemptions == 0
    machine.run_until_idle()


def test_room_for_a_prompt_on_its_way_counts_as_unfilled_until_its_blocks_land() -> None:
    machine = Machine()
    sequence, room = expecting(machine, PROMPT[:9], max_tokens=3)
    assert machine.pool.num_unfilled_slots == 12
    machine.land(sequence, room)
    assert machine.pool.num_unfilled_slots == 12 - 9
    machine.run_until_idle()


def test_drafts_are_dropped_before_anybody_is_preempted() -> None:
    machine = Machine(num_blocks=3)
    first = machine.add(PROMPT[:7], max_tokens=5)
    machine.add(PROMPT[10:13], max_tokens=2)
    machine.step()
    first.draft_token_ids = [1, 1]
    step = machine.step()
    assert step.chunks[0].num_drafted == 0
    assert step.preempted == []


def test_the_least_important_sequence_is_preempted_and_repeats_its_tokens() -> None:
    machine = Machine(num_blocks=5)
    least = machine.add(PROMPT[:8], max_tokens=8, priority=2)
    machine.step()
    machine.add(PROMPT[10:18], max_tokens=8, priority=1)
    preempted = [machine.step().preempted for _ in range(8)]
    assert [least] in preempted
    machine.run_until_idle()
    assert machine.scheduler.num_preemptions == 1
    machine.assert_output(least)


def test_the_least_important_sequence_stalls_while_a_lease_holds_the_pool() -> None:
    machine = Machine(num_blocks=3)
    sequence = machine.add(PROMPT[:4], max_tokens=8)
    machine.step()
    lease = machine.pool.allocate(2)
    assert machine.scheduler.schedule().chunks == []
    assert sequence.status is SequenceStatus.RUNNING
    machine.pool.release(lease)
    machine.run_until_idle()


def test_a_cached_prompt_is_reused_up_to_its_last_token() -> None:
    machine = Machine()
    machine.add(PROMPT[:8], max_tokens=1)
    machine.run_until_idle()
    machine.add(PROMPT[:8], max_tokens=1)
    machine.add(PROMPT[:9], max_tokens=1)
    assert chunks_of(machine.step()) == [(1, 7, 8), (2, 8, 9)]
    machine.run_until_idle()


@pytest.mark.parametrize(("num_blocks", "start"), [(2, 4), (3, 7)])
def test_the_last_token_of_a_cached_prompt_is_computed_into_a_copy_where_there_is_room_for_one(
    num_blocks: int, start: int
) -> None:
    machine = Machine(num_blocks=num_blocks)
    machine.add(PROMPT[:8], max_tokens=1)
    machine.run_until_idle()
    cached = machine.pool.snapshot().block_hashes
    again = machine.add(PROMPT[:8], max_tokens=1)
    step = machine.step()
    assert chunks_of(step) == [(1, start, 8)]
    assert len(step.copies) == (start == 7)
    machine.run_until_idle()
    machine.assert_output(again)
    assert machine.pool.snapshot().block_hashes == cached


def test_a_copy_is_made_in_the_step_that_computes_into_it() -> None:
    """Not in one without a token for it, which may be given up."""
    machine = Machine(pace=tight_pace(1))
    machine.add(PROMPT[:8], max_tokens=1)
    machine.run_until_idle()
    machine.add(PROMPT[20:24], max_tokens=9)
    machine.step()  # from here on it decodes, and a step takes five tokens of prompts
    machine.add(PROMPT[10:15], max_tokens=1)
    cached = machine.add(PROMPT[:8], max_tokens=1)
    step = machine.scheduler.schedule()
    assert cached not in [chunk.sequence for chunk in step.chunks]
    machine.scheduler.abandon(step)
    machine.run_until_idle()
    machine.assert_output(cached)


def test_prompt_logprobs_need_every_position_computed() -> None:
    machine = Machine()
    machine.add(PROMPT[:9], max_tokens=1)
    machine.run_until_idle()
    machine.add(PROMPT[:9], max_tokens=1, prompt_logprobs=0)
    assert chunks_of(machine.step()) == [(1, 0, 9)]


def test_generated_blocks_do_not_serve_as_prompt() -> None:
    machine = Machine()
    first = machine.add(PROMPT[:6], max_tokens=8)
    machine.run_until_idle()
    machine.add(first.token_ids[:13], max_tokens=1)
    assert chunks_of(machine.step()) == [(1, 4, 13)]


def test_admission_leaves_the_watermark_free_but_starts_an_idle_engine() -> None:
    machine = Machine(num_blocks=4, watermark=0.5)
    machine.add(PROMPT[:12], max_tokens=2)
    machine.add(PROMPT[20:24], max_tokens=1)
    assert chunks_of(machine.step()) == [(0, 0, 12)]
    assert chunks_of(machine.step()) == [(0, 12, 13)]
    assert chunks_of(machine.step()) == [(1, 0, 4)]


def test_nobody_overtakes_the_most_important_waiting_sequence() -> None:
    machine = Machine(num_blocks=4)
    machine.add(PROMPT[:8], max_tokens=3)
    machine.step()
    machine.add(PROMPT[10:22], max_tokens=1)
    machine.add(PROMPT[:2], max_tokens=1)
    machine.step()
    assert machine.scheduler.num_waiting == 2
    machine.run_until_idle()


# Fork and copy-on-write.


def forked(machine: Machine, length: int, choices: int, **params: object) -> list[Sequence]:
    family = [
        machine.sequence(PROMPT[:length], request_id="n", choice=choice, **params)  # type: ignore[arg-type]
        for choice in range(choices)
    ]
    machine.unforked[family[0]] = family[1:]
    machine.scheduler.add(family[0])
    return family


def test_choices_share_the_prompt_and_copy_its_tail_when_they_write() -> None:
    machine = Machine()
    family = forked(machine, 6, 3, max_tokens=6)
    machine.step()
    assert machine.pool.num_used == 2
    assert all(sequence.num_generated == 1 for sequence in family)
    shared_tail = family[0].block_table[1]
    step = machine.step()
    assert [source for source, _ in step.copies] == [shared_tail] * 3
    assert machine.pool.num_used == 4
    machine.run_until_idle()
    assert len({tuple(machine.outputs[sequence]) for sequence in family}) == 3


def test_choices_of_a_prompt_that_fills_its_blocks_copy_nothing() -> None:
    machine = Machine()
    forked(machine, 8, 3, max_tokens=3)
    machine.step()
    assert machine.step().copies == []
    machine.run_until_idle()


def test_choices_without_a_slot_wait_with_their_first_token() -> None:
    machine = Machine(max_num_seqs=2)
    family = forked(machine, 6, 4, max_tokens=3)
    machine.step()
    assert [sequence.status.value for sequence in family] == ["running"] * 2 + ["waiting"] * 2
    assert [sequence.num_generated for sequence in family] == [1] * 4
    machine.run_until_idle()


# Coming and going.


def test_a_sequence_that_can_never_run_is_refused() -> None:
    machine = Machine(num_blocks=4, max_model_len=20)
    machine.add(PROMPT[:10], max_tokens=7)  # 16 positions need KV
    with pytest.raises(NeverFits):
        machine.add(PROMPT[:10], max_tokens=8)
    with pytest.raises(ContextLengthExceeded):
        machine.add(PROMPT[:10], max_tokens=11)
    empty = machine.sequence(PROMPT[:4], max_tokens=1)
    empty.prompt_len = 0
    with pytest.raises(InvalidRequest):
        machine.scheduler.add(empty)
    with pytest.raises(InvalidRequest):
        machine.add(PROMPT[:4], max_tokens=2, replayed=2)
    machine.run_until_idle()


def test_a_budget_that_cannot_serve_all_slots_is_a_config_error() -> None:
    with pytest.raises(ConfigError):
        Machine(max_num_seqs=9, max_num_batched_tokens=8)


def test_an_adopted_sequence_decodes_at_once_and_its_prompt_becomes_cache() -> None:
    machine = Machine(max_num_seqs=1)
    sequence = machine.sequence(PROMPT[:9], replayed=1, max_tokens=3)
    room = machine.scheduler.hold(machine.expect(sequence))
    assert room is not None
    assert machine.scheduler.hold(machine.expect(machine.sequence(PROMPT[:2]))) is None, "one slot"
    machine.scheduler.forget()
    machine.land(sequence, room)
    assert machine.pool.num_cached == 2
    assert chunks_of(machine.step()) == [(0, 9, 10)]
    machine.run_until_idle()


def expecting(machine: Machine, prompt: list[int], **options: object) -> tuple[Sequence, Room]:
    """A sequence whose prompt another node computes, with the room that is held for it."""
    sequence = machine.sequence(prompt, replayed=1, **options)  # type: ignore[arg-type]
    room = machine.scheduler.hold(machine.expect(sequence))
    assert room is not None
    return sequence, room


@pytest.mark.parametrize(
    ("here", "came", "has"),
    [(0, 9, 0), (1, 9, 4), (2, 9, 9), (2, 6, 8), (1, 6, 4), (1, 4, 4), (0, 3, 0), (2, 0, 8)],
)
def test_of_a_draft_models_kv_nothing_came_with_the_blocks_that_were_here(
    here: int, came: int, has: int
) -> None:
    """Of two cached blocks `here` were drafted; `came` positions where the prompt was computed."""
    machine = Machine()
    machine.add(PROMPT[:9], max_tokens=1)
    machine.run_until_idle()
    sequence, room = expecting(machine, PROMPT[:9], max_tokens=3)
    assert room.num_cached == 2
    machine.pool.mark_drafted(room.blocks[:here])
    sequence.num_draft_computed = came
    machine.land(sequence, room)
    assert sequence.num_draft_computed == has
    assert machine.pool.num_drafted(room.blocks) == has // machine.pool.block_size
    machine.run_until_idle()


def test_a_held_slot_is_taken_by_no_sequence_that_waits() -> None:
    machine = Machine(max_num_seqs=2)
    coming, room = expecting(machine, PROMPT[:8], max_tokens=3)
    machine.add(PROMPT[10:14], max_tokens=3)
    queued = machine.add(PROMPT[20:24], max_tokens=1)
    machine.step()
    assert queued.status is SequenceStatus.WAITING
    machine.land(coming, room)
    assert coming.status is SequenceStatus.RUNNING
    machine.run_until_idle()


def test_a_held_slot_is_taken_by_no_further_choice() -> None:
    machine = Machine(max_num_seqs=2)
    coming, room = expecting(machine, PROMPT[:8], max_tokens=3)
    family = forked(machine, 6, 2, max_tokens=2)
    machine.step()
    assert [one.status.value for one in family] == ["running", "waiting"]
    machine.land(coming, room)
    machine.run_until_idle()


def test_a_preempted_sequence_does_not_come_back_into_a_held_slot() -> None:
    machine = Machine(num_blocks=6, max_num_seqs=2)
    preempted = machine.add(PROMPT[10:18], max_tokens=3)
    machine.step()
    coming, room = expecting(machine, PROMPT[:8], max_tokens=3)
    machine.scheduler.abandon(machine.scheduler.schedule())
    other = machine.add(PROMPT[20:22], priority=-1, max_tokens=2)
    assert {chunk.sequence for chunk in machine.step().chunks} == {other}
    assert preempted.status is SequenceStatus.WAITING
    machine.land(coming, room)
    machine.run_until_idle()
    machine.assert_output(preempted)


def test_room_that_nobody_comes_for_is_free_again() -> None:
    machine = Machine(max_num_seqs=1)
    _, room = expecting(machine, PROMPT[:8])
    waiting = machine.add(PROMPT[10:14], max_tokens=1)
    assert machine.scheduler.schedule().chunks == []
    machine.scheduler.release(room)
    machine.run_until_idle()
    assert waiting.status is SequenceStatus.FINISHED


def test_sequences_and_expected_prompts_take_room_in_one_line() -> None:
    """A preempted sequence is not passed by prompts that keep coming, nor these by new sequences."""
    machine = Machine(num_blocks=4, max_num_seqs=8)
    running = machine.add(PROMPT[:8], max_tokens=4)
    machine.step()
    first = machine.add(PROMPT[10:20], max_tokens=1)
    expected = machine.expect(machine.sequence(PROMPT[:2], replayed=1))
    last = machine.add(PROMPT[20:22], max_tokens=1)
    assert machine.scheduler.hold(expected) is None, "it would fit, but is not the first in line"
    while running.status is SequenceStatus.RUNNING:
        machine.step()
        assert machine.scheduler.hold(expected) is None
    assert {chunk.sequence for chunk in machine.step().chunks} == {first}
    assert last.status is SequenceStatus.WAITING
    room = machine.scheduler.hold(expected)
    assert room is not None
    assert {chunk.sequence for chunk in machine.step().chunks} == {last}
    machine.scheduler.release(room)
    machine.run_until_idle()


def test_a_step_of_some_leaves_the_others_as_they_are_and_their_place_in_line() -> None:
    machine = Machine(num_blocks=6, max_num_seqs=3, max_num_batched_tokens=8)
    first, second = machine.add(PROMPT[:6], max_tokens=4), machine.add(PROMPT[10:16], max_tokens=4)
    step = machine.scheduler.schedule(lambda sequence: sequence is second)
    assert chunks_of(step) == [(1, 0, 6)]
    assert (first.status.value, first.num_computed) == ("running", 0)
    machine.finish_step(step)
    step = machine.scheduler.schedule(lambda sequence: sequence is first)
    assert chunks_of(step) == [(0, 0, 6)]
    machine.finish_step(step)
    machine.run_until_idle()


def test_to_wait_for_room_changes_nothing_in_the_cache() -> None:
    """Neither what is evicted next nor the rate of hits, however often it is asked for."""
    machine = Machine(num_blocks=4, max_num_seqs=2)
    machine.add(PROMPT[:8], max_tokens=1)
    machine.step()
    cached = list(machine.pool.snapshot().block_hashes)
    lease = machine.pool.allocate(2)
    expected = machine.expect(machine.sequence(PROMPT[:12], replayed=1))
    asked, idle = machine.pool.num_queried_blocks, list(machine.pool._idle)
    for _ in range(3):
        assert machine.scheduler.hold(expected) is None
    assert (machine.pool.num_queried_blocks, list(machine.pool._idle)) == (asked, idle)
    machine.pool.release(lease)
    room = machine.scheduler.hold(expected)
    assert room is not None
    assert room.num_cached == len(cached) == 2
    machine.scheduler.release(room)


def test_finish_hands_the_blocks_to_a_lease() -> None:
    machine = Machine()
    sequence = machine.add(PROMPT[:6], max_tokens=5)
    machine.step()
    kept = machine.scheduler.finish(sequence, FinishReason.STOP, keep_blocks=True)
    assert not machine.scheduler.has_work
    assert [machine.pool.references(block_id) for block_id in kept] == [1, 1]
    assert machine.scheduler.finish(sequence, FinishReason.ERROR) == []
    assert sequence.finish_reason is FinishReason.STOP
    machine.pool.release(kept)
    assert machine.pool.num_used == 0


def test_a_paused_sequence_keeps_its_blocks_and_slot_and_goes_on_where_it_was() -> None:
    machine = Machine(max_num_seqs=2)
    paused = machine.add(PROMPT[:6], max_tokens=5)
    other = machine.add(PROMPT[:3], max_tokens=3)
    waiting = machine.add(PROMPT[:2], max_tokens=3)
    machine.step()
    table, known = list(paused.block_table), list(paused.token_ids)
    machine.scheduler.pause(paused)
    for _ in range(2):
        assert {chunk.sequence for chunk in machine.step().chunks} == {other}
    assert other.status is SequenceStatus.FINISHED
    assert (paused.block_table, paused.token_ids) == (table, known)
    machine.step()
    assert machine.scheduler.num_free_slots == 0
    assert waiting.status is SequenceStatus.RUNNING
    machine.scheduler.resume(paused)
    assert chunks_of(machine.step())[0] == (paused.sequence_id, 6, 7)
    machine.run_until_idle()
    for sequence in (paused, other, waiting):
        machine.assert_output(sequence)


@pytest.mark.parametrize("in_step", [False, True])
def test_a_paused_sequence_can_end_at_any_time(in_step: bool) -> None:
    machine = Machine()
    paused, other = machine.add(PROMPT[:6]), machine.add(PROMPT[:3])
    machine.step()
    machine.scheduler.pause(paused)
    step = machine.scheduler.schedule() if in_step else None
    kept = machine.scheduler.finish(paused, FinishReason.CANCELLED, keep_blocks=True)
    assert len(kept) == 2
    machine.pool.release(kept)
    if step is not None:
        machine.finish_step(step)
    machine.run_until_idle()
    machine.assert_output(other)


def test_blocks_of_an_aborted_sequence_stay_until_the_step_ends() -> None:
    machine = Machine()
    sequence = machine.add(PROMPT[:6], max_tokens=5)
    step = machine.scheduler.schedule()
    assert machine.scheduler.abort(sequence.request_id) == [sequence]
    assert machine.pool.num_used == 2
    assert machine.finish_step(step) == []
    assert machine.pool.num_used == 0
    assert machine.scheduler.abort(sequence.request_id) == []


def test_an_abandoned_step_is_computed_again() -> None:
    machine = Machine()
    sequence = machine.add(PROMPT[:6], max_tokens=3)
    machine.step()
    machine.scheduler.abandon(machine.scheduler.schedule())
    assert sequence.status is SequenceStatus.WAITING
    machine.scheduler.check()
    machine.run_until_idle()
    assert len(machine.outputs[sequence]) == 3


# Ends.


@pytest.mark.parametrize(
    ("params", "accepted", "tokens", "reason"),
    [
        ({}, [7, STOP], [7, STOP], FinishReason.STOP),
        ({}, [STOP, 7], [STOP], FinishReason.STOP),
        ({"ignore_eos": True}, [STOP, 7], [STOP, 7], None),
        ({"ignore_eos": True, "stop_token_ids": (7,)}, [7, 8], [7], FinishReason.STOP),
        ({"min_tokens": 3}, [STOP, STOP], [STOP, STOP], FinishReason.STOP),
        ({"min_tokens": 4}, [STOP, STOP], [STOP, STOP], None),
        ({"max_tokens": 3}, [7, 8], [7, 8], FinishReason.LENGTH),
        ({"max_tokens": 2}, [7], [7], FinishReason.LENGTH),
        ({"max_tokens": 2}, [STOP], [STOP], FinishReason.STOP),
    ],
)
def test_what_follows_the_end_is_cut_off(
    params: dict[str, object], accepted: list[int], tokens: list[int], reason: FinishReason | None
) -> None:
    machine = Machine()
    sequence = machine.add(PROMPT[:4], **({"ignore_eos": False, "max_tokens": 9} | params))
    machine.scheduler.postprocess(machine.scheduler.schedule(), {0: [5]})
    sequence.draft_token_ids = accepted[:-1]
    (delivery,) = machine.scheduler.postprocess(machine.scheduler.schedule(), {0: accepted})
    assert (delivery.position, delivery.token_ids, delivery.finish_reason) == (5, tokens, reason)
    if reason is None:
        assert sequence.num_computed == len(sequence.token_ids) - 1
    else:
        assert machine.pool.num_used == 0


def test_a_token_that_contradicts_its_draft_is_not_accepted_as_verified() -> None:
    machine = Machine()
    sequence = machine.add(PROMPT[:4], max_tokens=9)
    machine.step()
    sequence.draft_token_ids = [7]
    with pytest.raises(AssertionError):
        machine.scheduler.postprocess(machine.scheduler.schedule(), {0: [8, 9]})


def tight_pace(multiple: int) -> DecodePace:
    """A step of more rows than six is late where others decode."""
    costs = StepSeconds()
    costs.took(1, 0.0, 1.0)
    return DecodePace(6.0, costs, multiple, least=1)


class Storm:
    """Random requests, drafts, aborts, crashes, pauses and leases over a tiny pool."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        max_num_seqs = chance.randint(1, 5)
        self.machine = Machine(
            num_blocks=chance.randint(4, 14),
            block_size=chance.randint(1, 4),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + chance.randint(0, 12),
            watermark=chance.choice([0.0, 0.2]),
            enable_prefix_cache=chance.random() < 0.8,
            pace=chance.choice([None, tight_pace(chance.randint(1, 3))]),
        )
        self.pool, self.scheduler = self.machine.pool, self.machine.scheduler
        self.leases: list[list[int]] = []
        self.paused: list[Sequence] = []
        self.offered: list[tuple[Sequence, ExpectedPrompt]] = []  # the first one stands in line
        self.granted: list[tuple[Sequence, Room]] = []

    def run(self, num_events: int) -> None:
        events = {
            self.add: 6,
            self.step: 15,
            self.step_with_abort: 2,
            self.step_that_crashes: 1,
            self.step_ahead: 10,
            self.abort: 1,
            self.lease: 2,
            self.take: 1,
            self.release_lease: 4,
            self.offer: 3,
            self.ask: 4,
            self.land: 4,
            self.give_up: 1,
            self.pause: 2,
            self.resume: 3,
        }
        for act in self.chance.choices(list(events), list(events.values()), k=num_events):
            act()
            self.assert_references_equal_holders()
        while self.paused:
            self.resume()
        for lease in self.leases:
            self.pool.release(lease)
        self.leases.clear()
        for _ in range(2000):  # nobody is starved, whatever came before
            self.land()
            self.ask()
            if not self.offered and not self.granted:
                break
            self.step()
        assert not self.offered
        self.machine.run_until_idle()
        for sequence in self.machine.outputs:
            self.machine.assert_output(sequence)

    def prompt(self, longest: int) -> list[int]:
        """Two families, so that prefixes are shared and told apart."""
        return [self.chance.randint(1, 2), *PROMPT[: self.chance.randrange(longest)]]

    def add(self) -> None:
        chance, machine = self.chance, self.machine
        prompt, max_tokens = self.prompt(14), chance.randint(1, 10)
        ignore_eos = chance.random() < 0.7
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
        length = len(expected_output(prompt, params, 0))
        replayed = chance.choice([0, 0, chance.randrange(length)])
        request_id, priority = f"request-{machine.num_sequences}", chance.randint(-1, 1)
        first, *others = (
            machine.sequence(
                prompt,
                request_id=request_id,
                choice=choice,
                replayed=replayed,
                priority=priority,
                max_tokens=max_tokens,
                ignore_eos=ignore_eos,
            )
            for choice in range(1 if replayed else chance.choice([1, 1, 2, 4]))
        )
        if self.pool.blocks_for(len(prompt) + max_tokens - 1) > self.pool.num_blocks:
            with pytest.raises(NeverFits):
                self.scheduler.add(first)
            return
        self.scheduler.add(first)
        if others:
            machine.unforked[first] = others

    def step(self) -> None:
        step = self.schedule()
        if step.chunks:
            self.machine.finish_step(step)

    def step_with_abort(self) -> None:
        step = self.schedule()
        if step.chunks:
            self.machine.begin(step)
        self.abort()
        self.resume()
        if step.chunks:
            self.machine.end_step(step)

    def step_that_crashes(self) -> None:
        step = self.schedule()
        if step.chunks:
            self.machine.begin(step)
            if self.chance.random() < 0.5:
                self.machine.run(step)
            self.scheduler.abandon(step)

    def step_ahead(self) -> None:
        """A step is planned while another is under way; one of them may crash, or both."""
        first = self.schedule()
        if not first.chunks:
            return
        self.machine.begin(first)
        self.meanwhile()
        second = self.scheduler.schedule()
        assert not second.preempted
        if not second.chunks:
            self.machine.end_step(first)
            return
        event("ahead")
        fate = self.chance.choices(["well", "not built", "both crash", "crashes"], [8, 1, 1, 1])[0]
        if fate == "not built":
            self.scheduler.abandon(second)
            self.meanwhile()
            self.machine.end_step(first)
            return
        self.machine.begin(second)
        self.meanwhile()
        if fate == "both crash":
            self.scheduler.abandon(second)
            self.scheduler.abandon(first)
            return
        self.machine.end_step(first)
        self.meanwhile()
        if fate == "crashes":
            self.machine.run(second)
            self.scheduler.abandon(second)
        else:
            self.machine.end_step(second)

    def meanwhile(self) -> None:
        """What may happen while a step is under way."""
        events = {
            self.abort: 2,
            self.take: 1,
            self.release_lease: 2,
            self.offer: 1,
            self.ask: 3,
            self.land: 3,
            self.resume: 1,
        }
        for act in self.chance.choices(list(events), list(events.values()), k=self.chance.randrange(6)):
            act()
            self.assert_references_equal_holders()

    def schedule(self) -> Step:
        scheduler = self.scheduler
        for sequence in scheduler.running:
            if sequence.is_decoding and self.chance.random() < 0.6:
                self.propose(sequence)
        was_running = set(scheduler.running)
        apart = {sequence for sequence in self.machine.outputs if self.chance.random() < 0.3}
        only = (lambda sequence: sequence not in apart) if self.chance.random() < 0.2 else None
        step = scheduler.schedule(only)
        assert only is None or not apart & {chunk.sequence for chunk in step.chunks}
        kept = [sequence.order for sequence in scheduler.running if sequence in was_running]
        admitted = [sequence.order for sequence in scheduler.running if sequence not in was_running]
        if step.preempted:
            assert min(sequence.order for sequence in step.preempted) > max(kept)
            assert not admitted
        if admitted and scheduler.waiting:
            assert max(admitted) < scheduler.waiting[0].order, "somebody was overtaken"
        in_line = scheduler._admission.expected
        if admitted and in_line is not None:
            assert max(admitted) < in_line.order, "a prompt on its way was overtaken"
        elsewhere = self.leases or self.paused or self.granted or in_line or only
        if scheduler.has_work and not elsewhere:
            most_important = scheduler.running[0]
            assert most_important in {chunk.sequence for chunk in step.chunks}
        for name, seen in (
            ("preempted", step.preempted),
            ("copied", step.copies),
            ("without a chunk", len(scheduler.running) > len(step.chunks)),
            ("drafted", any(chunk.num_drafted for chunk in step.chunks)),
            ("cache hit", self.pool.num_hit_blocks),
            ("evicted", self.pool.num_evictions),
        ):
            if seen:
                event(name)
        return step

    def propose(self, sequence: Sequence) -> None:
        """Right tokens as a rule, then perhaps a wrong one, perhaps too many."""
        tokens = list(sequence.token_ids)
        for _ in range(self.chance.randint(1, 5)):
            token = next_token(digests(tokens, sequence.prompt_len)[-1], sequence.choice)
            tokens.append(token if self.chance.random() < 0.7 else (token + 1) % 11)
        sequence.draft_token_ids = tokens[len(sequence.token_ids) :]

    def abort(self) -> None:
        sequences = [*self.scheduler.running, *self.scheduler.waiting, *self.paused]
        if sequences:
            for sequence in self.scheduler.abort(self.chance.choice(sequences).request_id):
                self.machine.unforked.pop(sequence, None)
                if sequence in self.paused:
                    self.paused.remove(sequence)
                assert sequence.finish_reason is FinishReason.CANCELLED

    def lease(self) -> None:
        """A handoff takes references to finished blocks, or inherits all of them."""
        if not self.scheduler.running:
            return
        sequence = self.chance.choice(self.scheduler.running)
        if self.chance.random() < 0.5 and sequence not in self.machine.unforked:
            blocks = self.scheduler.finish(sequence, FinishReason.CANCELLED, keep_blocks=True)
        else:
            blocks = sequence.block_table[: sequence.num_computed // self.pool.block_size]
            self.pool.acquire(blocks)
        self.leases.append(blocks)

    def pause(self) -> None:
        """A sequence is offered to another node."""
        if self.scheduler.running:
            self.paused.append(self.chance.choice(self.scheduler.running))
            self.scheduler.pause(self.paused[-1])

    def resume(self) -> None:
        """That node does not take it; or it does, and the sequence ends here, its blocks held."""
        if not self.paused:
            return
        sequence = self.paused.pop(0)
        if self.chance.random() < 0.7 or sequence in self.machine.unforked:
            self.scheduler.resume(sequence)
        else:
            blocks = self.scheduler.finish(sequence, FinishReason.CANCELLED, keep_blocks=True)
            self.leases.append(blocks)

    def take(self) -> None:
        """Blocks are gone for a while."""
        self.leases.append(self.pool.allocate(min(self.chance.randint(1, 4), self.pool.num_free)))

    def release_lease(self) -> None:
        if self.leases:
            self.pool.release(self.leases.pop(0))

    def offer(self) -> None:
        """Another node offers a prompt."""
        prompt, max_tokens = self.prompt(10), self.chance.randint(2, 6)
        priority = self.chance.randint(-1, 1)
        if self.pool.blocks_for(len(prompt) + max_tokens - 1) > self.pool.num_blocks:
            return
        sequence = self.machine.sequence(prompt, replayed=1, max_tokens=max_tokens, priority=priority)
        self.offered.append((sequence, self.machine.expect(sequence)))
        self.offered.sort(key=lambda one: one[1].order)

    def ask(self) -> None:
        """The intake asks for room for the first of the offers that wait."""
        if not self.offered:
            return
        sequence, prompt = self.offered[0]
        room = self.scheduler.hold(prompt)
        if room is not None:
            event("granted")
            assert not self.scheduler.waiting or prompt.order < self.scheduler.waiting[0].order
            del self.offered[0]
            self.granted.append((sequence, room))

    def land(self) -> None:
        """A prompt that was granted room has landed: whatever happened meanwhile, it runs."""
        if self.granted:
            event("adopted")
            self.machine.land(*self.granted.pop(self.chance.randrange(len(self.granted))))

    def give_up(self) -> None:
        """A sender goes, before or after its grant."""
        if self.granted and self.chance.random() < 0.5:
            self.scheduler.release(self.granted.pop()[1])
        elif self.offered:
            del self.offered[0]
            self.scheduler.forget()

    def assert_references_equal_holders(self) -> None:
        self.scheduler.check()
        held = Counter(block_id for lease in self.leases for block_id in lease)
        held.update(block_id for _, room in self.granted for block_id in room.blocks)
        for sequence in (*self.scheduler.running, *self.paused):
            held.update(sequence.block_table)
        for step in self.scheduler._steps:
            held.update(block_id for block_ids in step.holds for block_id in block_ids)
        for block_id in range(self.pool.num_blocks):
            assert self.pool.references(block_id) == held[block_id]


@settings(max_examples=150, deadline=None, phases=set(Phase) - {Phase.shrink})
@given(seed=st.integers(0, 2**32))
def test_whatever_happens_tokens_are_right_and_nothing_is_left(seed: int) -> None:
    Storm(seed).run(num_events=80)
