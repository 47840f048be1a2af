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
import threading
from collections.abc import Callable, Iterable
from collections.abc import Sequence as AnySequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.config import EngineSettings
from common.engine.backends.base import Backend
from common.engine.batch import Batch, build_batch
from common.engine.block_pool import BlockPool
from common.engine.kv_cache import TORCH_DTYPES, KVCache, blocks_for_memory, free_memory
from common.engine.model import Model
from common.engine.model_config import ModelConfig, load_model_config
from common.engine.sampler import Logprobs, RowFault, SampleOutput, Sampler, SampleRows
from common.engine.scheduler import Scheduler
from common.engine.sequence import Sequence, SequenceStatus
from common.engine.speculation import Proposer
from common.engine.step import Chunk, Delivery, Step
from common.engine.weights import Checkpoint, RandomWeights
from common.errors import (
    ConfigError,
    InsufficientMemory,
    InvalidRequest,
    PdqError,
    TokenOutOfRange,
)
from common.kv_layout import Fingerprint, KVLayout, layout_digest, root_hash
from common.model_files import content_digest, model_name, resolve_model
from common.sampling import FinishReason, SamplingParams

MAX_CHOICES = 64  # `n` of one request
DEFAULT_POOL_BYTES = 4 << 30
POOL_SHARE_OF_FREE_MEMORY = 0.5


class NotFiniteLogits(PdqError):
    """The model gave NaN or infinity, or every token was banned, for one sequence."""

    code = "no_token"


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probabilities at one position: `top` are (token id, logprob), the most likely first."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class StepOutput:
    """What one sequence got from one step; `token_ids[i]` is at absolute `position + i`."""

    request_id: str
    choice: int
    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]  # empty, or one per token
    finish_reason: FinishReason | None
    sequence: Sequence
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # with the first token
    error: PdqError | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedStep:
    """What a step computes. `chunks` are those that sample, forks last, as `rows` has them."""

    step: Step
    batch: Batch
    chunks: list[Chunk]
    rows: SampleRows


