"""The scheduler: which positions of which sequences the next step computes, and in what blocks.

Owns all policy: token budget, admission (the line is in admission.py), preemption, copy-on-write, the end of
a sequence; what state a sequence is in is open_sequences.py's. Knows nothing of tensors or roles. The
engine runs

    step = scheduler.schedule()            # blocks are taken, preempted sequences wait again
    ... copy step.copies, run step.chunks, sample; fork before the first token ...
    deliveries = scheduler.postprocess(step, accepted)     # or abandon(step) when it failed

Two steps may be under way: the second is planned as if the first had ended well, with one token more
for each sequence that samples in it, whatever that is. What depends on more than that waits for the
first to end: a sequence that has drafts in it, or completes its prompt, or is at its length limit;
whoever needs another's blocks. A sequence that turns out to have ended gets nothing from the second.

`add`, `hold`, `adopt`, `finish`, `abort` and `resume` may be called at any time, `pause` and
`finish(keep_blocks=True)` for a sequence that is in no step: the blocks of one that ends while it is in
one are released when that step ends.

A sequence takes blocks as its tokens are computed, a prompt chunk by chunk. What it knows and has no
blocks for yet is promised to it: nobody is admitted into that, nor is room for a prompt on its way
held in it; the prefix cache, and those that run already, use it meanwhile.

Why it cannot deadlock: a sequence is admitted only when all it knows fits; a running one that
lacks a block takes it from the least important one; the least important one, lacking a block
itself, stalls with what it has. So the most important running sequence advances in every step,
unless blocks are held from outside (leases, paused sequences, prompts on their way), which ends on
its own.
"""

from __future__ import annotations

import collections.abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from itertools import chain

from common.engine.core.admission import Admission, ExpectedPrompt, Room
from common.engine.core.block_pool import BlockPool
from common.engine.core.open_sequences import OpenSequences
from common.engine.core.prompt_share import DecodePace, PromptShare
from common.engine.core.sequence import Sequence, SequenceStatus
from common.engine.core.step import Chunk, Delivery, Step
from common.errors import ConfigError, ContextLengthExceeded, InvalidRequest, NeverFits
from common.sampling import FinishReason

MAX_STEPS = 2  # under way at once


