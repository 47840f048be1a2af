"""A draft model with another tokenizer than the model's: what passes between the two is text.

Owns what it has read of each sequence, in its own tokens, and its own KV. The model's tokens become text, the
text becomes tokens of the draft model, which writes on; and what it wrote becomes tokens of the model again,
which are verified like any others (string-level exact match, Timor et al. 2025; universal assisted generation
in transformers). It says what it holds most likely, for noise means nothing across two vocabularies.

A sequence's text is read through a window that ends with it, of as many tokens as the draft model's context
has, or fewer. Re-encoding changes the last few tokens at most, and only these are computed again.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream

from common.engine.devices.device import Device
from common.engine.devices.kv_cache import KVCache
from common.engine.interface import Chunks, DraftFacts, DraftInput, DraftReport, StepInput
from common.engine.runner import loading
from common.engine.runner.draft_step import (
    ANY_TOKEN,
    Target,
    drafted_chunks,
    load_draft,
    logits_after,
    with_drafts,
)
from common.errors import InsufficientMemory
from common.settings.config import EngineSettings

LONGEST = 512  # of its tokens in a window: half of it is left when the window moves
READ_AGAIN = 48  # characters, and own tokens, before the end of a text on which the next token may depend
FEW = 48  # own tokens of a sequence that are computed one by one, as generated ones are
MOST_ROUNDS = 4  # for each token of the model


@dataclasses.dataclass(slots=True, eq=False)
class _Reading:
    """What the draft model has read of one sequence."""

    place: int  # whose blocks hold its KV
    stream: DecodeStream = dataclasses.field(default_factory=lambda: DecodeStream(skip_special_tokens=True))
    known: int = 0  # tokens of the model
    text: str = ""  # in the window
    computed: list[int] = dataclasses.field(default_factory=list)  # own tokens of which it has KV
    tokens: list[int] = dataclasses.field(default_factory=list)  # own tokens of the text


class ReencodingDraftModel:
    """Implements `Drafter`."""

    layout = None
    identity = ""

    def __init__(self, settings: EngineSettings, device: Device, target: Target) -> None:
        """Raises as `load_draft`."""
        loaded = load_draft(settings, device, target, first_layer=0)
        assert target.description.tokenizer is not None
        assert loaded.description.tokenizer is not None
        self._theirs, self._ours = target.description.tokenizer, loaded.description.tokenizer
        self._their_size = target.config.vocab_size
        self._model, self._backend = loaded.model, loaded.backend
        self._length = min(loaded.length, LONGEST)
        kv_dtype = loading.choose_kv_dtype(settings, loaded.backend)
        layout = loading.kv_layout(loaded.config, settings.block_size, kv_dtype)
        self._blocks = -(-self._length // settings.block_size)
        count = target.max_num_seqs * self._blocks
        if count * layout.slab_bytes > device.free_memory():
            raise InsufficientMemory(
                f"the draft model: its KV of {target.max_num_seqs} sequences takes "
                f"{count * layout.slab_bytes >> 20} MiB; lower --max-num-seqs",
                param="speculative_model",
            )
        self._cache = KVCache(layout, count, device.pool(count, layout.slab_bytes))
        self._free = list(range(target.max_num_seqs))
        self._readings: OrderedDict[int, _Reading] = OrderedDict()  # by sequence id, the last used last
        self.facts = DraftFacts(loaded.name, target.max_model_len, loaded.relative_size, by_text=True)

    def run(
        self, step: StepInput, wanted: DraftInput, _cache: object, _sampler: object
    ) -> tuple[StepInput, DraftReport]:
        """Read what is new, and write on. The step with tokens where `TO_BE_DRAFTED` stood."""
        begun, error = time.perf_counter(), ""
        chunks = drafted_chunks(step)
        counts = step.num_drafted[chunks]
        tokens = np.full((len(chunks), int(counts.max(initial=0))), ANY_TOKEN, np.int64)
        forgotten: set[int] = set()
        faulty: set[int] = set()
        try:
            readings = self._read(step, wanted, forgotten)
            drafts = self._write(
                readings, dict(zip(wanted.chunks.tolist(), wanted.counts.tolist(), strict=True))
            )
            for row, chunk in enumerate(chunks.tolist()):
                found = drafts.get(chunk)
                if found is None:
                    faulty.add(int(step.sequence_ids[chunk]))
                else:
                    tokens[row, : len(found)] = found[: tokens.shape[1]]
        except Exception as failure:  # it costs the drafts
            error = repr(failure) or "failed"
            self._free = list(range(len(self._free) + len(self._readings)))
            self._readings.clear()
            forgotten = set(step.sequence_ids[wanted.chunks].tolist())
        report = DraftReport(
            time.perf_counter() - begun, frozenset(faulty - forgotten), frozenset(forgotten), error
        )
        return with_drafts(step, tokens), report

    def _read(self, step: StepInput, wanted: DraftInput, forgotten: set[int]) -> dict[int, _Reading]:
        """Take in the new tokens of each sequence; by chunk of the step, those of which all is known."""
        found = {}
        ends = np.cumsum(wanted.lengths)
        for index, chunk in enumerate(wanted.chunks.tolist()):
            name, start = int(step.sequence_ids[chunk]), int(wanted.starts[index])
            new = wanted.token_ids[ends[index] - wanted.lengths[index] : ends[index]].tolist()
            reading = self._readings.get(name)
            if start == 0:
                if reading is not None:
                    self._forget(name)
                reading = self._begin(name)
            elif reading is None or reading.known < start:
                forgotten.add(name)
                continue
            self._readings.move_to_end(name)
            for token in new[reading.known - start :]:
                reading.text += reading.stream.step(self._theirs, token) or ""
            reading.known = start + len(new)
            reading.tokens = self._encoded(reading)
            found[chunk] = reading
        return found

    def _begin(self, name: int) -> _Reading:
        if not self._free:
            self._forget(next(iter(self._readings)))
        reading = self._readings[name] = _Reading(self._free.pop())
        return reading

    def _forget(self, name: int) -> None:
        self._free.append(self._readings.pop(name).place)

    def _encoded(self, reading: _Reading) -> list[int]:
        """Own tokens of the window, which moves on where they are too many to write after them."""
        tokens: list[int] = self._ours.encode(reading.text).ids
        if len(tokens) > self._length * 3 // 4:
            kept = len(reading.text) * self._length // (2 * len(tokens))
            reading.text = reading.text[len(reading.text) - kept :]
            tokens = self._ours.encode(reading.text).ids[-(self._length * 3 // 4) :]
        return tokens

    def _write(self, readings: dict[int, _Reading], counts: dict[int, int]) -> dict[int, list[int]]:
        """By chunk of the step, what the model may say next: `counts` tokens or fewer. Those are missing for
        which nothing but NaN came out."""
        self._backend.enter_thread()
        writing = {chunk: reading for chunk, reading in readings.items() if reading.tokens}
        starts = []
        for reading in writing.values():
            same = _common(reading.computed, reading.tokens)
            starts.append(min(same, len(reading.tokens) - 1))  # the last one is computed for its logits
            reading.computed = list(reading.tokens)
        rounds = {c: self._rounds(r, counts[c]) for c, r in writing.items()}
        written: dict[int, list[int]] = {chunk: [] for chunk in writing}
        members = list(writing)
        fed = [writing[c].tokens[s:] for c, s in zip(members, starts, strict=True)]
        unsound: set[int] = set()
        while members:
            picks, sound = self._next([writing[chunk].place for chunk in members], np.array(starts), fed)
            going_on = []
            for chunk, begin, ids, pick, good in zip(members, starts, fed, picks, sound, strict=True):
                if not good:
                    unsound.add(chunk)
                elif len(written[chunk]) < rounds[chunk]:
                    written[chunk].append(pick)
                    if len(written[chunk]) < rounds[chunk]:
                        going_on.append((chunk, begin + len(ids), [pick]))
                        writing[chunk].computed.append(pick)
            members = [chunk for chunk, _, _ in going_on]
            starts, fed = [begin for _, begin, _ in going_on], [ids for _, _, ids in going_on]
        found = {
            c: self._translated(readings[c], ids)[: counts[c]]
            for c, ids in written.items()
            if c not in unsound
        }
        return found | {c: [] for c in readings if c not in writing}

    def _rounds(self, reading: _Reading, count: int) -> int:
        """How many own tokens say about as much as `count` of the model's."""
        if not count:
            return 0
        each = min(MOST_ROUNDS, len(reading.tokens) / max(1, min(reading.known, len(reading.tokens))))
        room = self._length - len(reading.tokens)
        return max(1, min(room, round(each * count) + 1))

    def _next(
        self, places: list[int], starts: NDArray[np.int64], fed: list[list[int]]
    ) -> tuple[list[int], list[bool]]:
        """The likeliest token after each of these, and whether it is one."""
        lengths = np.array([len(ids) for ids in fed], np.int64)
        order = np.argsort(lengths > FEW, kind="stable")
        tables = np.array(places)[order, None] * self._blocks + np.arange(self._blocks)
        num_generated = int((lengths <= FEW).sum())
        chunks = Chunks(
            num_generated=num_generated,
            starts=starts[order],
            lengths=lengths[order],
            token_ids=np.array([token for index in order for token in fed[index]], np.int64),
            generated_tables=tables[:num_generated].astype(np.int32),
            prompt_tables=tables[num_generated:].astype(np.int32),
        )
        each = np.ones(len(fed), np.int64)
        logits = logits_after(self._model, self._backend, chunks, each, self._cache).float()
        back = np.argsort(order, kind="stable")
        picks, sound = (
            logits.argmax(-1).cpu().numpy()[back],
            torch.isfinite(logits.sum(-1)).cpu().numpy()[back],
        )
        return picks.tolist(), sound.tolist()

    def _translated(self, reading: _Reading, written: list[int]) -> list[int]:
        """What was written, in tokens of the model, but for a last one that may not be whole."""
        if not written:
            return []
        tail = reading.text[-READ_AGAIN:]
        own = reading.tokens[-READ_AGAIN:]
        before = self._ours.decode(own, skip_special_tokens=False)
        after = self._ours.decode(own + written, skip_special_tokens=False)
        if not after.startswith(before):
            return []
        known = _ids(self._theirs, tail)
        whole = _ids(self._theirs, tail + after[len(before) :])
        if whole[: len(known)] != known:
            return []
        found = whole[len(known) :]
        return [token for token in found if token < self._their_size]


def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    return next((index for index in range(length) if one[index] != other[index]), length)
