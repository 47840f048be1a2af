"""`pdq nodes`, `pdq queue` and `pdq requests`: what Redis knows, as tables or as JSON.

Owns: the columns. Changes nothing in Redis. Addresses of Redis, keys and prompts are not shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from common.commands import running
from common.commands.settings import NodesSettings, QueueSettings, RequestsSettings, load
from common.settings.config import RedisSettings
from common.store.client import RedisClient
from common.store.queue import QueueLength, queue_lengths
from common.store.registry import KVLink, NodeRecord, Registry, Role, Snapshot
from common.store.request_record import ChoiceRecord, RequestRecord
from common.store.requests import Load, Requests

DRAFT_COLUMNS = ("DRAFTS", ">RIGHT", ">LENGTH", ">SAVED")
REQUEST_COLUMNS = (
    "REQUEST",
    "STATE",
    "AGE",
    ">TRY",
    "PREFILL",
    "DECODE",
    ">PROMPT",
    ">CACHED",
    ">OUT",
    ">TOTAL",
    "STAGES",
    "ENDED BY",
)


def nodes(argv: Sequence[str]) -> int:
    settings = load(NodesSettings, argv, os.environ, "pdq nodes")

    async def read() -> tuple[Snapshot, dict[str, list[KVLink]]]:
        async with redis_of(settings.redis) as client:
            registry = Registry(client)
            snapshot = await registry.snapshot()
            return snapshot, await registry.kv_links(list(snapshot.records))

    snapshot, links = asyncio.run(read())
    records = sorted(snapshot.records.values(), key=lambda r: (r.role is Role.GATEWAY, r.name))
    if settings.json:
        ages = {name: round(age_s, 3) for name, age_s in snapshot.ages.items()}
        return print_json(
            [
                {
                    **dataclasses.asdict(r),
                    "state": snapshot.standing(r.incarnation),
                    "kv_links": links[r.incarnation],
                    "beat_age_s": ages[r.incarnation],
                }
                for r in records
            ]
        )
    drafting = any(record.speculative or record.drafts for record in records)
    on_gpus = any(record.gpu for record in records)
    table = table_of(
        "NODE",
        "ROLE",
        "STATE",
        "UP",
        "BEAT",
        "PID",
        ">CORES",
        *(("DEVICE",) if on_gpus else ()),
        ">FREE",
        ">BLOCKS",
        ">RUN",
        ">WAIT",
        ">LEASES",
        ">STEPS",
        *(DRAFT_COLUMNS if drafting else ()),
        "TRANSPORTS",
        "LINKS",
        "MODEL",
        "AT",
    )
    for record in records:
        name = record.incarnation
        table.add_row(*_node_row(record, snapshot, links[name], drafting=drafting, on_gpus=on_gpus))
    print_table(table, "no nodes")
    for record in records:
        if not record.fingerprint.is_repeatable:
            print(
                f"{record.incarnation} does not keep the numerics rule: the same request may give other "
                f"tokens ({record.numerics})"
            )
    return 0


def queue(argv: Sequence[str]) -> int:
    """`pdq queue`, and what begins with that: `dead`, `requeue ID`."""
    if argv and argv[0] in ("dead", "requeue"):
        from common.commands import dead_letters

        return dead_letters.COMMANDS[argv[0]](argv[1:])
    settings = load(QueueSettings, argv, os.environ, "pdq queue")

    async def read() -> list[tuple[NodeRecord, str, QueueLength, Load]]:
        async with redis_of(settings.redis) as client:
            snapshot = await Registry(client).snapshot()
            workers = snapshot.of_role(Role.PREFILL, Role.DECODE, Role.UNIFIED)
            workers.sort(key=lambda record: record.name)
            names = [record.incarnation for record in workers]
            lengths = await queue_lengths(client, names)
            loads = await Requests(client).loads(names)
            return [
                (record, snapshot.standing(record.incarnation), length, loads[record.incarnation])
                for record, length in zip(workers, lengths, strict=True)
            ]

    rows = asyncio.run(read())
    if settings.json:
        return print_json(
            [
                {
                    "incarnation": record.incarnation,
                    "name": record.name,
                    "role": record.role,
                    "state": state,
                    **dataclasses.asdict(length),
                    "open_requests": load_.requests,
                    "prompt_tokens": load_.prompt_tokens,
                }
                for record, state, length, load_ in rows
            ]
        )
    table = table_of("NODE", "ROLE", "STATE", ">WAITING", ">AT WORK", ">OPEN", ">PROMPT TOKENS")
    for record, state, length, load_ in rows:
        table.add_row(
            record.incarnation,
            record.role,
            state,
            str(length.waiting),
            str(length.at_work),
            str(load_.requests),
            str(load_.prompt_tokens),
        )
    return print_table(table, "no nodes, hence no queues")


def requests(argv: Sequence[str]) -> int:
    settings = load(RequestsSettings, argv, os.environ, "pdq requests")

    async def read() -> list[RequestRecord]:
        async with redis_of(settings.redis) as client:
            return await Requests(client).recent(settings.limit)

    records = asyncio.run(read())
    if settings.json:
        return print_json([dataclasses.asdict(record) for record in records])
    table = table_of(*REQUEST_COLUMNS)
    now_ms = time.time() * 1000
    for record in records:
        for choice in record.choices:
            table.add_row(*request_row(record, choice, now_ms))
    return print_table(table, "no requests")


def _node_row(
    record: NodeRecord, snapshot: Snapshot, links: Sequence[KVLink], *, drafting: bool, on_gpus: bool
) -> list[str]:
    name = record.incarnation
    up_s = time.time() - record.started_at / 1000 if record.started_at else None
    worker = record.role is not Role.GATEWAY
    return [
        name,
        record.role,
        snapshot.standing(name),
        age(up_s),
        age(snapshot.ages[name]),
        str(record.pid or ""),
        str(record.cores or ""),
        *((_device(record),) if on_gpus else ()),
        str(record.free_blocks) if worker else "",
        str(record.num_blocks) if worker else "",
        str(record.running),
        str(record.waiting) if worker else "",
        str(record.leases) if worker else "",
        str(record.steps) if worker else "",
        *(draft_cells(record) if drafting else ()),
        record.transports,
        _by_transport(links),
        record.model,
        record.endpoint if worker else record.url,
    ]


def _device(record: NodeRecord) -> str:
    """`cuda:3 NVIDIA H200 GPU-1b9d…`: as its process counts, and as everybody calls it."""
    return " ".join(filter(None, (record.device, record.gpu_name, record.gpu)))


def draft_cells(record: NodeRecord) -> list[str]:
    """Of DRAFT_COLUMNS: the proposer, the share of its tokens that were right, how many were right in a
    draft on average, and the time that this saved (`-0.4s`: cost)."""
    if not record.drafts:
        return [record.speculative, "", "", ""]
    share = record.accepted_tokens / max(1, record.drafted_tokens)
    saved = record.saved_ms / 1000
    return [
        record.speculative or "off",
        f"{share:.0%}",
        f"{record.accepted_tokens / record.drafts:.1f}",
        f"{saved:.1f}s" if abs(saved) < 120 else f"{saved / 60:.0f}m",
    ]


def _by_transport(links: Sequence[KVLink]) -> str:
    """`shm 2 tcp 1`: open links by transport."""
    counts = Counter(link["transport"] for link in links if link["transport"])
    return " ".join(f"{transport} {count}" for transport, count in sorted(counts.items()))


def request_row(record: RequestRecord, choice: ChoiceRecord, now_ms: float) -> list[str]:
    several = len(record.choices) > 1
    total = record.ended_at - record.accepted_at if record.ended_at else None
    ended_by = choice.finish_reason or " ".join(filter(None, (choice.error, choice.message)))
    return [
        f"{record.request}#{choice.choice}" if several else record.request,
        choice.state,
        age((now_ms - record.accepted_at) / 1000),
        str(choice.attempt),
        choice.prefill_node,
        choice.decode_node,
        str(record.prompt_len),
        str(choice.cached_tokens),
        str(choice.generated),
        "" if total is None else _milliseconds(total / 1000),
        stages(choice, total),
        ended_by,
    ]


def stages(choice: ChoiceRecord, total_ms: int | None) -> str:
    """`queue 3ms prefill 12ms … rest 5ms`: what the nodes measured, and what does not add up."""
    parts = [f"{stage} {_milliseconds(seconds)}" for stage, seconds in choice.seconds.items()]
    if parts and total_ms is not None:
        parts.append(f"rest {_milliseconds(total_ms / 1000 - sum(choice.seconds.values()))}")
    return " ".join(parts)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f}ms" if abs(seconds) < 10 else f"{seconds:.1f}s"


def age(seconds: float | None) -> str:
    if seconds is None:
        return ""
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}m" if seconds < 7200 else f"{seconds / 3600:.0f}h"


@contextlib.asynccontextmanager
async def redis_of(settings: RedisSettings) -> AsyncIterator[RedisClient]:
    client = RedisClient(running.redis_of(settings, os.environ), name="pdq-inspect")
    try:
        yield client
    finally:
        await client.close()


def table_of(*headers: str) -> Table:
    """`>` in front of a header: its column is aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        right = header.startswith(">")
        table.add_column(header.lstrip(">"), justify="right" if right else "left", no_wrap=True)
    return table


def print_table(table: Table, empty: str) -> int:
    """Whole lines, however long: a terminal can scroll or wrap, and a pipe has no width."""
    if table.row_count:
        out = Console(width=10_000, highlight=False, markup=False, emoji=False)
        with out.capture() as capture:
            out.print(table, crop=False)
        print("\n".join(line.rstrip() for line in capture.get().splitlines()))
    else:
        print(empty)
    return 0


def print_json(value: Any) -> int:
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    print()
    return 0