@dataclasses.dataclass(frozen=True, slots=True)
class ComputedStep:
    """What came of it. `sampled` is None where no row was sampled."""

    sampled: SampleOutput | None
    scores: list[tuple[int, int, list[TokenLogprob]]]


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
        self.folder = resolve_model(settings.model, settings.revision)
        self.config = load_model_config(self.folder)
        self.max_model_len = _max_model_len(settings, self.config)
        device = _device(settings.device)
        dtype = _dtype(settings.dtype, self.config.dtype, device)
        self.backend: Backend = _backend(settings, device, dtype)
        self.model = _load_model(
            settings, self.folder, self.config, self.backend, self.max_model_len
        )

        self.layout = KVLayout.paged_attention(
            num_layers=self.config.num_layers, num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim, block_size=settings.block_size, dtype=_name(dtype),
        )  # fmt: skip
        num_blocks = _num_blocks(settings, self.layout, self.max_model_len, device)
        memory = storage(num_blocks, self.layout.slab_bytes) if storage else None
        self.cache = KVCache(self.layout, num_blocks, device, memory)
        self.fingerprint = Fingerprint(
            model=settings.served_model_name or model_name(settings.model, self.folder),
            revision=content_digest(self.folder)
            if settings.load_format != "dummy"
            else f"dummy-{settings.seed}",
            layout=layout_digest(self.layout), numerics=self.backend.numerics_class,
            block_size=settings.block_size,
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
        self._free_slots = list(range(slots - 1, -1, -1))
        self._slots: dict[int, int] = {}  # sequence id → slot of the sampler
        self._children: dict[int, list[Sequence]] = {}  # parent's id → choices that wait for it
        self._prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}
        self._sequence_ids = itertools.count()
        self._thread = threading.get_ident()  # the one that computes
        self._planned: PlannedStep | None = None  # under way
        self._ended: list[Sequence] = []  # while a step was under way

    @classmethod
    def load(cls, model: str | Path = "", **settings: object) -> Engine:
        """An engine for a folder, a hub name, or the model that ships; settings by name."""
        known = {field.name for field in dataclasses.fields(EngineSettings)}
        unknown = set(settings) - known
        if unknown:
            raise ConfigError(f"unknown engine setting {min(unknown)}", param=min(unknown))
        return cls(EngineSettings(model=str(model), **settings))  # type: ignore[arg-type]

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
    ) -> list[Sequence]:
        """Queue a request: one sequence per choice. Raises `InvalidRequest` before any is queued.

        `prompt_len` below `len(token_ids)` replays tokens delivered by an earlier attempt; then
        there is one choice only.
        """
        sequences = [
            self.make_sequence(
                request_id, token_ids, params, choice=choice, prompt_len=prompt_len,
                priority=priority, cache_salt=cache_salt,
            )
            for choice in choices
        ]  # fmt: skip
        if not 1 <= len(sequences) <= MAX_CHOICES:
            raise InvalidRequest(f"n must be between 1 and {MAX_CHOICES}", param="n")
        parent, *children = sequences
        if children and parent.prompt_len != len(parent.token_ids):
            raise InvalidRequest("delivered tokens belong to one choice", param="choices")
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
        """A checked sequence that nothing runs yet (`scheduler.adopt` takes one, after intake)."""
        vocab_size = self.config.vocab_size
        tokens = np.asarray(token_ids, np.int64)
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
            stop_ids=frozenset(self.config.stop_token_ids), priority=priority, arrival=number,
            cache_root=root_hash(self.fingerprint, cache_salt),
        )  # fmt: skip

    def finish(self, sequence: Sequence, reason: FinishReason) -> list[int]:
        """End a sequence between steps; its blocks and their references go to the caller."""
        self._children.pop(sequence.sequence_id, None)
        kept = self.scheduler.finish(sequence, reason, keep_blocks=True)
        self._forget(sequence)
        return kept

    def abort(self, request_id: str) -> None:
        """Free everything of a request, also while a step runs; an unknown one is ignored."""
        for sequence in self.scheduler.abort(request_id):
            self._children.pop(sequence.sequence_id, None)
            self._forget(sequence)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def check_idle(self) -> None:
        """Prove that nothing is held while nothing runs; raises AssertionError."""
        self.scheduler.check()
        assert not self.has_work, "there is work"
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

    def begin_step(self) -> PlannedStep | None:
        """Decide what the next step computes; None when nothing can run now.

        Until `end_step` or `fail_step`, aborted sequences keep their blocks and slots.
        """
        assert self._planned is None, "the last step has not ended"
        if self.proposer is not None:
            self.proposer.propose([s for s in self.scheduler.running if s.is_decoding])
        step = self.scheduler.schedule()
        for sequence in step.preempted:
            self._forget_slot(sequence)
        if not step.chunks:
            return None
        plan = self.backend.row_plan
        batch = build_batch(step.chunks, self.layout.block_size, plan, self.backend.device)
        chunks, rows = self._sample_rows(step)
        self._planned = PlannedStep(step, batch, chunks, rows)
        return self._planned

    def compute(self, planned: PlannedStep) -> ComputedStep:
        """The work itself: copies, forward, logits, sampling. Changes the cache's memory only."""
        if threading.get_ident() != self._thread:
            self.backend.enter_thread()
            self._thread = threading.get_ident()
        self.cache.copy_blocks(planned.step.copies)
        hidden = self.model.forward(planned.batch.rows, self.cache)
        scores = self._score_prompts(planned, hidden)
        sampled = None
        if len(planned.batch.sampled):
            logits = self.model.logits(
                hidden[torch.from_numpy(planned.batch.sampled).to(hidden.device)]
            )
            sampled = self._sampler.sample(logits, planned.rows)
        return ComputedStep(sampled, scores)

    def end_step(self, planned: PlannedStep, computed: ComputedStep) -> list[StepOutput]:
        """Take in what was computed: accept tokens, publish blocks, end sequences."""
        self._planned = None
        for sequence_id, start, entries in computed.scores:
            known = self._prompt_logprobs.setdefault(sequence_id, [None])
            known[start + 1 :] = entries  # a run before a preemption knew more
        if computed.sampled is None:
            self.scheduler.postprocess(planned.step, {})
            outputs = []
        else:
            outputs = self._accept(planned.step, planned.chunks, computed.sampled)
        self._forget_ended()
        self.num_steps += 1
        return outputs

    def fail_step(self, planned: PlannedStep) -> None:
        """The step could not be computed: its sequences wait, and are computed again."""
        self._planned = None
        self.scheduler.abandon(planned.step)
        for chunk in itertools.chain(planned.step.chunks, planned.step.forked):
            self._forget_slot(chunk.sequence)
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
        counts = np.array([1 + chunk.num_drafted for chunk in chunks], np.int64)
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = np.array([chunk.end for chunk in chunks], np.int64)
        slots = np.array([self._slot(chunk.sequence) for chunk in chunks], np.int64)
        drafted = [t for c in chunks for t in c.sequence.draft_token_ids[: c.num_drafted]]
        rows = SampleRows(
            slots=np.repeat(slots, counts),
            positions=np.repeat(ends - counts + 1, counts) + offsets,
            drafted=np.array(drafted, np.int64),
            draft_start=np.repeat(np.cumsum(counts - 1) - (counts - 1), counts),
            draft_length=offsets,
            sources=np.array(sources, np.int64),
        )
        return chunks, rows

    def _accept(self, step: Step, chunks: list[Chunk], sampled: SampleOutput) -> list[StepOutput]:
        """Keep drafted tokens while they equal the sampled ones, then one more; deliver."""
        accepted: dict[int, list[int]] = {}
        first: dict[int, int] = {}
        outputs: list[StepOutput] = []
        tokens = sampled.token_ids.tolist()
        for chunk, start in zip(chunks, _starts(1 + c.num_drafted for c in chunks), strict=True):
            sequence = chunk.sequence
            kept = 1
            for draft in sequence.draft_token_ids[: chunk.num_drafted]:
                if tokens[start + kept - 1] != draft:
                    break
                kept += 1
            faults = sampled.faults[start : start + kept]
            if faults.any():
                fault = RowFault(int(faults[faults != 0][0]))
                outputs.append(self._fail(sequence, fault))
                continue
            accepted[sequence.sequence_id] = tokens[start : start + kept]
            first[sequence.sequence_id] = start
        deliveries = self.scheduler.postprocess(step, accepted)
        self._append(deliveries)
        outputs += [self._output(d, sampled, first[d.sequence.sequence_id]) for d in deliveries]
        return outputs

    def _append(self, deliveries: list[Delivery]) -> None:
        """Tell the sampler what was accepted, for penalties; free the slots of what has ended."""
        slots = [self._slots[d.sequence.sequence_id] for d in deliveries]
        counts = [len(delivery.token_ids) for delivery in deliveries]
        tokens = [token for delivery in deliveries for token in delivery.token_ids]
        if tokens:
            self._sampler.append(np.repeat(np.array(slots), counts), np.array(tokens))
        for delivery in deliveries:
            if delivery.sequence.status is not SequenceStatus.RUNNING:
                self._forget_slot(delivery.sequence)

    def _output(self, delivery: Delivery, sampled: SampleOutput, start: int) -> StepOutput:
        sequence = delivery.sequence
        logprobs: tuple[TokenLogprob, ...] = ()
        top = sequence.params.logprobs
        if top is not None:
            assert sampled.logprobs is not None
            rows = range(start, start + len(delivery.token_ids))
            logprobs = tuple(_logprob(sampled.logprobs, row, top) for row in rows)
        prompt_logprobs = self._prompt_logprobs.pop(sequence.sequence_id, None)
        return StepOutput(
            sequence.request_id, sequence.choice, delivery.position, tuple(delivery.token_ids),
            logprobs, delivery.finish_reason, sequence,
            None if prompt_logprobs is None else tuple(prompt_logprobs),
        )  # fmt: skip

    def _fail(self, sequence: Sequence, fault: RowFault) -> StepOutput:
        """End one sequence whose row has no token; the others of the step go on."""
        self.scheduler.finish(sequence, FinishReason.ERROR)
        self._forget(sequence)
        what = "NaN or infinity" if fault is RowFault.NOT_FINITE else "no token that is allowed"
        error = NotFiniteLogits(f"the model gave {what} at position {len(sequence.token_ids)}")
        return StepOutput(
            sequence.request_id, sequence.choice, len(sequence.token_ids), (), (),
            FinishReason.ERROR, sequence, error=error,
        )  # fmt: skip

    def _score_prompts(
        self, planned: PlannedStep, hidden: Tensor
    ) -> list[tuple[int, int, list[TokenLogprob]]]:
        """Log probabilities of prompt tokens, for the sequences that ask for them: (sequence id,
        position of the first row, entries for the tokens after it)."""
        scores = []
        for chunk, row in zip(planned.step.chunks, planned.batch.first_rows, strict=True):
            sequence, top = chunk.sequence, chunk.sequence.params.prompt_logprobs
            if top is None or not chunk.is_prompt:
                continue
            end = min(chunk.end + 1, sequence.prompt_len)
            targets = np.array(sequence.token_ids[chunk.start + 1 : end], np.int64)
            entries: list[TokenLogprob] = []
            for begin in range(0, len(targets), 64):  # logits of a long prompt are large
                part = targets[begin : begin + 64]
                logits = self.model.logits(hidden[row + begin : row + begin + len(part)])
                found, _ = self._sampler.logprobs(logits, part, np.full(len(part), top))
                entries += [_logprob(found, index, top) for index in range(len(part))]
            scores.append((sequence.sequence_id, chunk.start, entries))
        return scores

    # The sampler's slots: a sequence has one from its first sampled token, while it runs.

    def _slot(self, sequence: Sequence) -> int:
        slot = self._slots.get(sequence.sequence_id)
        if slot is None:
            slot = self._free_slots.pop()
            self._sampler.add(
                slot, sequence.params, sequence.choice, sorted(sequence.stop_ids),
                sequence.token_ids[: sequence.prompt_len],
                sequence.token_ids[sequence.prompt_len :],
            )  # fmt: skip
            self._slots[sequence.sequence_id] = slot
        return slot

    def _forget_slot(self, sequence: Sequence) -> None:
        slot = self._slots.pop(sequence.sequence_id, None)
        if slot is not None:
            self._sampler.remove(slot)
            self._free_slots.append(slot)

    def _forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence that has ended: now, or when the step ends that may
        be sampling for it."""
        if self._planned is not None:
            self._ended.append(sequence)
            return
        self._forget_slot(sequence)
        self._prompt_logprobs.pop(sequence.sequence_id, None)

    def _forget_ended(self) -> None:
        ended, self._ended = self._ended, []
        for sequence in ended:
            self._forget(sequence)

    # In-process use.

    def generate(
        self,
        prompts: Iterable[str | AnySequence[int]],
        params: SamplingParams | AnySequence[SamplingParams],
        *,
        n: int = 1,
    ) -> list[Completion]:
        """Complete all prompts by continuous batching; `n` choices each, in order."""
        from common.engine.text import decode, encode

        all_ids = [
            encode(self.folder, prompt) if isinstance(prompt, str) else list(prompt)
            for prompt in prompts
        ]
        each = [params] * len(all_ids) if isinstance(params, SamplingParams) else list(params)
        run = f"generate-{next(self._sequence_ids)}"
        for index, (ids, wanted) in enumerate(zip(all_ids, each, strict=True)):
            self.add(f"{run}-{index}", ids, wanted, choices=range(n))
        collected: dict[tuple[str, int], list[StepOutput]] = {}
        while self.has_work:
            for output in self.step():
                collected.setdefault((output.request_id, output.choice), []).append(output)
        completions = []
        for index, ids in enumerate(all_ids):
            for choice in range(n):
                outputs = collected[f"{run}-{index}", choice]
                if outputs[-1].error is not None:
                    raise outputs[-1].error
                tokens = [token for output in outputs for token in output.token_ids]
                reason = outputs[-1].finish_reason
                assert reason is not None
                completions.append(
                    Completion(
                        index, choice, tuple(ids), tuple(tokens),
                        tuple(entry for output in outputs for entry in output.logprobs),
                        outputs[0].prompt_logprobs, reason,
                        decode(self.folder, tokens),
                    )
                )  # fmt: skip
        return completions

    def warm_up(self) -> None:
        """Compile and touch what a first request would wait for: one prompt, two tokens."""
        length = min(2, self.max_model_len - 2)
        self.add("warm-up", [0] * length, SamplingParams(max_tokens=2, ignore_eos=True))
        while self.has_work:
            self.step()


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """One choice of one prompt, complete. `text` is None when the model has no tokenizer."""

    index: int
    choice: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    finish_reason: FinishReason
    text: str | None


def _starts(counts: Iterable[int]) -> list[int]:
    """Where each of consecutive runs begins."""
    starts, total = [], 0
    for count in counts:
        starts.append(total)
        total += count
    return starts


def _logprob(scores: Logprobs, row: int, top: int) -> TokenLogprob:
    ids: NDArray[np.int64] = scores.top_ids[row, :top]
    return TokenLogprob(
        float(scores.chosen[row]),
        int(scores.ranks[row]),
        tuple(zip(ids.tolist(), scores.top[row, :top].tolist(), strict=True)),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda is set, but torch finds no CUDA device", param="device")
    return torch.device(wanted, 0) if wanted == "cuda" else torch.device(wanted)


def _dtype(wanted: str, stored: str, device: torch.device) -> torch.dtype:
    """`auto` keeps the stored type where the device runs it fast, and float32 otherwise."""
    if wanted != "auto":
        return TORCH_DTYPES[wanted]
    if device.type == "cpu":
        fast = stored != "float32" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return TORCH_DTYPES.get(stored, torch.bfloat16)


def _backend(settings: EngineSettings, device: torch.device, dtype: torch.dtype) -> Backend:
    if device.type == "cpu" and settings.kernels == "auto":
        from common.engine.backends.cpu import CpuBackend

        threads = settings.threads or len(settings.cores) or torch.get_num_threads()
        return CpuBackend(dtype, threads)
    from common.engine.backends.reference import ReferenceBackend

    return ReferenceBackend(device, dtype)


def _max_model_len(settings: EngineSettings, config: ModelConfig) -> int:
    longest = config.max_position_embeddings
    if settings.max_model_len is None:
        return longest
    if settings.max_model_len > longest:
        raise ConfigError(
            f"max_model_len {settings.max_model_len} is beyond the model's {longest} positions",
            param="max_model_len",
        )
    return settings.max_model_len


def _load_model(
    settings: EngineSettings, folder: Path, config: ModelConfig, backend: Backend, length: int
) -> Model:
    if settings.load_format == "dummy":
        tied = config.tie_word_embeddings
        source = RandomWeights(settings.seed, tied=tied, dtype=backend.dtype)
        model = Model(config, backend, source, length)
    else:
        with Checkpoint(folder) as checkpoint:
            model = Model(config, backend, checkpoint, length)
    backend.settle()
    return model


def _num_blocks(
    settings: EngineSettings, layout: KVLayout, max_model_len: int, device: torch.device
) -> int:
    """From the settings, or as much as all sequences can use, within half of the free memory."""
    free = free_memory(device)
    if settings.num_kv_blocks is not None:
        count = settings.num_kv_blocks
    elif settings.kv_cache_memory_bytes is not None:
        count = blocks_for_memory(layout, settings.kv_cache_memory_bytes)
    else:
        useful = settings.max_num_seqs * -(-max_model_len // layout.block_size)
        limit = int(free * POOL_SHARE_OF_FREE_MEMORY)
        if device.type == "cpu":
            limit = min(limit, DEFAULT_POOL_BYTES)
        count = min(useful, blocks_for_memory(layout, limit))
    if count * layout.slab_bytes > free:
        raise InsufficientMemory(
            f"a KV pool of {count * layout.slab_bytes >> 20} MiB does not fit into "
            f"{free >> 20} MiB of free memory; lower num_kv_blocks or kv_cache_memory_bytes",
            param="kv_cache_memory_bytes",
        )
    return count
