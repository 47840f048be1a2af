"""The other nodes and the gateways, by the registry's records and by what links found out."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from common.kv_layout import Fingerprint
from common.store.registry import NodeRecord, NodeState, Role, Snapshot


class Peers:
    """The peers of one node, itself left out. Empty until the registry was read."""

    def __init__(self, incarnation: str, role: Role, fingerprint: Fingerprint) -> None:
        self._incarnation, self._role, self._fingerprint = incarnation, role, fingerprint
        self._snapshot = Snapshot({}, {}, "")
        self._lost: dict[str, int] = {}  # peer → beats in its record when it was given up

    def read(self, snapshot: Snapshot) -> None:
        """Replace the records."""
        self._snapshot = snapshot
        for name in self._lost.keys() - snapshot.records.keys():
            del self._lost[name]  # names are never used again

    def linked(self, peer: str) -> None:
        self._lost.pop(peer, None)

    def waited_in_vain(self, peer: str) -> None:
        """The peer was silent until that counted as death, and has no link."""
        record = self._snapshot.records.get(peer)
        self._lost[peer] = record.beats if record is not None else 0

    def is_lost(self, peer: str) -> bool:
        """Whether the peer was silent too long and its record in the registry has not moved since."""
        record = self._snapshot.records.get(peer)
        return peer in self._lost and (record is None or record.beats <= self._lost[peer])

    def is_alike(self, record: NodeRecord) -> bool:
        """Whether that node computes what this one does, bit for bit; its block size may differ."""
        return self._fingerprint.mismatch(record.fingerprint) is None

    def decoding(self, refused: AbstractSet[str]) -> list[NodeRecord]:
        """Nodes that decode and are ready, without those that `refused` and those that are lost: asking
        a lost one again would cost each choice the time until silence counts as death."""
        return [
            record
            for record in self._of_role(Role.DECODE, Role.UNIFIED)
            if record.state is NodeState.READY
            and record.incarnation not in refused
            and not self.is_lost(record.incarnation)
        ]

    def of_same_work(self) -> list[NodeRecord]:
        """Nodes of this one's role that are alike, ready or not."""
        return [record for record in self._of_role(self._role) if self.is_alike(record)]

    def gateways(self) -> list[NodeRecord]:
        return self._of_role(Role.GATEWAY)

    def _of_role(self, *roles: Role) -> list[NodeRecord]:
        others = self._snapshot.of_role(*roles)
        return [record for record in others if record.incarnation != self._incarnation]