class Scheduler(OpenSequences):
    """`max_num_batched_tokens` bounds a step, `max_num_seqs` the running sequences; `watermark`
    is the share of the pool that admission leaves free for those that run already; `pace` says how many
    prompt tokens a step takes while others decode (None: as many as it holds)."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        watermark: float = 0.01,
        pace: DecodePace | None = None,
    ) -> None:
        if max_num_seqs < 1:
            raise ConfigError("max_num_seqs must be at least 1", param="max_num_seqs")
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) must give each of "
                f"max_num_seqs ({max_num_seqs}) sequences a token",
                param="max_num_batched_tokens",
            )
        if not 0.0 <= watermark < 1.0:
            raise ConfigError(f"watermark must be in [0, 1), got {watermark}", param="watermark")
        super().__init__(pool)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self._pace = pace
        self._watermark = int(watermark * pool.num_blocks)
        self._admission = Admission(pool)

    @property
    def num_free_slots(self) -> int:
        """How many more sequences may run, beside those for which a slot is held."""
        taken = len(self._running) + len(self._paused) + len(self._admission.held)
        return self.max_num_seqs - taken

    @property
    def num_held(self) -> int:
        """Prompts on their way here that have room."""
        return len(self._admission.held)

    # Sequences come and go.

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, or raise the `InvalidRequest` that says why it can never run."""
        self._validate(sequence)
        self._register(sequence)
        self._wait(sequence)

    def hold(self, prompt: ExpectedPrompt) -> Room | None:
        """A slot and all blocks for the first of the prompts that other nodes compute for this one,
        held until `adopt` or `release`. None while it is not its turn or there is no room: then it
        stands in line until asked for again, for another in its place, or until `forget`."""
        self._admission.expected = prompt
        if not self.num_free_slots:
            return None
        if self._waiting and self._waiting[0].order < prompt.order:
            return None
        headroom = self.max_num_seqs - self.num_free_slots + self._num_promised
        room = self._admission.hold(prompt, headroom)
        if room is not None:
            self._admission.expected = None
        return room

    def forget(self) -> None:
        """No prompt is expected: who stands behind it in line moves up."""
        self._admission.expected = None

    def release(self, room: Room) -> None:
        """Nobody comes for it."""
        self._admission.held.remove(room)
        self.pool.release(room.blocks)

    def adopt(self, sequence: Sequence, room: Room) -> None:
        """Run a sequence whose first `num_computed` positions lie in the room that was held for it,
        which it has from now on, with the first `num_draft_computed` of a draft model where they came with
        them. An `InvalidRequest` changes nothing."""
        self._validate(sequence)
        assert 0 <= sequence.num_computed < len(sequence.token_ids)
        assert self.pool.blocks_for(sequence.num_computed) <= len(room.blocks)
        self._admission.held.remove(room)
        sequence.block_table = list(room.blocks)
        self.pool.fill(room.blocks, 0, sequence.num_computed)
        self._take_drafted(sequence, room)
        self._register(sequence)
        self._run(sequence)
        self._publish(sequence)

    def _take_drafted(self, sequence: Sequence, room: Room) -> None:
        """What came with it, behind what the blocks that were here already have: nothing came of these."""
        pool, size = self.pool, self.pool.block_size
        came = sequence.num_draft_computed
        pool.mark_drafted(room.blocks[room.num_cached : came // size])
        full = pool.num_drafted(room.blocks)
        has_tail = full == came // size >= room.num_cached
        sequence.num_draft_computed = came if has_tail else full * size

    def fork(self, parent: Sequence, children: Iterable[Sequence]) -> None:
        """Let children with the parent's prompt take part from their first token on.

        Called while the step that completes the parent's prompt is under way; `accepted` then
        has tokens for the children too, sampled from the parent's row. They share all blocks
        until they write. A child that finds no slot waits, with its first token, and finds the
        prompt in the prefix cache.
        """
        step = self._steps[-1]
        chunk = next(c for c in step.chunks if c.sequence is parent)
        at_end_of_prompt = chunk.is_prompt and chunk.samples
        assert at_end_of_prompt
        children = list(children)
        for child in children:
            assert child.token_ids == parent.token_ids
            assert child.cache_root == parent.cache_root
            self._validate(child)
        if self.pool.enable_prefix_cache:
            parent.hashes(parent.prompt_len // self.pool.block_size, self.pool.block_size)
        for child in children:
            self._register(child)
            child.block_hashes = list(parent.block_hashes)
            step.forked.append(dataclasses.replace(chunk, sequence=child))
            step.parents.append(chunk)
            child.pending = 1
            if not self.num_free_slots:
                self._wait(child)
                continue
            self.pool.acquire(parent.block_table)
            child.block_table = list(parent.block_table)
            child.num_computed, child.in_flight = chunk.start, chunk.length
            child.num_published = parent.num_published
            child.num_draft_computed = parent.num_draft_computed
            self._run(child)

    # A step.

    def schedule(self, only: Callable[[Sequence], bool] | None = None) -> Step:
        """Plan the next step. Without chunks it is no step: nothing can run just now, or, while
        another is under way, nothing that does not depend on how that ends.

        `only` those sequences have chunks in it, and all others stay as they are; admission is as
        ever, so that nobody loses its place in line.
        """
        assert len(self._steps) < MAX_STEPS, "so many steps were neither postprocessed nor abandoned"
        step = Step()
        plan, share = self._plan(only)
        stalled = self._secure_blocks(plan, step)
        for sequence, (known, drafted) in zip(self._running, plan, strict=False):
            if known:
                step.append(self._chunk(sequence, known, self._fit_drafts(sequence, drafted)))
        if not stalled and not step.preempted:
            self._admit(step, only, share)
        if step.chunks:
            self._begin_step(step)
        return step

    def postprocess(
        self, step: Step, accepted: Mapping[int, collections.abc.Sequence[int]]
    ) -> list[Delivery]:
        """Take in a step's result.

        `accepted` maps the id of each sequence that samples to its tokens: the drafted ones that
        were verified, then one that the model chose. What follows the end of a sequence is cut
        off. A sequence that was aborted meanwhile gets nothing.
        """
        self._end_step(step)
        deliveries: list[Delivery] = []
        for chunk in chain(step.chunks, step.forked):
            sequence = chunk.sequence
            if sequence.status is SequenceStatus.FINISHED:
                continue
            num_computed, reason = chunk.end, None
            if chunk.samples:
                position = len(sequence.token_ids)
                tokens, reason = self._accept(chunk, accepted[sequence.sequence_id])
                num_computed += len(tokens) - 1 - chunk.num_drafted
                verified = min(len(tokens), len(accepted[sequence.sequence_id]) - 1)
                deliveries.append(Delivery(sequence, position, tokens, reason, chunk.num_drafted, verified))
            if sequence.status is SequenceStatus.RUNNING:  # not a fork that found no slot
                sequence.num_computed = num_computed
                if chunk.num_drafted:  # only now it is known which of them are tokens
                    self.pool.fill(sequence.block_table, chunk.start, num_computed)
                self._publish(sequence)
            if reason is not None:
                self.finish(sequence, reason)
        self._release_holds(step)
        return deliveries

    def abandon(self, step: Step) -> None:
        """The step failed, and what it wrote is unknown: its sequences wait and recompute. Nothing may
        be computing it any more, nor may there be a younger one."""
        assert step is self._steps[-1]
        self._end_step(step)
        for chunk in chain(step.chunks, step.forked):
            if chunk.sequence.status is SequenceStatus.RUNNING:
                self._preempt(chunk.sequence)
        self._release_holds(step)

    def check(self) -> None:
        """Prove the invariants of scheduler and pool; for idle moments and tests."""
        self.pool.check()
        self.check_blocks(room.blocks for room in self._admission.held)
        assert self.num_free_slots >= 0, "a slot is taken twice"

    # Inside `schedule`.

    def _plan(self, only: Callable[[Sequence], bool] | None) -> tuple[list[tuple[int, int]], PromptShare]:
        """Token budget, as (known tokens, drafted tokens) for each running sequence, and what is left of it
        for those that wait.

        Sequences that only lack their newest token have one each for sure, and a running prompt
        has one; drafts, then prompts and replays share what is spare, most important first, as much as
        the pace of those that decode allows.
        """
        running = self._running
        plan = [(0, 0)] * len(running)
        going_on = self._going_on()
        members = [
            i
            for i, sequence in enumerate(running)
            if (only is None or only(sequence)) and (not sequence.in_flight or sequence in going_on)
        ]
        decoding = [index for index in members if running[index].is_decoding]
        spare = self.max_num_batched_tokens - len(decoding)
        reserve = 1 if len(decoding) < len(members) else 0
        for index in decoding:
            drafted = 0
            if running[index].draft_token_ids:
                sequence = running[index]
                wanted = min(len(sequence.draft_token_ids), sequence.room_for_drafts)
                drafted = min(wanted, spare - reserve)
                spare -= drafted
            plan[index] = (1, drafted)
        generated = self.max_num_batched_tokens - spare
        share = PromptShare(spare, generated, self._pace if decoding else None)
        if reserve:
            for index in members:
                sequence = running[index]
                if not sequence.is_decoding:
                    plan[index] = (share.take(sequence.num_computable, sequence.next_position), 0)
        return plan, share

    def _going_on(self) -> set[Sequence]:
        """Those of the step under way of which it is known what they compute next."""
        return {
            chunk.sequence
            for chunk in (self._steps[-1].chunks if self._steps else ())
            if not chunk.num_drafted
            and not (chunk.is_prompt and chunk.samples)
            and chunk.sequence.num_known < chunk.sequence.length_limit
        }

    def _secure_blocks(self, plan: list[tuple[int, int]], step: Step) -> bool:
        """Give each planned sequence the blocks its known tokens write, most important first.

        Victims come from the other end of the order, so that none has been secured yet; while a step
        is under way there are none. Returns whether a sequence has to stall for lack of a block: the
        least important one, between steps.
        """
        running, pool = self._running, self.pool
        block_size = pool.block_size
        index = 0
        while index < len(running):
            sequence, known = running[index], plan[index][0]
            if known == 0:
                index += 1
                continue
            table = sequence.block_table
            first = sequence.next_position // block_size
            shared = first < len(table) and pool.is_shared(table[first])
            end = sequence.next_position + known
            lacking = self._num_lacking(sequence, end)
            if lacking + shared > pool.num_free:
                if running[-1] is sequence or self._steps:
                    plan[index:] = [(0, 0)] * (len(running) - index)
                    return True
                victim = running[-1]
                self._preempt(victim)
                step.preempted.append(victim)
                continue
            if lacking:
                table += pool.allocate(lacking)
            if shared:
                self._copy(table, first, step)
            index += 1
        return False

    def _copy(self, table: list[int], index: int, step: Step) -> None:
        """Put a copy, made at the begin of `step`, in place of a block that others read."""
        (copy,) = self.pool.allocate(1)
        step.copies.append((table[index], copy))
        step.holds.append([table[index]])  # intact until it was copied
        table[index] = copy

    def _fit_drafts(self, sequence: Sequence, drafted: int) -> int:
        """As many drafts as free blocks hold; the sequence keeps only these."""
        if drafted:
            table, pool = sequence.block_table, self.pool
            known = len(sequence.token_ids)
            if known + drafted > len(table) * pool.block_size:
                drafted = min(drafted, (len(table) + pool.num_free) * pool.block_size - known)
                table += pool.allocate(self._num_lacking(sequence, known + drafted))
        if drafted < len(sequence.draft_token_ids):
            del sequence.draft_token_ids[drafted:]
        return drafted

    @property
    def _num_promised(self) -> int:
        """Blocks that running sequences still lack for what they know."""
        return sum(self._num_lacking(sequence, sequence.num_known) for sequence in self._running)

    def _num_lacking(self, sequence: Sequence, end: int) -> int:
        """Blocks that a sequence lacks for its positions before `end`."""
        return max(0, self.pool.blocks_for(end) - len(sequence.block_table))

    def _admit(self, step: Step, only: Callable[[Sequence], bool] | None, share: PromptShare) -> None:
        """Start waiting sequences in their turn while slots, tokens and blocks last: the blocks of the first
        chunk are taken, those of the others promised."""
        pool = self.pool
        while self._waiting and self.num_free_slots:
            sequence = self._waiting[0]
            is_member = only is None or only(sequence)
            if (is_member and share.is_spent) or self._admission.goes_before(sequence.order):
                return
            if sequence.in_flight or sequence.pending:  # a step under way gives it a token
                return
            known = len(sequence.token_ids)
            hashes = self._findable(sequence)
            headroom = self._watermark + self._num_promised if self._running else 0
            count = pool.blocks_for(known)
            # The last token is always computed, its row is sampled: of a block that ends with it into a copy,
            # which has to be made in this step.
            length = 0
            if (
                is_member
                and known == len(hashes) * pool.block_size
                and len(pool.lookup(hashes)) == len(hashes)
                and pool.has_room(hashes, count + 1, headroom)
            ):
                length = share.take(1, known - 1)
            is_whole = length > 0
            if not is_whole:
                hashes = hashes[: (known - 1) // pool.block_size]
            if not pool.has_room(hashes, count, headroom):
                return
            del self._waiting[0]
            table = sequence.block_table = pool.match(hashes)
            sequence.num_published = len(table) - is_whole
            sequence.num_computed = len(table) * pool.block_size - is_whole
            drafted = pool.num_drafted(table) * pool.block_size
            sequence.num_draft_computed = min(drafted, sequence.num_computed)
            if is_whole:
                self._copy(table, -1, step)
            elif is_member:
                length = share.take(sequence.num_computable, sequence.num_computed)
            self._run(sequence)
            if length:
                table += pool.allocate(self._num_lacking(sequence, sequence.num_computed + length))
                step.append(self._chunk(sequence, length, 0))

    def _findable(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the full blocks of a sequence that waits, as far as the prefix cache may serve it."""
        scores = sequence.params.prompt_logprobs is not None and not sequence.num_generated
        if not self.pool.enable_prefix_cache or scores:
            return []
        size = self.pool.block_size
        return sequence.hashes(len(sequence.token_ids) // size, size)

    def _chunk(self, sequence: Sequence, known: int, drafted: int) -> Chunk:
        start = sequence.next_position
        return Chunk(
            sequence,
            start,
            known + drafted,
            drafted,
            start < sequence.prompt_len,
            start + known == sequence.num_known,
        )

    # Inside `postprocess`.

    def _accept(
        self, chunk: Chunk, sampled: collections.abc.Sequence[int]
    ) -> tuple[list[int], FinishReason | None]:
        """Append tokens up to the sequence's end; returns those that were appended."""
        sequence = chunk.sequence
        verified = len(sampled) - 1
        assert 0 <= verified <= chunk.num_drafted
        # Their KV was computed from the drafts: another token would be cached under a wrong hash.
        right = list(sampled[:verified]) == sequence.draft_token_ids[:verified]
        assert right or sequence.is_drafted_by_model
        sequence.draft_token_ids = []
        tokens: list[int] = []
        reason = None
        for token in sampled:
            sequence.token_ids.append(token)
            tokens.append(token)
            reason = sequence.end_at(token)
            if reason is not None:
                break
        return tokens, reason

    def _publish(self, sequence: Sequence) -> None:
        """Offer newly full blocks to the prefix cache."""
        pool = self.pool
        full = sequence.num_computed // pool.block_size
        if full <= sequence.num_published or not pool.enable_prefix_cache:
            return
        hashes = sequence.hashes(full, pool.block_size)
        for index in range(sequence.num_published, full):
            pool.publish(sequence.block_table[index], hashes[index])
        sequence.num_published = full

    # What can never run.

    def _validate(self, sequence: Sequence) -> None:
        params = sequence.params
        if not 1 <= sequence.prompt_len <= len(sequence.token_ids):
            raise InvalidRequest("the prompt is empty or cut off", param="prompt")
        if sequence.num_generated >= params.max_tokens:
            raise InvalidRequest("all tokens were generated already", param="max_tokens")
        self.check_length(sequence.prompt_len, params.max_tokens)

    def check_length(self, prompt_len: int, max_tokens: int) -> None:
        """`ContextLengthExceeded` or `NeverFits` for what can never run."""
        wanted = prompt_len + max_tokens
        if wanted > self.max_model_len:
            raise ContextLengthExceeded(
                f"{prompt_len} prompt tokens and {max_tokens} to generate exceed "
                f"the context length of {self.max_model_len}",
                param="max_tokens",
            )
        blocks = self.pool.blocks_for(wanted - 1)  # the last token's KV is never needed
        if blocks > self.pool.num_blocks:
            raise NeverFits(
                f"{wanted - 1} positions need {blocks} blocks, the pool has {self.pool.num_blocks}",
                param="max_tokens",
            )
