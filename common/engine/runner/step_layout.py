"""A step for a device with a queue: which of its rows a graph computes, and all its arrays in one buffer.

    generated   decoding and verifying rows, filled up to a bucket: what a graph computes
    rest        prompts; or the whole step, where it fits into no graph

Owns the split and the order of arrays. A bucket's arrays lie at the same offsets in every step, for graphs
keep addresses; its tables come last, for their length is the step's. Knows no stream and no model.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common.engine.devices.rows import RowPlan, Rows
from common.engine.devices.sampling import MOST_LOGPROBS, RowBuffers, Sampled
from common.engine.interface import Chunks, StepInput
from common.engine.runner.batch import Batch, lay_out
from common.engine.runner.buckets import Buckets
from common.engine.runner.sampling_groups import Group, grouped
from common.engine.runner.step_arrays import StepArrays
from common.engine.sampling.records import SampleRows

_ROW_FIELDS = ("slots", "positions", "sources", "draft_start", "draft_length")


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Chunks of a step that one forward computes, and the rows that are sampled of it."""

    batch: Batch
    rows: SampleRows  # `sources` count the sampled positions of the part, or of its group
    padded: int  # rows of the forward


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """The rows that are sampled of `generated` come first in the step."""

    generated: Part | None
    rest: Part | None
    order: NDArray[np.int64]  # for each row of the rest, which of the step's sampled rows it is
    groups: list[Group]  # of the rest's rows

    @property
    def num_generated_rows(self) -> int:
        """That are sampled of the first part."""
        return 0 if self.generated is None else len(self.generated.rows.slots)


def split(step: StepInput, block_size: int, plan: RowPlan, buckets: Buckets, most_sampled: int) -> Split:
    """`most_sampled` rows in one call of the sampler."""
    num_sampled = np.where(step.samples, 1 + step.num_drafted, 0)
    chunks = step.num_generated
    num_rows = int(step.lengths[:chunks].sum())
    positions = int(num_sampled[:chunks].sum())
    sources, lengths = step.sampled.sources, step.sampled.draft_length
    assert sources is not None
    assert lengths is not None
    padded = buckets.padded(plan.padded_generated(num_rows))
    longest = int(step.lengths[:chunks].max(initial=0))
    # A choice that shares its first logits with a row of the first part would need them in the second.
    if padded is None or longest > buckets.most_rows or (sources[positions:] < positions).any():
        chunks = num_rows = positions = 0
    generated = rest = None
    order, groups = np.empty(0, np.int64), list[Group]()
    if chunks:
        assert padded is not None
        own = Chunks(
            num_generated=chunks,
            starts=step.starts[:chunks],
            lengths=step.lengths[:chunks],
            token_ids=step.token_ids[:num_rows],
            generated_tables=step.generated_tables,
            prompt_tables=step.prompt_tables[:0],
        )
        batch = lay_out(own, num_sampled[:chunks], block_size, plan)
        generated = Part(batch, _rows(step.sampled, np.arange(positions), 0), padded)
    if chunks < step.num_chunks:
        own = Chunks(
            num_generated=step.num_generated - chunks,
            starts=step.starts[chunks:],
            lengths=step.lengths[chunks:],
            token_ids=step.token_ids[num_rows:],
            generated_tables=step.generated_tables if not chunks else step.generated_tables[:0],
            prompt_tables=step.prompt_tables,
        )
        batch = lay_out(own, num_sampled[chunks:], block_size, plan)
        order, groups = grouped(
            _rows(step.sampled, np.arange(positions, len(sources)), positions), most_sampled
        )
        order = order + positions
        rows = _rows(step.sampled, order, positions)
        assert rows.sources is not None
        for group in groups:
            rows.sources[group.first_row : group.end_row] -= group.first_position
        rest = Part(batch, rows, batch.rows.num_rows)
    return Split(generated, rest, order, groups)


def _rows(all_rows: SampleRows, order: NDArray[np.int64], sources_from: int) -> SampleRows:
    """These of them; all have the drafts of all behind them."""
    assert all_rows.sources is not None
    assert all_rows.draft_start is not None
    assert all_rows.draft_length is not None
    return SampleRows(
        slots=all_rows.slots[order],
        positions=all_rows.positions[order],
        drafted=all_rows.drafted,
        draft_start=all_rows.draft_start[order],
        draft_length=all_rows.draft_length[order],
        sources=all_rows.sources[order] - sources_from,
    )


# What a device is given of a part.


