"""Opening a link: whether both ends serve the same model, and which transport carries the bytes.

Owns the comparison of fingerprints and the choice of a transport. A transport is chosen because its
reading end has just been opened with the proof in Hello (shm: the descriptor came through a socket of
this host and user, with the nonce; tcp: the source answered an empty pull), never by host names. The
hello side opens one transport at a time, and tries the next when the peer refuses it. `pdq nodes` shows
why each earlier one was not taken.

Where block sizes differ, the reader converts (transports/converting.py). Where draft models differ, or one
end has none, the reader leaves the draft's part of a slab behind. The link's reason says so.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence

from common.errors import FingerprintMismatch, PdqError
from common.kv_layout import Fingerprint, Mismatch
from common.wire.messages import Hello, Refuse, Welcome
from kv_transfer.transports.base import Opener, Reader, Target
from kv_transfer.transports.converting import ConvertingReader
from kv_transfer.transports.seam import guarded

_LONGEST_VALUE = 1000  # characters that a refusal repeats
_LONGEST_NAME = 100  # characters of a draft model's name that a link's reason repeats
_NOTHING: Mapping[str, str] = types.MappingProxyType({})
MOST_POSITIONS = 1024  # in a block of a peer: a scratch slab must hold that many


def hello(
    link: str,
    node: str,
    fingerprint: Fingerprint,
    slab_bytes: int,
    proofs: Mapping[str, bytes],
    *,
    then: Sequence[str] = (),
    tried: Sequence[str] = (),
) -> Hello:
    """The sending node's first message. `proofs` are by transport; `then` names the transports to try
    after it, `tried` says why earlier ones failed."""
    why = tuple(reason[:_LONGEST_VALUE] for reason in tried)
    return Hello(link, node, fingerprint, slab_bytes, (*proofs, *then), dict(proofs), why)


def answer(
    hello: Hello,
    node: str,
    fingerprint: Fingerprint,
    target: Target,
    openers: Mapping[str, Opener],
    *,
    credits: int,
    failed: Mapping[str, str] = _NOTHING,
) -> tuple[Welcome | Refuse, Reader | None]:
    """The receiving node's answer, with the open reader of the chosen transport. Blocking.

    `failed` names transports that failed with this peer recently, and how. They are chosen only where
    there is no other.
    """
    if differs := _compare(hello, fingerprint, target):
        mine, yours = differs.mine[:_LONGEST_VALUE], differs.yours[:_LONGEST_VALUE]
        return Refuse(hello.link, node, differs.field, mine, yours), None
    target = target_for(hello, fingerprint, target)
    converts = hello.fingerprint.block_size != fingerprint.block_size
    reasons: list[str] = []
    for transport in hello.transports:
        if transport not in hello.proofs:
            continue  # its turn may come
        if transport not in openers:
            reasons.append(f"{transport}: this end does not have it")
        elif transport in failed and _has_another(hello, openers, failed):
            reasons.append(f"{transport}: it failed before: {failed[transport]}")
        else:
            try:
                reader = guarded(transport, _open, openers[transport], hello, transport, target, converts)
            except PdqError as error:
                reasons.append(f"{transport}: {error}")
                continue
            why = "; ".join((*hello.tried, *reasons))[:_LONGEST_VALUE]
            why = why or f"{transport} is the fastest that both ends have"
            reason = "; ".join(filter(None, (why, reader.remark, *remarks(hello, fingerprint))))
            return Welcome(hello.link, node, transport, reason, credits), reader
    return no_transport(hello, node, ",".join(openers), "; ".join(reasons)), None


def _open(opener: Opener, hello: Hello, transport: str, target: Target, converts: bool) -> Reader:
    proof = hello.proofs[transport]
    if converts:
        return ConvertingReader.open(opener, hello.link, proof, target, hello.fingerprint.block_size)
    return opener(hello.link, proof, target)


def _has_another(hello: Hello, openers: Mapping[str, Opener], failed: Mapping[str, str]) -> bool:
    """Whether the peer has an untried transport that may work."""
    return any(
        name in openers and name not in failed for name in hello.transports if name not in hello.proofs
    )


def no_transport(hello: Hello, node: str, mine: str, why: str) -> Refuse:
    """Refuse the link: none of this end's transports (`mine`) works, and `why`."""
    why = why or "none offered"
    return Refuse(hello.link, node, "transport", mine[:_LONGEST_VALUE], why[:_LONGEST_VALUE])


def target_for(hello: Hello, mine: Fingerprint, target: Target) -> Target:
    """`target`, or the part of it that a peer with another draft model fills."""
    if hello.fingerprint.draft == mine.draft:
        return target
    return target.without_draft(hello.slab_bytes)


def remarks(hello: Hello, mine: Fingerprint) -> list[str]:
    """What a link says of ends that differ in what each node may choose."""
    theirs, said = hello.fingerprint, []
    if theirs.block_size != mine.block_size:
        said.append(
            f"blocks of {theirs.block_size} positions are converted to {mine.block_size}, "
            "delta is off: every block is sent"
        )
    if theirs.draft != mine.draft:
        drafts = [name[:_LONGEST_NAME] or "no draft model" for name in (theirs.draft, mine.draft)]
        said.append(f"a draft model's KV is not sent: {drafts[0]} there, {drafts[1]} here")
    return said


def _compare(hello: Hello, mine: Fingerprint, target: Target) -> Mismatch | None:
    """Why this node cannot read the hello side's KV."""
    block_size = hello.fingerprint.block_size
    if differs := mine.mismatch(hello.fingerprint):
        return differs
    if not 1 <= block_size <= MOST_POSITIONS:
        return Mismatch("block_size", f"1 to {MOST_POSITIONS}", str(block_size))
    if hello.fingerprint.draft != mine.draft:  # how long its draft's part is only the peer knows
        slab_bytes = target.layout.without_draft.with_block_size(block_size).slab_bytes
        fits, wanted = hello.slab_bytes >= slab_bytes, f"{slab_bytes} or more"
    else:
        slab_bytes = target.layout.with_block_size(block_size).slab_bytes
        fits, wanted = hello.slab_bytes == slab_bytes, str(slab_bytes)
    return None if fits else Mismatch("slab_bytes", wanted, str(hello.slab_bytes))


def mismatch(refuse: Refuse) -> FingerprintMismatch:
    """The error that the sending node raises for a Refuse."""
    return FingerprintMismatch(
        f"{refuse.node} refuses the link: {refuse.field} is {refuse.mine!r} there and "
        f"{refuse.yours!r} here; start both with the same model, version and settings",
        param=refuse.field,
    )
