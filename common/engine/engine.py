"""The engine: requests in, tokens out, by continuous batching over one model and one KV pool.

    from common.engine import Engine, SamplingParams

    engine = Engine.load("path/to/model")
    for output in engine.generate(["Once upon a time"], SamplingParams(max_tokens=64)):
        print(output.text)

Owns the loop of one step: schedule, copy, forward, sample, verify drafts, postprocess. Each part
is a resource with one owner: blocks (block_pool.py), order and budget (scheduler.py), memory
(kv_cache.py), weights (model.py), choice of tokens (sampler.py). Not thread-safe: one thread steps.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from collections.abc import Sequence as AnySequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import config_loader
from common.config import EngineSettings
from common.engine import loading
from common.engine.admission import ExpectedPrompt
from common.engine.backends.base import Backend
from common.engine.batch import Batch, build_batch
from common.engine.block_pool import BlockPool
from common.engine.generation import generate
from common.engine.kv_cache import KVCache
from common.engine.output import Completion, StepOutput, TokenLogprob
from common.engine.sampler import RowFault, SampleOutput, Sampler, SampleRows
from common.engine.scheduler import Scheduler
from common.engine.sequence import Sequence, SequenceStatus
from common.engine.sequence_slots import SequenceSlots
from common.engine.soundness import filled_blocks, infinite, sound_rows, spoiled
from common.engine.speculation import Proposer
from common.engine.step import Chunk, Delivery, Step
from common.errors import InvalidRequest, NotFiniteLogits, TokenOutOfRange
from common.kv_layout import Fingerprint, KVLayout, root_hash
from common.model_files import model_name, model_revision, resolve_model
from common.model_folder.description import describe_model, parse_overrides, read_config
from common.model_folder.model_config import parse_model_config
from common.sampling import FinishReason, SamplingParams

MAX_CHOICES = 64  # `n` of one request
NOT_FINITE = "NaN or infinity"


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedStep:
    """What a step computes. `chunks` are those that sample, forks last, as `rows` has them."""

    step: Step
    batch: Batch
    chunks: list[Chunk]
    rows: SampleRows
    filled: dict[int, list[int]]  # by id of their sequence, the blocks that will be full


@dataclasses.dataclass(frozen=True, slots=True)
class ComputedStep:
    """What came of it. `sampled` is None where no row was sampled."""

    sampled: SampleOutput | None
    scores: list[tuple[int, int, list[TokenLogprob]]]
    spoiled: frozenset[int]  # sequences whose new KV is not to be used: see `Engine.compute`


class StepNotBuilt(Exception):
    """The step could not be laid out, and its sequences wait again; `__cause__` says why."""

    def __init__(self, step: Step, cause: Exception) -> None:
        super().__init__(repr(cause))
        self.step = step


class Engine:
    """One model, one pool. Build it with `load`, or from settings for a node."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        storage: Callable[[int, int], Tensor] | None = None,
        proposer: Proposer | None = None,
        on_free: Callable[[AnySequence[int]], None] | None = None,
        poison_freed_blocks: bool = False,
    ) -> None:
        """Load the model and reserve the pool.

        `storage(num_blocks, slab_bytes)` gives the pool's memory when it is to be shared with
        other processes; `on_free(block_ids)` hears of every block whose content is garbage from
        then on. `poison_freed_blocks` fills every freed block with NaN (tests).
        Raises `ModelError`, `ConfigError` or `InsufficientMemory`.
        """
        self.settings = settings
        overrides = parse_overrides(settings.hf_overrides)
        self.folder = resolve_model(
            settings.model, settings.revision,
            weights=settings.load_format == "auto", overrides=overrides,
        )  # fmt: skip
        config = read_config(self.folder, overrides, required=True)
        self.config = parse_model_config(config)
        described = describe_model(self.folder, config, with_sampling_defaults=False)
        self.description = dataclasses.replace(described, tokenizer=None)  # large, and not used
        self.max_model_len = loading.context_length(settings, self.config)
        device = loading.choose_device(settings.device)
        dtype = loading.choose_dtype(settings.dtype, self.config.dtype, device)
        self.backend: Backend = loading.make_backend(settings, device, dtype)
        self.model = loading.load_model(
            settings, self.folder, self.config, self.backend, self.max_model_len
        )

        self.layout = KVLayout.paged_attention(
            num_layers=self.config.num_layers, num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim, block_size=settings.block_size,
            dtype=loading.dtype_name(dtype),
        )  # fmt: skip
        num_blocks = loading.pool_size(settings, self.layout, self.max_model_len, device)
        memory = storage(num_blocks, self.layout.slab_bytes) if storage else None
        self.cache = KVCache(self.layout, num_blocks, device, memory)
        self.fingerprint = Fingerprint(
            model=settings.served_model_name or model_name(settings.model, self.folder),
            revision=model_revision(self.folder, overrides)
            if settings.load_format != "dummy"
            else f"dummy-{settings.seed}",
            layout=self.layout.describe(),
            numerics=self.backend.numerics_class + self.config.rope.numerics(self.max_model_len),
            block_size=settings.block_size, tokenizer=self.description.tokenizer_digest,
        )  # fmt: skip
        if poison_freed_blocks:
            self.cache.poison(range(num_blocks))
        self.pool = BlockPool(
            num_blocks, settings.block_size,
            enable_prefix_cache=settings.enable_prefix_caching,
            on_free=self._poison_and(on_free) if poison_freed_blocks else on_free,
        )  # fmt: skip
        self.scheduler = Scheduler(
            self.pool, max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=self.max_model_len,
        )  # fmt: skip
        self.proposer = proposer
        self.num_steps = 0
        slots = settings.max_num_seqs * MAX_CHOICES
        self._sampler = Sampler(self.config.vocab_size, slots, device)
        self._slots = SequenceSlots(self._sampler, slots)
        self._children: dict[int, list[Sequence]] = {}  # parent's id → choices that wait for it
        self._prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}
        self._sequence_ids = itertools.count()
        self._planned: PlannedStep | None = None  # under way
        self._ended: list[Sequence] = []  # while a step was under way

    @classmethod
    def load(cls, model: str | Path = "", **settings: object) -> Engine:
        """An engine for a folder, a hub name, or the model that ships; settings by name."""
        return cls(config_loader.from_values(EngineSettings, {"model": str(model), **settings}))

    def _poison_and(
        self, on_free: Callable[[AnySequence[int]], None] | None
    ) -> Callable[[AnySequence[int]], None]:
        def freed(block_ids: AnySequence[int]) -> None:
            if on_free is not None:
                on_free(block_ids)
            self.cache.poison(block_ids)

        return freed

    # Requests come and go.

    def add(
        self,
        request_id: str,
        token_ids: AnySequence[int],
        params: SamplingParams,
        *,
        choices: AnySequence[int] = (0,),
        prompt_len: int | None = None,
        priority: int = 0,
        cache_salt: str = "",
        block_hashes: AnySequence[bytes] = (),
    ) -> list[Sequence]:
        """Queue a request: one sequence per choice. Raises `InvalidRequest` before any is queued.

        `block_hashes`: of its full blocks, from the first on, as far as they are computed already.

        `prompt_len` below `len(token_ids)` replays tokens delivered by an earlier attempt; then
        there is one choice only.
        """
        if not 1 <= len(choices) <= MAX_CHOICES:
            raise InvalidRequest(f"n must be between 1 and {MAX_CHOICES}", param="n")
        if min(choices) < 0 or len(set(choices)) < len(choices):
            raise InvalidRequest(f"choices must be different numbers, got {choices}", param="n")
        sequences = [
            self.make_sequence(
                request_id, token_ids, params, choice=choice, prompt_len=prompt_len,
                priority=priority, cache_salt=cache_salt,
            )
            for choice in choices
        ]  # fmt: skip
        parent, *children = sequences
        if children and parent.prompt_len != len(parent.token_ids):
            raise InvalidRequest("delivered tokens belong to one choice", param="choices")
        parent.block_hashes = list(block_hashes)
        self.scheduler.add(parent)
        if children:
            self._children[parent.sequence_id] = children
        return sequences

    def make_sequence(
        self,
        request_id: str,
        token_ids: AnySequence[int],
        params: SamplingParams,
        *,
        choice: int = 0,
        prompt_len: int | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Sequence:
        """A checked sequence that nothing runs yet (`scheduler.adopt` takes one into held room)."""
        vocab_size = self.config.vocab_size
        tokens = np.asarray(token_ids) if len(token_ids) else np.empty(0, np.int64)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise InvalidRequest("a prompt must be a list of token ids", param="prompt")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
            raise TokenOutOfRange(
                f"token ids must be in [0, {vocab_size}), got "
                f"{tokens[(tokens < 0) | (tokens >= vocab_size)][0]}",
                param="prompt",
            )
        params.check_vocabulary(vocab_size)
        number = next(self._sequence_ids)
        return Sequence(
            sequence_id=number, request_id=request_id, choice=choice,
            prompt_len=len(token_ids) if prompt_len is None else prompt_len,
            token_ids=tokens.tolist(), params=params,
            stop_ids=frozenset(self.description.stop_token_ids), priority=priority, arrival=number,
            cache_root=root_hash(self.fingerprint, cache_salt),
        )  # fmt: skip

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
        params.check_vocabulary(self.config.vocab_size)
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

    def check_idle(self) -> None:
        """Prove that nothing is held while nothing runs; raises AssertionError."""
        self.scheduler.check()
        assert not self.has_work, "there is work"
        assert not self.scheduler.num_paused, "sequences are paused"
        assert not self.scheduler.num_held, "room is held for prompts on their way"
        assert self.pool.num_used == 0, f"{self.pool.num_used} blocks are held"
        assert not self._slots, f"{len(self._slots)} sampler slots are held"
        assert not self._children, "choices wait for a parent that is gone"
        assert not self._prompt_logprobs, "prompt logprobs were kept"

    # A step, in three parts. The first and the last touch blocks and sequences and take about a
    # millisecond; `compute` touches neither, so that it may run in a thread of its own while
    # requests come and go here.

    def step(self) -> list[StepOutput]:
        """Run one step; [] when nothing can run now."""
        planned = self.begin_step()
        if planned is None:
            return []
        try:
            computed = self.compute(planned)
        except BaseException:
            self.fail_step(planned)
            raise
        return self.end_step(planned, computed)

    def begin_step(self, only: Callable[[Sequence], bool] | None = None) -> PlannedStep | None:
        """Decide what the next step computes, of these sequences `only`; None when nothing can run.

        Until `end_step` or `fail_step`, aborted sequences keep their blocks and slots. Raises
        `StepNotBuilt` when the step cannot be laid out; then it has failed.
        """
        assert self._planned is None, "the last step has not ended"
        if self.proposer is not None:
            self.proposer.propose([s for s in self.scheduler.running if s.is_decoding])
        step = self.scheduler.schedule(only)
        for sequence in step.preempted:
            self._slots.give_back(sequence)
        if not step.chunks:
            return None
        plan = self.backend.row_plan
        try:
            batch = build_batch(step.chunks, self.layout.block_size, plan, self.backend.device)
            chunks, rows = self._sample_rows(step)
        except BaseException as error:
            self._abandon(step)
            if isinstance(error, Exception):
                raise StepNotBuilt(step, error) from error
            raise
        filled = filled_blocks(step, self.layout.block_size)
        self._planned = PlannedStep(step, batch, chunks, rows, filled)
        return self._planned

    def compute(
        self, planned: PlannedStep, filled: Callable[[frozenset[int]], None] | None = None
    ) -> ComputedStep:
        """The work itself: copies, forward, logits, sampling. Changes the cache's memory only.

        `filled` is called as soon as the step's blocks hold their KV, before any token is chosen:
        from then on they may be handed to another node, but those of the sequences it is given by
        their ids. These have a position that came out as NaN or infinity, and whoever read their
        KV would get the same: they end with the step.
        """
        self.backend.enter_thread()
        self.cache.copy_blocks(planned.step.copies)
        hidden = self.model.forward(planned.batch.rows, self.cache)
        sound = sound_rows(planned.step, hidden)
        ids: frozenset[int] | None = None
        if filled is not None:
            self.backend.synchronize()
            ids = self._spoiled(planned, sound)
            filled(ids)
        scores = self._score_prompts(planned, hidden)
        sampled = None
        if len(planned.batch.sampled):
            logits = self.model.logits(
                hidden[torch.from_numpy(planned.batch.sampled).to(hidden.device)]
            )
            sampled = self._sampler.sample(logits, planned.rows)
        self.backend.synchronize()  # a step that samples nothing has not waited for anything
        if ids is None:
            ids = self._spoiled(planned, sound)
        return ComputedStep(sampled, scores, ids)

    def _spoiled(self, planned: PlannedStep, sound: Tensor | None) -> frozenset[int]:
        return spoiled(planned.step, planned.batch, sound) | infinite(
            planned.filled, self.cache.elements
        )

    def end_step(self, planned: PlannedStep, computed: ComputedStep) -> list[StepOutput]:
        """Take in what was computed: accept tokens, publish blocks, end sequences."""
        self._planned = None
        for sequence_id, start, entries in computed.scores:
            known = self._prompt_logprobs.setdefault(sequence_id, [None])
            known[start + 1 :] = entries  # a run before a preemption knew more
        outputs = self._fail_spoiled(planned.step, computed.spoiled)
        if computed.sampled is None:
            self.scheduler.postprocess(planned.step, {})
        else:
            outputs += self._accept(planned.step, planned.chunks, computed.sampled)
        self._forget_ended()
        self.num_steps += 1
        return outputs

    def fail_step(self, planned: PlannedStep) -> None:
        """The step could not be computed: its sequences wait, and are computed again."""
        self._planned = None
        self._abandon(planned.step)

    def begin_probe(self) -> PlannedStep:
        """A step that computes one token of no request, to see whether anything can be computed: for
        `compute`, then `end_probe`, between two other steps. `OutOfBlocks` if there is no room."""
        sequence = self.make_sequence("probe", [0], SamplingParams(max_tokens=1))
        sequence.block_table = self.pool.allocate(1)
        step = Step()
        step.append(Chunk(sequence, 0, 1, 0, is_prompt=True, samples=False))
        plan, size = self.backend.row_plan, self.layout.block_size
        batch = build_batch(step.chunks, size, plan, self.backend.device)
        return PlannedStep(step, batch, [], self._slots.rows([], []), {})

    def end_probe(self, planned: PlannedStep) -> None:
        """Whatever came of it."""
        self.pool.release(planned.step.chunks[0].sequence.block_table)

    def _abandon(self, step: Step) -> None:
        self.scheduler.abandon(step)
        for chunk in itertools.chain(step.chunks, step.forked):
            self._slots.give_back(chunk.sequence)
        self._forget_ended()

    def _sample_rows(self, step: Step) -> tuple[list[Chunk], SampleRows]:
        """The sampled rows of all chunks in order, those of forks after them."""
        chunks = [chunk for chunk in step.chunks if chunk.samples]
        starts = _starts(1 + chunk.num_drafted for chunk in chunks)
        sources = list(range(sum(1 + chunk.num_drafted for chunk in chunks)))
        for chunk, start in zip(list(chunks), starts, strict=True):
            children = self._children.pop(chunk.sequence.sequence_id, None)
            if children:
                self.scheduler.fork(chunk.sequence, children)
                sources += [start] * len(children)
        chunks += step.forked
        return chunks, self._slots.rows(chunks, sources)

    def _accept(self, step: Step, chunks: list[Chunk], sampled: SampleOutput) -> list[StepOutput]:
        """Keep drafted tokens while they equal the sampled ones, then one more; deliver."""
        accepted: dict[int, list[int]] = {}
        first: dict[int, int] = {}
        outputs: list[StepOutput] = []
        tokens = sampled.token_ids.tolist()
        for chunk, start in zip(chunks, _starts(1 + c.num_drafted for c in chunks), strict=True):
            sequence = chunk.sequence
            if sequence.status is SequenceStatus.FINISHED:  # aborted meanwhile
                continue
            if fault := sampled.faults[start]:
                if fault == RowFault.NOT_FINITE:
                    outputs.append(self._fail_not_finite(sequence))
                else:
                    outputs.append(self._fail(sequence, "no token that is allowed"))
                continue
            kept = 1
            for draft in sequence.draft_token_ids[: chunk.num_drafted]:
                if tokens[start + kept - 1] != draft or sampled.faults[start + kept]:
                    break  # a fault after a good token shows when its own turn comes
                kept += 1
            accepted[sequence.sequence_id] = tokens[start : start + kept]
            first[sequence.sequence_id] = start
        deliveries = self.scheduler.postprocess(step, accepted)
        self._slots.append(deliveries)
        for delivery in deliveries:
            if delivery.sequence.status is not SequenceStatus.RUNNING:
                self._slots.give_back(delivery.sequence)
        outputs += [self._output(d, sampled, first[d.sequence.sequence_id]) for d in deliveries]
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
            sequence.request_id, sequence.choice, delivery.position, tuple(delivery.token_ids),
            logprobs, delivery.finish_reason, sequence,
            None if prompt_logprobs is None else tuple(prompt_logprobs),
        )  # fmt: skip

    def _fail_spoiled(self, step: Step, ids: frozenset[int]) -> list[StepOutput]:
        """End these sequences, and the choices that share their prompt."""
        outputs: list[StepOutput] = []
        for sequence in [chunk.sequence for chunk in step.chunks]:
            if sequence.sequence_id not in ids:
                continue
            if sequence.status is SequenceStatus.FINISHED:  # aborted meanwhile
                continue
            outputs.append(self._fail_not_finite(sequence))
            for forked in [chunk.sequence for chunk in step.forked]:
                if forked.request_id == sequence.request_id:
                    outputs.append(self._fail_not_finite(forked))
            for child in self._children.pop(sequence.sequence_id, []):  # nothing runs it yet
                child.move_to(SequenceStatus.FINISHED)
                child.finish_reason = FinishReason.ERROR
                outputs.append(_error_of(child, NOT_FINITE))
        return outputs

    def _fail_not_finite(self, sequence: Sequence) -> StepOutput:
        """What it has read may be what spoils it: nobody else is to find that in the cache."""
        self.pool.forget(sequence.block_table)
        return self._fail(sequence, NOT_FINITE)

    def _fail(self, sequence: Sequence, what: str) -> StepOutput:
        """End one sequence whose row has no token; the others of the step go on."""
        self.scheduler.finish(sequence, FinishReason.ERROR)
        self._forget(sequence)
        return _error_of(sequence, what)

    def _score_prompts(
        self, planned: PlannedStep, hidden: Tensor
    ) -> list[tuple[int, int, list[TokenLogprob]]]:
        """Log probabilities of prompt tokens, for the sequences that ask for them: (sequence id,
        position of the first row, entries for the tokens after it)."""
        scores = []
        for chunk, row in zip(planned.step.chunks, planned.batch.first_rows, strict=True):
            sequence, top = chunk.sequence, chunk.sequence.params.prompt_logprobs
            if top is None or not chunk.is_prompt or sequence.num_generated:
                continue  # a prompt that is computed again was scored before its first token
            end = min(chunk.end + 1, sequence.prompt_len)
            targets = np.array(sequence.token_ids[chunk.start + 1 : end], np.int64)
            entries: list[TokenLogprob] = []
            for begin in range(0, len(targets), 64):  # logits of a long prompt are large
                part = targets[begin : begin + 64]
                logits = self.model.logits(hidden[row + begin : row + begin + len(part)])
                found, _ = self._sampler.logprobs(logits, part, np.full(len(part), top))
                entries += [TokenLogprob.of(found, index, top) for index in range(len(part))]
            scores.append((sequence.sequence_id, chunk.start, entries))
        return scores

    def _forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that has ended: now, or when the step ends that may
        be sampling for it."""
        if self._planned is not None:
            self._ended.append(sequence)
            return
        self._slots.give_back(sequence)
        self._prompt_logprobs.pop(sequence.sequence_id, None)

    def _forget_ended(self) -> None:
        ended, self._ended = self._ended, []
        for sequence in ended:
            self._forget(sequence)

    def generate(
        self,
        prompts: Iterable[str | AnySequence[int]],
        params: SamplingParams | AnySequence[SamplingParams],
        *,
        n: int = 1,
    ) -> list[Completion]:
        """Complete all prompts by continuous batching; `n` choices each, in order.

        For an engine without other requests. Whatever is raised, none of these is left behind.
        """
        return generate(self, prompts, params, n)

    def warm_up(self) -> None:
        """Compile and touch what a first request would wait for: one token, then two."""
        room = min(self.max_model_len, self.pool.num_blocks * self.pool.block_size + 1)
        count = min(2, room - 1)
        self.add("warm-up", [0], SamplingParams(max_tokens=count, ignore_eos=True))
        while self.has_work:
            self.step()


def _error_of(sequence: Sequence, what: str) -> StepOutput:
    position = len(sequence.token_ids)
    error = NotFiniteLogits(f"the model gave {what} at position {position}")
    return StepOutput(
        sequence.request_id, sequence.choice, position, (), (), FinishReason.ERROR, sequence,
        error=error,
    )  # fmt: skip


def _starts(counts: Iterable[int]) -> list[int]:
    """Where each of consecutive runs begins."""
    starts, total = [], 0
    for count in counts:
        starts.append(total)
        total += count
    return starts
