"""The sampler's launches: in what order a row's stages run, and how many programs share a row.

Owns the memory between them. Every launch has a grid and arguments that depend on the buffers alone and not
on what is in them; rows that need less of it leave a launch at once. Knows no slot table and no host.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from common.engine.devices.cuda.kernels import sampling_cuts, sampling_edits, sampling_logprobs, sampling_race
from common.engine.devices.cuda.kernels.sampling_cuts import PICKS
from common.engine.devices.cuda.kernels.sampling_edits import NUM_BINS, NUM_HISTOGRAMS
from common.engine.devices.cuda.kernels.sampling_values import STATE_WORDS, TILE_GROUPS
from common.engine.devices.cuda.launch import Launch, Work, power_of_two
from common.engine.devices.sampling import RowBuffers, Sampled
from common.engine.sampling.noise import GROUP
from common.engine.sampling.slots import Records

_TILES = (4, 2, 1)  # of a program, the first that leaves every multiprocessor its share
_PROGRAMS_EACH = 4  # of a multiprocessor
_WARPS = 4
_PASSES = 3
_TILE_GROUPS: int = TILE_GROUPS.value


@dataclasses.dataclass(frozen=True, slots=True)
class Stages:
    """Which launches there are. Rows that need fewer leave the others early: more are never wrong."""

    edits: bool  # biases, banned, allowed and held-back ids, penalties
    draws: bool  # temperatures above 0
    cuts: bool  # top_k and top_p
    logprobs: bool

    @classmethod
    def of(cls, records: Records) -> Stages:
        """What rows with these `records` of the slot table need."""
        hot = records["temperature"] > 0.0
        return cls(
            edits=bool(records["edited"].any()),
            draws=bool(hot.any()),
            cuts=bool((hot & ((records["top_k"] > 0) | (records["top_p"] < 1.0))).any()),
            logprobs=bool((records["logprobs"] >= 0).any()),
        )


GREEDY = Stages(edits=False, draws=False, cuts=False, logprobs=False)
ALL = Stages(edits=True, draws=True, cuts=True, logprobs=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """How the programs of `rows` rows share `vocab` tokens each. Which shape it is shows in no token."""

    vocab: int
    groups: int
    tiles: int  # of a program
    splits: int  # programs of a row

    @classmethod
    def of(cls, vocab: int, rows: int, multiprocessors: int) -> Shape:
        groups = -(-vocab // GROUP)
        for tiles in _TILES:
            splits = -(-groups // (tiles * _TILE_GROUPS))
            if rows * splits >= _PROGRAMS_EACH * multiprocessors:
                break
        return cls(vocab, groups, tiles, splits)

    @property
    def constants(self) -> dict[str, int]:
        return {
            "TILES": self.tiles,
            "SPLITS": power_of_two(self.splits),
            "ALL_GROUPS": power_of_two(self.groups),
        }


class Workspace:
    """What launches leave for each other: for at most `max_rows` rows, of one step at a time."""

    def __init__(self, vocab: int, max_rows: int, device: torch.device) -> None:
        groups = -(-vocab // GROUP)
        splits = -(-groups // _TILE_GROUPS)

        def memory(kind: torch.dtype, *shape: int) -> Tensor:
            return torch.empty((max_rows, *shape), dtype=kind, device=device)

        self.max_rows = max_rows
        self.work = memory(torch.float32, vocab)
        self.peaks = memory(torch.float32, groups)
        self.raw_peaks = memory(torch.float32, groups)
        self.ties = memory(torch.int32, groups)
        self.marks = memory(torch.int32, splits)
        self.totals = memory(torch.int64, splits)
        self.befores = memory(torch.int64, splits)
        self.scores = [memory(torch.float64, splits) for _ in range(2)]  # of the holders, of all
        self.winners = [memory(torch.int32, splits) for _ in range(2)]
        self.histograms = memory(torch.int64, NUM_HISTOGRAMS * NUM_BINS)
        self.state = memory(torch.int64, STATE_WORDS)
        self.cuts = [memory(torch.int64, 2) for _ in range(3)]  # after min_p, top_k, top_p
        self.picks = [memory(torch.int64, PICKS, 2) for _ in range(2)]  # of top_k, top_p
        self.wanted = memory(torch.int64)

    def num_bytes(self) -> int:
        total = 0
        for value in vars(self).values():
            for tensor in value if isinstance(value, list) else [value]:
                total += tensor.nbytes if isinstance(tensor, Tensor) else 0
        return total


@functools.cache
def launch(kernel: object, warps: int, **constants: int) -> Launch:
    return Launch(kernel=kernel, constants=constants, num_warps=warps)


def _peaks(shape: Shape, stages: Stages) -> Launch:
    kernel = sampling_edits.peaks_kernel
    return launch(kernel, _WARPS, CAN_EDIT=stages.edits, CAN_CUT=stages.cuts, TILES=shape.tiles)


def _rows(shape: Shape, stages: Stages) -> Launch:
    constants = {name: shape.constants[name] for name in ("ALL_GROUPS", "SPLITS")}
    return launch(sampling_edits.rows_kernel, _WARPS, CAN_CUT=stages.cuts, **constants)


def _weigh(shape: Shape, *, by_mass: bool, number: int) -> Launch:
    constants = {name: shape.constants[name] for name in ("TILES", "SPLITS")}
    return launch(sampling_cuts.weigh_kernel, _WARPS, BY_MASS=by_mass, PASS=number, **constants)


def _ties(shape: Shape, *, by_mass: bool) -> Launch:
    return launch(sampling_cuts.ties_kernel, _WARPS, BY_MASS=by_mass, TILES=shape.tiles)


def _totals(shape: Shape) -> Launch:
    constants = {name: shape.constants[name] for name in ("TILES", "ALL_GROUPS")}
    return launch(sampling_cuts.totals_kernel, _WARPS, **constants)


def _holders(shape: Shape, stages: Stages) -> Launch:
    constants = {name: shape.constants[name] for name in ("TILES", "ALL_GROUPS")}
    return launch(sampling_race.holders_kernel, _WARPS, CAN_CUT=stages.cuts, **constants)


def _race(shape: Shape) -> Launch:
    constants = {name: shape.constants[name] for name in ("TILES", "SPLITS")}
    return launch(sampling_race.race_kernel, _WARPS, **constants)


def _tokens(shape: Shape, *, is_hot: bool, has_targets: bool) -> Launch:
    splits = shape.constants["SPLITS"]
    return launch(sampling_race.tokens_kernel, 1, IS_HOT=is_hot, HAS_TARGETS=has_targets, SPLITS=splits)


def _append() -> Launch:
    return launch(sampling_race.append_kernel, 1)


def _ranks(shape: Shape) -> Launch:
    constants = {name: shape.constants[name] for name in ("TILES", "ALL_GROUPS")}
    return launch(sampling_logprobs.ranks_kernel, _WARPS, **constants)


def _logprobs(shape: Shape) -> Launch:
    constants = {name: shape.constants[name] for name in ("ALL_GROUPS", "SPLITS")}
    return launch(sampling_logprobs.logprobs_kernel, _WARPS, **constants)


@dataclasses.dataclass(frozen=True, slots=True)
class Targets:
    """Tokens that are not chosen but scored, with `counts` of the most likely ones; int64 `[rows]`."""

    tokens: Tensor
    counts: Tensor


def run(
    logits: Tensor,
    rows: RowBuffers,
    results: Sampled,
    memory: tuple[Tensor, Tensor],
    space: Workspace,
    shape: Shape,
    stages: Stages,
    *,
    append: bool,
    targets: Targets | None = None,
) -> None:
    """All launches of a step, and nothing besides. `memory`: the records and the table of addresses.

    With `append` the tokens that come out are counted on the device, drafts that were right included.
    """
    count = len(rows.slots)
    assert count <= space.max_rows
    wide, narrow = (count, shape.splits), (count,)
    records, addresses = memory
    s, vocab, groups, splits = space, shape.vocab, shape.groups, shape.splits
    sizes = (logits.stride(0), vocab, groups)
    source = (logits, s.work, s.peaks)
    where = (rows.sources, rows.slots)
    _peaks(shape, stages)(
        wide,
        *source,
        s.raw_peaks,
        s.marks,
        s.histograms,
        rows.slots,
        rows.positions,
        rows.sources,
        rows.drafted,
        rows.draft_start,
        rows.draft_length,
        records,
        addresses,
        *sizes,
    )
    _rows(shape, stages)(
        narrow, *source, s.marks, rows.slots, rows.sources, records, s.state, s.cuts[0], *sizes, splits
    )
    cut = s.cuts[0]
    selection = (s.histograms, *where, records, s.state)
    if stages.cuts:
        for by_mass in (False, True):
            pick = s.picks[by_mass]
            for number in range(_PASSES):
                _weigh(shape, by_mass=by_mass, number=number)(
                    wide, *source, s.totals, *selection, cut, pick, *sizes, splits
                )
            _ties(shape, by_mass=by_mass)(wide, *source, s.ties, *selection, cut, pick, *sizes)
            if not by_mass:
                _totals(shape)(wide, *source, s.ties, s.totals, *selection, cut, s.cuts[1], pick, *sizes)
                cut = s.cuts[1]
    if stages.draws:
        held, final = ((s.scores[i], s.winners[i]) for i in range(2))
        _holders(shape, stages)(
            wide,
            *source,
            s.ties,
            *held,
            *where,
            rows.positions,
            records,
            s.state,
            cut,
            s.cuts[2],
            s.picks[1],
            *sizes,
        )
        cut = s.cuts[2] if stages.cuts else cut
        _race(shape)(
            wide, *source, *held, *final, *where, rows.positions, records, s.state, cut, *sizes, splits
        )
    scored = (s.wanted, s.wanted) if targets is None else (targets.tokens, targets.counts)
    _tokens(shape, is_hot=stages.draws, has_targets=targets is not None)(
        narrow,
        s.scores[1],
        s.winners[1],
        rows.slots,
        records,
        s.state,
        *scored,
        s.wanted,
        results.tokens,
        results.faults,
        splits,
    )
    drafts = (rows.drafted, rows.draft_start, rows.draft_length)
    if append:
        _append()(narrow, results.tokens, results.faults, rows.slots, *drafts, records, addresses, vocab)
    if stages.logprobs:
        likely = (
            logits,
            s.peaks,
            s.raw_peaks,
            *where,
            records,
            results.tokens,
            s.wanted,
            s.totals,
            s.befores,
        )
        _ranks(shape)(wide, *likely, *sizes)
        _logprobs(shape)(
            narrow, *likely, results.chosen, results.ranks, results.top_ids, results.top, *sizes, splits
        )


_TELLING = {  # for proofs, by triton's word for the logits' type
    "bf16": ("edits", "totals", "top_p passes 2, 3", "race"),
    "fp16": ("peaks", "top_p pass 1"),
    "fp32": ("ranks",),
}


def works(
    rows: int, vocab: int, kind: str, size: int, multiprocessors: int, *, every: bool
) -> Iterator[Work]:
    """The launches of a step, or the few that tell most of the others; see `_all_works`."""
    for work in _all_works(rows, vocab, kind, size, multiprocessors):
        if every or any(work.name.startswith(f"sampler {name} {rows}x") for name in _TELLING[kind]):
            yield work


def _all_works(rows: int, vocab: int, kind: str, size: int, multiprocessors: int) -> Iterator[Work]:
    """A step of `rows` rows that all have penalties, a temperature and top_p, and want logprobs; and the
    first launch of greedy ones. `kind` is triton's word for the logits' type, of `size` bytes.

    Bytes of a selection's later passes are those of the worst case, in which every group still has a
    candidate.
    """
    shape = Shape.of(vocab, rows, multiprocessors)
    wide = rows * shape.splits
    raw, full, peaks = size * rows * vocab, 4 * rows * vocab, 4 * rows * shape.groups
    bins = 8 * NUM_BINS * wide
    logits, i64, i32, fp32, fp64 = f"*{kind}", "*i64", "*i32", "*fp32", "*fp64"
    source, sizes, where = (logits, fp32, fp32), ("i64", "i32", "i32"), (i64, i64)
    multiples = frozenset({"stride", "vocab"} if vocab % 16 == 0 else ())

    def work(
        name: str, made: Launch, types: tuple[str, ...], programs: int, num_bytes: int, *, logs: bool = False
    ) -> Work:
        return Work(
            name=f"sampler {name} {rows}x{vocab}",
            launch=made,
            types=types,
            multiples=multiples & set(made.kernel.arg_names),
            num_programs=programs,
            num_bytes=num_bytes,
            may_fuse=logs,  # the logarithm in float64 does
        )

    types: tuple[str, ...] = (*source, fp32, i32, *(i64,) * 9, *sizes)
    yield work("peaks", _peaks(shape, GREEDY), types, wide, raw + peaks)
    yield work("edits", _peaks(shape, ALL), types, wide, raw + 4 * full + peaks)
    yield work("rows", _rows(shape, ALL), (*source, i32, *(i64,) * 5, *sizes, "i32"), rows, peaks)
    selection = (i64, *where, i64, i64)
    types = (*source, i32, i64, *selection, i64, i64, i64, *sizes)
    yield work("totals", _totals(shape), types, wide, full)
    types = (*source, i64, *selection, i64, i64, *sizes, "i32")
    yield work("top_p pass 1", _weigh(shape, by_mass=True, number=0), types, wide, full)
    # the third is as the second, but for its bits
    yield work("top_p passes 2, 3", _weigh(shape, by_mass=True, number=2), types, wide, 2 * (full + bins))
    types = (*source, i32, *selection, i64, i64, *sizes)
    yield work("top_p ties", _ties(shape, by_mass=True), types, wide, full + bins)
    types = (*source, i32, fp64, i32, *where, *(i64,) * 6, *sizes)
    yield work("holders", _holders(shape, ALL), types, wide, peaks * 9 + peaks * shape.splits, logs=True)
    types = (*source, fp64, i32, fp64, i32, *where, *(i64,) * 4, *sizes, "i32")
    yield work("race", _race(shape), types, wide, full, logs=True)
    types = (fp64, i32, *(i64,) * 7, "*u8", "i32")
    yield work("tokens", _tokens(shape, is_hot=True, has_targets=False), types, rows, 12 * wide)
    types = (i64, "*u8", *(i64,) * 6, "i32")
    yield work("append", _append(), types, rows, 40 * rows)
    likely = (logits, fp32, fp32, *where, *(i64,) * 5)
    yield work("ranks", _ranks(shape), (*likely, *sizes), wide, raw)
    types = (*likely, fp32, i64, i64, fp32, *sizes, "i32")
    yield work("logprobs", _logprobs(shape), types, rows, peaks + 20 * GROUP * size * rows, logs=True)
