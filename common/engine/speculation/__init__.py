"""Proposers of draft tokens; the engine verifies them, so that output never depends on them."""

from common.engine.speculation.base import DeviceProposer, HostProposer

__all__ = ["DeviceProposer", "HostProposer"]
