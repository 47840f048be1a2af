"""A real engine in a scripted node."""

from __future__ import annotations

from tests.support.scripted_node import engine, node

__all__ = ["engine", "node"]
