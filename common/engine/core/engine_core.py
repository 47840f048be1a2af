"""The engine's host side: requests in, steps out, results in, tokens out.

Owns the sequences and what is kept beside them: the scheduler's order and budget, the blocks of the
pool, the sampler's slots, prompt logprobs. Decides everything and computes nothing: what a step needs
to know goes to a runner as plain data (interface.py). Not thread-safe: one thread calls it, and may
do so while a runner computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Sequence as AnySequence

import numpy as np
from numpy.typing import NDArray

from common.engine.core.admission import ExpectedPrompt
from common.engine.core.block_pool import BlockPool
from common.engine.core.drafts import advance, draft_input
from common.engine.core.output import StepOutput
from common.engine.core.prompt_share import MULTIPLE, DecodePace, StepSeconds, pairs_of
from common.engine.core.scheduler import Scheduler
from common.engine.core.sequence import Sequence, SequenceStatus
from common.engine.core.sequence_slots import SequenceSlots
from common.engine.core.step import Chunk, Delivery, Step
from common.engine.core.step_input import step_input
from common.engine.interface import MAX_CHOICES, DraftInput, EngineFacts, StepResult, num_sampler_slots
from common.engine.sampling.records import RowFault, SampleOutput, TokenLogprob
from common.engine.speculation import GuardedProposer, HostProposer
from common.errors import InvalidRequest, NotFiniteLogits, TokenOutOfRange
from common.identity import ModelIdentity
from common.kv_layout import Fingerprint, KVLayout
from common.request import Request
from common.sampling import FinishReason, SamplingParams
from common.settings.config import EngineSettings

NOT_FINITE = "NaN or infinity"


class StepNotBuilt(Exception):
    """The step could not be laid out, and its sequences wait again; `__cause__` says why."""

    def __init__(self, step: Step, cause: Exception) -> None:
        super().__init__(repr(cause))
        self.step = step


class EngineCore:
    """`facts` are those of the runner that computes its steps."""

    def __init__(
        self,
        facts: EngineFacts,
        settings: EngineSettings,
        *,
        proposer: HostProposer | None = None,
        on_free: Callable[[AnySequence[int]], None] | None = None,
    ) -> None:
        """`on_free(block_ids)` hears of every block whose content is garbage from then on. Raises
        `ConfigError`."""
        self.facts = facts
        self.settings = settings
        self.pool = BlockPool(
            facts.num_blocks,
            facts.layout.block_size,
            enable_prefix_cache=settings.enable_prefix_caching,
            on_free=on_free,
        )
        self.costs = StepSeconds()
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=facts.max_num_seqs,
            max_num_batched_tokens=facts.max_num_batched_tokens,
            max_model_len=facts.max_model_len,
            pace=self._pace(),
        )
        positions = facts.draft.max_model_len if facts.draft is not None else 0
        self.proposer = (
            None
            if proposer is None
            else GuardedProposer(proposer, facts.vocab_size, draft_positions=positions)
        )
        self.num_steps = 0
        self._slots = SequenceSlots(num_sampler_slots(facts.max_num_seqs))
        self._children: dict[int, list[Sequence]] = {}  # parent's id → choices that wait for it
        self._prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}
        self._sequence_ids = itertools.count()
        self._steps: list[Step] = []  # under way, the older first
        self._numbers = itertools.count(1)  # of steps
        self._must_settle = False  # nothing is planned before the steps under way have ended

    def _pace(self) -> DecodePace | None:
        target_s, rows = self.settings.target_itl_s, self.facts.prompt_rows
        return DecodePace(target_s, self.costs, rows if rows > 1 else MULTIPLE) if target_s else None

    @property
    def layout(self) -> KVLayout:
        return self.facts.layout

    @property
    def fingerprint(self) -> Fingerprint:
        return self.facts.fingerprint

    # Requests come and go.

    def add(
        self,
        engine_id: str,
        request: Request,
        *,
        choices: AnySequence[int] = (0,),
        block_hashes: AnySequence[bytes] = (),
    ) -> list[Sequence]:
        """Queue a request under this name: one sequence per choice. Raises `InvalidRequest` before any
        is queued.

        `block_hashes`: of its full blocks, from the first on, as far as they are computed already.
        One with tokens that were delivered by an earlier attempt has one choice only.
        """
        if not 1 <= len(choices) <= MAX_CHOICES:
            raise InvalidRequest(f"n must be between 1 and {MAX_CHOICES}", param="n")
        if min(choices) < 0 or len(set(choices)) < len(choices):
            raise InvalidRequest(f"choices must be different numbers, got {choices}", param="n")
        sequences = [self.make_sequence(engine_id, request, choice) for choice in choices]
        parent, *children = sequences
        if children and request.num_delivered:
            raise InvalidRequest("delivered tokens belong to one choice", param="choices")
        parent.block_hashes = list(block_hashes)
        self.scheduler.add(parent)
        if children:
            self._children[parent.sequence_id] = children
        return sequences

    def make_sequence(self, engine_id: str, request: Request, choice: int = 0) -> Sequence:
        """A checked sequence that nothing runs yet (`scheduler.adopt` takes one into held room)."""
        vocab_size = self.facts.vocab_size
        token_ids = _checked(request.token_ids, vocab_size, "prompt")
        prediction = _checked(request.prediction, vocab_size, "prediction")
        request.params.check_vocabulary(vocab_size)
        number = next(self._sequence_ids)
        return Sequence(
            sequence_id=number,
            request_id=engine_id,
            choice=choice,
            prompt_len=request.prompt_len,
            token_ids=token_ids,
            params=request.params,
            stop_ids=frozenset(self.facts.stop_token_ids),
            priority=request.priority,
            arrival=number,
            cache_root=request.cache_root(self.fingerprint),
            hash_border=self.fingerprint.border(request.prompt_len),
            speculates=request.speculative,
            draft_model_follows=request.speculative,
            prediction=prediction,
        )

    def expect(
        self,
        num_positions: int,
        prompt_len: int,
        params: SamplingParams,
        *,
        block_hashes: AnySequence[bytes],
        priority: int = 0,
        arrival: int | None = None,
    ) -> ExpectedPrompt:
        """A prompt whose first `num_positions` another node computes, for `scheduler.hold`.

        `arrival`: whose place in line it takes. Raises the `InvalidRequest` that says why it can
        never run here.
        """
        params.check_vocabulary(self.facts.vocab_size)
        self.scheduler.check_length(prompt_len, params.max_tokens)
        number = next(self._sequence_ids)
        order = (priority, number if arrival is None else arrival, number)
        return ExpectedPrompt(order, block_hashes, num_positions)

    def finish(self, sequence: Sequence, reason: FinishReason) -> list[int]:
        """End a sequence that is paused, or between steps; its blocks and their references go to
        the caller.

        Choices that still wait for its prompt go with it.
        """
        self._children.pop(sequence.sequence_id, None)
        kept = self.scheduler.finish(sequence, reason, keep_blocks=True)
        self._forget(sequence)
        return kept

    def abort(self, request_id: str) -> None:
        """Free everything of a request, also while a step runs; an unknown one is ignored."""
        for sequence in self.scheduler.abort(request_id):
            self._children.pop(sequence.sequence_id, None)
            self._forget(sequence)

    def abort_choice(self, request_id: str, choice: int) -> bool:
        """Free everything of one choice, also while a step runs. False, and nothing is done, for one
        that is not there, or whose prompt others wait for."""
        sequence = self.scheduler.sequence(request_id, choice)
        if sequence is None or self._children.get(sequence.sequence_id):
            return False
        self.scheduler.finish(sequence, FinishReason.CANCELLED)
        self._forget(sequence)
        return True

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def _drafts(self) -> bool:
        return self.proposer is not None and self.proposer.is_on

    def check_idle(self) -> None:
        """Prove that nothing is held while nothing runs; raises AssertionError."""
        self.scheduler.check()
        assert not self.has_work, "there is work"
        assert not self._steps, "a step is under way"
        assert not self.scheduler.num_paused, "sequences are paused"
        assert not self.scheduler.num_held, "room is held for prompts on their way"
        assert self.pool.num_used == 0, f"{self.pool.num_used} blocks are held"
        assert not self._slots, f"{len(self._slots)} sampler slots are held"
        assert not self._children, "choices wait for a parent that is gone"
        assert not self._prompt_logprobs, "prompt logprobs were kept"

    # A step. Between `plan` and `commit` requests may come and go, and one more step be planned: that
    # goes on from whatever this one samples.

    def plan(self, only: Callable[[Sequence], bool] | None = None) -> Step | None:
        """Decide what the next step computes, of these sequences `only`; None when nothing can run,
        or nothing that does not depend on how the step under way ends.

        Until `commit` or `fail`, aborted sequences keep their blocks. Raises `StepNotBuilt` when the
        step cannot be laid out; then it has failed.
        """
        before = self._steps[-1] if self._steps else None
        if before is None:
            self._must_settle = False
        elif self._must_settle or self._drafts or before.has_drafts:
            return None  # guesses are made from the newest token, and half a batch costs as much as one
        if self.proposer is not None:
            running = self.scheduler.running
            self.proposer.propose([s for s in running if s.is_decoding and not s.in_flight])
        step = self.scheduler.schedule(only)
        for sequence in step.preempted:
            self._slots.give_back(sequence)
        if not step.chunks:
            return None
        self._steps.append(step)
        try:
            for chunk in step.sampling:
                if children := self._children.pop(chunk.sequence.sequence_id, None):
                    self.scheduler.fork(chunk.sequence, children)
            drafts = self._draft_input(step)
            step.input = step_input(step, self._slots, next(self._numbers), before, drafts)
        except BaseException as error:
            self.fail(step)
            if isinstance(error, Exception):
                raise StepNotBuilt(step, error) from error
            raise
        return step

    def commit(self, step: Step, result: StepResult) -> list[StepOutput]:
        """Take in what was computed: accept tokens, publish blocks, end sequences."""
        assert step is self._steps[0], "an older step has not ended"
        del self._steps[0]
        pairs = sum(pairs_of(c.start, c.length) for c in step.chunks if c.length > 1 + c.num_drafted)
        self.costs.took(step.num_tokens, pairs, result.seconds)
        if self.proposer is not None:
            self.proposer.observe(step, result)
        for scored, entries in zip(step.input.scored, result.scored, strict=True):
            chunk = step.chunks[scored.chunk]
            if chunk.sequence.status is not SequenceStatus.FINISHED:
                known = self._prompt_logprobs.setdefault(chunk.sequence.sequence_id, [None])
                known[chunk.start + 1 :] = entries  # a run before a preemption knew more
        outputs = self._fail_spoiled(step, result.spoiled)
        if result.sampled is None:
            self.scheduler.postprocess(step, {})
        else:
            outputs += self._accept(step, result.sampled, result.accepted)
        if result.drafts is not None and self.facts.draft is not None:
            advance(step, result.drafts, self.facts.draft, self.pool)
        self.num_steps += 1
        return outputs

    def _draft_input(self, step: Step) -> DraftInput | None:
        if self.facts.draft is None or self.proposer is None or not self.proposer.is_on:
            return None
        return draft_input(
            step,
            self.facts.max_num_batched_tokens,
            self.facts.draft.max_model_len,
            prompts=self.proposer.draft_model_pays and not self.facts.draft.by_text,
        )

    def fail(self, step: Step) -> None:
        """The step could not be computed, nor can a younger one that goes on from it: their sequences
        wait, and are computed again. The runner must be done with all of them."""
        failed = self._steps[self._steps.index(step) :]
        for one in reversed(failed):
            self._steps.remove(one)
            self.scheduler.abandon(one)
        self._slots.reset()
        self._must_settle = bool(self._steps)

    def plan_probe(self) -> Step:
        """A step that computes one token of no request, to see whether anything can be computed: for
        a runner, then `end_probe`, between two other steps. `OutOfBlocks` if there is no room."""
        model, params = ModelIdentity.of(self.fingerprint), SamplingParams(max_tokens=1)
        sequence = self.make_sequence("probe", Request("probe", model, (0,), 1, params))
        sequence.block_table = self.pool.allocate(1)
        step = Step()
        step.append(Chunk(sequence, 0, 1, 0, is_prompt=True, samples=False))
        step.input = step_input(step, self._slots, next(self._numbers))
        return step

    def end_probe(self, step: Step) -> None:
        """Whatever came of it."""
        self.pool.release(step.chunks[0].sequence.block_table)

    def _accept(self, step: Step, sampled: SampleOutput, kept: NDArray[np.int64]) -> list[StepOutput]:
        """Deliver the tokens that are kept of each chunk's."""
        accepted: dict[int, list[int]] = {}
        first: dict[int, int] = {}
        outputs: list[StepOutput] = []
        tokens = sampled.token_ids.tolist()
        for chunk, start, count in zip(step.sampling, step.sampled_rows(), kept.tolist(), strict=True):
            sequence = chunk.sequence
            if sequence.status is SequenceStatus.FINISHED:  # aborted meanwhile
                continue
            if not count:
                if sampled.faults[start] == RowFault.NOT_FINITE:
                    outputs.append(self._fail_not_finite(sequence))
                else:
                    outputs.append(self._fail(sequence, "no token that is allowed"))
                continue
            accepted[sequence.sequence_id] = tokens[start : start + count]
            first[sequence.sequence_id] = start
        deliveries = self.scheduler.postprocess(step, accepted)
        outputs += [self._output(d, sampled, first[d.sequence.sequence_id]) for d in deliveries]
        for sequence in [delivery.sequence for delivery in deliveries]:
            if sequence.status is SequenceStatus.FINISHED:
                self._forget(sequence)
            elif sequence.status is not SequenceStatus.RUNNING:
                self._slots.give_back(sequence)
        return outputs

    def _output(self, delivery: Delivery, sampled: SampleOutput, start: int) -> StepOutput:
        sequence = delivery.sequence
        logprobs: tuple[TokenLogprob, ...] = ()
        top = sequence.params.logprobs
        if top is not None:
            assert sampled.logprobs is not None
            rows = range(start, start + len(delivery.token_ids))
            logprobs = tuple(TokenLogprob.of(sampled.logprobs, row, top) for row in rows)
        prompt_logprobs = self._prompt_logprobs.pop(sequence.sequence_id, None)
        return StepOutput(
            sequence.request_id,
            sequence.choice,
            delivery.position,
            tuple(delivery.token_ids),
            logprobs,
            delivery.finish_reason,
            sequence,
            None if prompt_logprobs is None else tuple(prompt_logprobs),
            drafted=delivery.drafted,
            accepted=delivery.accepted,
        )

    # Sequences end.

    def _fail_spoiled(self, step: Step, ids: frozenset[int]) -> list[StepOutput]:
        """End these sequences, and the choices that share their prompt."""
        outputs: list[StepOutput] = []
        for sequence in [chunk.sequence for chunk in step.chunks]:
            if sequence.sequence_id not in ids:
                continue
            if sequence.status is SequenceStatus.FINISHED:  # aborted meanwhile
                continue
            outputs.append(self._fail_not_finite(sequence))
            for forked in [c.sequence for one in (step, *self._steps) for c in one.forked]:
                if forked.request_id == sequence.request_id:
                    outputs.append(self._fail_not_finite(forked))
            for child in self._children.pop(sequence.sequence_id, []):  # nothing runs it yet
                child.move_to(SequenceStatus.FINISHED)
                child.finish_reason = FinishReason.ERROR
                outputs.append(_error_of(child, NOT_FINITE))
        return outputs

    def _fail_not_finite(self, sequence: Sequence) -> StepOutput:
        """What it has read, or a copy of which, may be what spoils it: nobody else is to find that in the
        cache."""
        self.pool.forget(sequence.block_hashes)
        return self._fail(sequence, NOT_FINITE)

    def _fail(self, sequence: Sequence, what: str) -> StepOutput:
        """End one sequence whose row has no token; the others of the step go on."""
        self.scheduler.finish(sequence, FinishReason.ERROR)
        self._forget(sequence)
        return _error_of(sequence, what)

    def _forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that has ended. Its slot changes hands between two steps of
        the runner, whatever is under way now."""
        self._slots.give_back(sequence)
        self._prompt_logprobs.pop(sequence.sequence_id, None)
        if self.proposer is not None:
            self.proposer.ended(sequence)


def _checked(token_ids: AnySequence[int], vocab_size: int, param: str) -> list[int]:
    tokens = np.asarray(token_ids) if len(token_ids) else np.empty(0, np.int64)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InvalidRequest(f"a {param} must be a list of token ids", param=param)
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        raise TokenOutOfRange(
            f"token ids must be in [0, {vocab_size}), got {tokens[outside][0]}", param=param
        )
    found: list[int] = tokens.tolist()
    return found


def _error_of(sequence: Sequence, what: str) -> StepOutput:
    position = len(sequence.token_ids)
    error = NotFiniteLogits(f"the model gave {what} at position {position}")
    return StepOutput(
        sequence.request_id, sequence.choice, position, (), (), FinishReason.ERROR, sequence, error=error
    )
