"""Proposers of draft tokens; the engine verifies them, so that output never depends on them."""

from common.engine.speculation.base import DraftCounts, HostProposer
from common.engine.speculation.guarded import Failures, GuardedProposer

__all__ = ["DraftCounts", "Failures", "GuardedProposer", "HostProposer"]
