"""From the prefill server to the decode server: the same figures of each system, prompt by prompt.

One prompt at a time, fresh random ids. All moments are the client's but for the copies:

    prompt              sent → the client has the prefill side's answer. vLLM: the whole answer of
                        the first leg. Ours: the event with the first token.
    to a decoded token  from there to the first token that the decode side made: the handoff and one
                        decode step. vLLM: leg two sent, KV pulled, last position computed again.
                        Ours: what is left of the copy, the first step; it is the second token.
    a decode step       between the tokens after that, median
    handoff alone       `to a decoded token` less `a decode step` of the same answer. A difference of
                        what the client sees: an answer of the prefill side that comes late by some
                        milliseconds makes it less, even negative. `second token` has no such doubt.
    first token         sent → the user's first token. vLLM's is the decode side's.
    second token        sent → the user's second token
    copy                seconds of pulling the prompt's KV. vLLM: NIXL's own figure, from the start to
                        when vLLM sees the end. Ours: threads in the reader, with the checks of
                        generations and digests, which vLLM has not.
    copy after prompt   the part of it after the prompt was computed. vLLM: all of it.
    copy rate           bytes of the prompt's KV / `copy`. Ours copies pieces while the prefill node
                        computes, and over tcp waits for that node's CPU; vLLM's has all for itself.

Both systems answer through one HTTP server each way; a proxy before vLLM would add its time. Each has
its own chunks of prompts, as it comes (vLLM 2,048 tokens, ours 512). vLLM runs eager, not compiled.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
from collections.abc import Sequence
from typing import Any

from bench.peers.system import Model, System, idle_cores
from bench.peers.table import table

POOL_TOKENS = 4608
"""Of each server: so small that a few prompts go through all of it, and its memory is warm."""
OUTPUT = 8  # tokens: enough for a median of decode steps
WARM_UP = 1.2  # times the pool in tokens, after the start
SETTLE_S = 0.3  # between two prompts, for what follows an answer (leases, records) to end
IDLE_S = 2.0

Row = dict[str, Any]

FIGURES = {  # key → label, factor, unit
    "prompt_s": ("prompt", 1.0, "s"),
    "handoff_and_step_s": ("to a decoded token", 1e3, "ms"),
    "step_s": ("a decode step", 1e3, "ms"),
    "handoff_s": ("handoff alone", 1e3, "ms"),
    "first_token_s": ("first token", 1.0, "s"),
    "second_token_s": ("second token", 1.0, "s"),
    "copy_s": ("copy", 1e3, "ms"),
    "copy_after_prompt_s": ("copy after prompt", 1e3, "ms"),
    "copy_bytes_per_s": ("copy rate", 1e-9, "GB/s"),
}


def measure(
    system: System, model: Model, lengths: Sequence[int], prompts: int, rng: random.Random
) -> list[Row]:
    """Rows of one waking: `prompts` of each length, once the memory is warm; and one row with what
    it takes idle after that."""
    rows: list[Row] = []
    with system.awake():
        while system.prompt_tokens < WARM_UP * POOL_TOKENS:
            asyncio.run(_prompts(system, model, max(lengths), 1, rng))
        for length in lengths:
            rows += asyncio.run(_prompts(system, model, length, prompts, rng))
        rows.append({"system": system.name, "idle_cores": idle_cores(system, IDLE_S)})
    return rows


async def _prompts(system: System, model: Model, length: int, prompts: int, rng: random.Random) -> list[Row]:
    rows = []
    for _ in range(prompts):
        prompt = rng.choices(range(3, model.vocab_size), k=length)
        done = await system.complete(prompt, OUTPUT)
        await asyncio.sleep(SETTLE_S)
        copies = await system.copies(length)
        to_decoded = done.own[0] - done.prefilled_at
        step = statistics.median(b - a for a, b in itertools.pairwise(done.own))
        rows.append(
            {
                "system": system.name,
                "length": length,
                "bytes": copies.num_bytes,
                "prompt_s": done.prefilled_at - done.sent_at,
                "handoff_and_step_s": to_decoded,
                "step_s": step,
                "handoff_s": to_decoded - step,
                "first_token_s": done.user[0] - done.sent_at,
                "second_token_s": done.user[1] - done.sent_at,
                "copy_s": copies.seconds,
                "copy_after_prompt_s": copies.unhidden_s,
                "copy_bytes_per_s": copies.num_bytes / copies.seconds,
            }
        )
    return rows


def report(rows: Sequence[Row], against: str) -> str:
    """What idle systems take; a table for each length."""
    names = list(dict.fromkeys(row["system"] for row in rows))
    of = {name: [row for row in rows if row["system"] == name] for name in names}
    idle = {n: [r["idle_cores"] for r in of[n] if "idle_cores" in r] for n in names}
    lines = ["", "nothing asked", *table({"cores taken, of 2": idle}, against)]
    for length in sorted({row["length"] for row in rows if "length" in row}):
        group = {n: [r for r in of[n] if r.get("length") == length] for n in names}
        num_bytes = next(r["bytes"] for found in group.values() for r in found)
        counts = ", ".join(f"{name} {len(found)}" for name, found in group.items())
        figures = {
            f"{label}, {unit}": {n: [r[key] * factor for r in group[n]] for n in names}
            for key, (label, factor, unit) in FIGURES.items()
        }
        lines += [
            "",
            f"prompts of {length} tokens, {num_bytes / 1e6:.1f} MB of KV, one at a time; "
            f"median (least–most) of: {counts}",
            *table(figures, against),
        ]
    return "\n".join(lines)
