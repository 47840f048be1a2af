"""`pdq queue dead` and `pdq queue requeue`: requests that made engines fail, and one more try of one.

Owns: the columns, and waiting for what becomes of a replay. Prompts are not shown, only how long
they are; `--json` has their token ids, which is what a developer needs to see the failure again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Sequence

from common.commands.inspect import (
    REQUEST_COLUMNS,
    age,
    print_json,
    print_table,
    redis_of,
    request_row,
    table_of,
)
from common.commands.settings import DeadSettings, RequeueSettings, load
from common.errors import InvalidRequest
from common.store.client import RedisClient
from common.store.registry import Registry, Role
from common.store.request_record import RequestRecord
from common.store.requests import DeadLetter, Requests

LOOK_S = 0.2


def dead(argv: Sequence[str]) -> int:
    settings = load(DeadSettings, argv, os.environ, "pdq queue dead")

    async def read() -> list[DeadLetter]:
        async with redis_of(settings.redis) as client:
            return await Requests(client).dead_letters(settings.limit)

    letters = asyncio.run(read())
    if settings.json:
        return print_json([dataclasses.asdict(letter) for letter in letters])
    table = table_of("ID", "REQUEST", "AGE", ">TRY", ">PROMPT", ">DELIVERED", "REASON")
    now_ms = time.time() * 1000
    for letter in letters:
        dispatch = letter.dispatch
        table.add_row(
            letter.id,
            letter.request,
            age((now_ms - letter.at) / 1000),
            str(letter.attempt),
            str(dispatch.request.prompt_len) if dispatch else "",
            str(len(dispatch.request.token_ids) - dispatch.request.prompt_len) if dispatch else "",
            letter.reason,
        )
    return print_table(table, "no dead letters")


def requeue(argv: Sequence[str]) -> int:
    if not argv or argv[0].startswith("-"):
        name, flags = "", list(argv)
    else:
        name, flags = argv[0], list(argv[1:])
    settings = load(RequeueSettings, flags, os.environ, "pdq queue requeue ID")
    if not name:
        raise InvalidRequest("which one? `pdq queue dead` lists the ids", param="id")

    async def run() -> RequestRecord | str:
        async with redis_of(settings.redis) as client:
            requests = Requests(client)
            node = await _incarnation(client, settings.node) if settings.node else ""
            replay = await requests.requeue(name, node)
            try:
                async with asyncio.timeout(settings.wait_s):
                    while True:
                        record = await requests.get(replay)
                        if record is not None and record.ended_at:
                            return record
                        await asyncio.sleep(LOOK_S)
            except TimeoutError:
                return replay

    outcome = asyncio.run(run())
    if isinstance(outcome, str):
        print(f"requeued as {outcome}; `pdq requests` shows what becomes of it")
        return 0
    if settings.json:
        return print_json(dataclasses.asdict(outcome))
    table = table_of(*REQUEST_COLUMNS)
    for choice in outcome.choices:
        table.add_row(*request_row(outcome, choice, time.time() * 1000))
    return print_table(table, "")


async def _incarnation(client: RedisClient, name: str) -> str:
    """Of the node that is called so. `InvalidRequest` if there is none, or more than one."""
    snapshot = await Registry(client).snapshot()
    workers = snapshot.of_role(Role.PREFILL, Role.DECODE, Role.UNIFIED)
    found = [r.incarnation for r in workers if name in (r.incarnation, r.name)]
    if len(found) == 1:
        return found[0]
    which = f"is {' and '.join(found)}" if found else "is not there; `pdq nodes` lists them"
    raise InvalidRequest(f"node {name!r:.200} {which}", param="node")


COMMANDS = {"dead": dead, "requeue": requeue}
