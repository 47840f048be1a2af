"""What distinguishes where a `System` stands from elsewhere.

What is left out of a view, and why two states that differ only in it have the same future:
the reasons in aborts (nobody decides by them, but for spoiled blocks); numbers of blocks of the target
(which free block is taken goes by what it holds); times but for how far off they are, and only where a
timer looks at them; what a finished handoff came to. A message that cannot change anything any more is
taken off the network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.wire.message import HandoffKey
from kv_transfer import handoff, intake
from tests.support.protocol.snapshots import HASHES

if TYPE_CHECKING:
    from tests.support.protocol.system import System

LINK = "link"
ROOM = 3
GRANTED = (intake.State.RECEIVING, intake.State.COMMITTING)


def view_of(system: System) -> object:
    sending = system.source.handoff._links.get(LINK)
    receiving = system.target.intake._links.get(LINK)
    orphans = system.target.intake._orphans
    independent = system.are_independent()
    users: list[list[tuple[str, int]]] = [[] for _ in range(ROOM)]
    parts: list[object] = []
    for name, work in system.work.items():
        decoding = system.decoding.get(name)
        departure, asked = work.departure, []
        ours = [decoding.reservation] if decoding else []
        for key in system.keys[name]:
            out = None if sending is None else sending.entries.get(key)
            into = orphans.get(key) or (receiving and receiving.entries.get(key))
            answered = receiving is None or key in receiving.answers
            if into and into.reservation:
                ours.append(into.reservation)
            if out is None and into is None and answered and not work.tries:
                asked.append(None)
                continue
            asked.append(
                (
                    out and _sending(system, out, key),
                    into and _receiving(system, into),
                    answered and receiving and type(receiving.answers[key]),
                )
            )
        for reservation in ours:
            for index, block in enumerate(reservation.blocks):
                users[block].append((name, index))
        parts.append((departure.state.value, decoding is not None, *asked))
        if not work.is_over:
            parts.append(
                (
                    work.num_blocks,
                    work.status,
                    work.tries,
                    departure.announced,
                    departure.computed,
                    departure.timer is not None,
                    tuple(departure.held),
                    tuple(work.block_table),
                )
            )
    pool, source = system.target.pool, system.source
    blocks = sorted(
        (pool.content[b], pool.references[b], b"" if independent else pool.identity[b], users[b])
        for b in range(ROOM)
        if pool.references[b] or not independent
    )
    waiting = system.target.intake._waiting
    order = sorted(waiting, key=lambda key: waiting[key].order) if len(waiting) > 1 else ()
    return (
        tuple(parts),
        repr(blocks),
        tuple(key.request for key in order),
        tuple(sorted((to_source, HASHES[number]) for to_source, number in system.net)),
        LINK in source.open,
        LINK in system.target.open,
        system.target.intake._draining,
        tuple(source.pool.references),
        tuple(source.pool.generation),
        tuple((r.copy.key.request, r.copy.pieces[0].index, r.found[0][0]) for r in system.copies),
        tuple((key.request, *lease.blocks) for key, lease in source.leases._open.items()),
    )


def _sending(system: System, entry: handoff._Entry, key: HandoffKey) -> object:
    timed = entry.state in handoff.AWAITING
    return (
        entry.state.value,
        tuple(entry.ready),
        tuple(entry.wanted),
        entry.commit is not None,
        max(0.0, entry.repeat_at - system.now) if timed else 0.0,
        system.now - entry.heard_at if timed else 0.0,
        key in system.adoptions,
    )


def _receiving(system: System, entry: intake._Entry) -> object:
    waits = entry.state is intake.State.WAITING
    return (
        entry.state.value,
        tuple(sorted(entry.unannounced)),
        tuple(piece.index for piece in entry.pieces),
        entry.copy is not None,
        entry.asked,
        max(0.0, entry.deadline - system.now) if waits else 0.0,
        system.now - entry.heard_at if entry.state in GRANTED else 0.0,
    )