@dataclasses.dataclass(frozen=True, slots=True)
class PartSizes:
    rows: int
    tiles: int
    tables: int  # numbers in them
    positions: int  # whose logits are computed
    sampled: int  # rows
    drafted: int

    @classmethod
    def of_bucket(cls, padded: int, tables: int) -> PartSizes:
        return cls(padded, padded, tables, padded, padded, padded)

    @classmethod
    def of(cls, part: Part) -> PartSizes:
        rows, sampled = part.batch.rows, part.rows
        drafted = 0 if sampled.drafted is None else len(sampled.drafted)
        return cls(
            rows.num_rows,
            len(rows.tiles),
            len(rows.tables),
            len(part.batch.sampled),
            len(sampled.slots),
            drafted,
        )


def add_part(arrays: StepArrays, name: str, sizes: PartSizes) -> None:
    for field in ("token_ids", "positions", "slots"):
        arrays.add(f"{name}/{field}", np.int64, sizes.rows)
    arrays.add(f"{name}/logits", np.int64, sizes.positions)
    for field in _ROW_FIELDS:
        arrays.add(f"{name}/sampled/{field}", np.int64, sizes.sampled)
    arrays.add(f"{name}/sampled/drafted", np.int64, max(1, sizes.drafted))
    arrays.add(f"{name}/tiles", np.int32, sizes.tiles, 4)
    arrays.add(f"{name}/tables", np.int32, sizes.tables)


def fill_part(arrays: StepArrays, memory: NDArray[np.uint8], name: str, part: Part) -> None:
    """What is there more of a bucket is padding: no slots, no rows in a tile."""
    rows, sampled = part.batch.rows, part.rows
    arrays.fill(memory, f"{name}/token_ids", rows.token_ids.numpy())
    arrays.fill(memory, f"{name}/positions", rows.positions.numpy())
    arrays.fill(memory, f"{name}/slots", rows.slots.numpy(), rest=-1)
    arrays.fill(memory, f"{name}/logits", part.batch.sampled)
    for field in _ROW_FIELDS:
        values = getattr(sampled, field)
        arrays.fill(memory, f"{name}/sampled/{field}", values, rest=-1 if field == "slots" else 0)
    arrays.fill(memory, f"{name}/sampled/drafted", sampled.drafted)
    arrays.fill(memory, f"{name}/tiles", rows.tiles.numpy())
    arrays.fill(memory, f"{name}/tables", rows.tables.numpy())


def fill_padding(arrays: StepArrays, memory: NDArray[np.uint8], name: str) -> None:
    """A bucket without a row."""
    for place in arrays.places:
        if place.startswith(f"{name}/"):
            arrays.fill(memory, place, None, rest=-1 if place.endswith("/slots") else 0)


@dataclasses.dataclass(frozen=True, slots=True)
class PartOnDevice:
    rows: Rows
    logits: Tensor  # int64 [positions]: rows of the forward
    sampled: RowBuffers


def part_on_device(
    arrays: StepArrays, memory: Tensor, name: str, num_generated: int, padded_generated: int, tiles: int
) -> PartOnDevice:
    """`tiles` of generated rows, which come first."""

    def at(field: str) -> Tensor:
        return arrays.device(memory, f"{name}/{field}")

    rows = Rows(
        token_ids=at("token_ids"),
        positions=at("positions"),
        slots=at("slots"),
        num_generated=num_generated,
        padded_generated=padded_generated,
        prompt_chunks=(),
        tiles=at("tiles"),
        num_generated_tiles=tiles,
        tables=at("tables"),
    )
    fields = {field: at(f"sampled/{field}") for field in (*_ROW_FIELDS, "drafted")}
    return PartOnDevice(rows, at("logits"), RowBuffers(**fields))


# What it gives back of it.


def add_results(arrays: StepArrays, name: str, rows: int, sampled: int) -> None:
    arrays.add(f"{name}/sound", np.uint8, rows)
    arrays.add(f"{name}/tokens", np.int64, sampled)
    arrays.add(f"{name}/faults", np.uint8, sampled)
    arrays.add(f"{name}/chosen", np.float32, sampled)
    arrays.add(f"{name}/ranks", np.int64, sampled)
    arrays.add(f"{name}/top_ids", np.int64, sampled, MOST_LOGPROBS)
    arrays.add(f"{name}/top", np.float32, sampled, MOST_LOGPROBS)


def sampled_on_device(arrays: StepArrays, memory: Tensor, name: str) -> Sampled:
    fields = (field.name for field in dataclasses.fields(Sampled))
    return Sampled(**{field: arrays.device(memory, f"{name}/{field}") for field in fields})
