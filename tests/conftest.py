"""Fixtures that every test may name. They live in tests/support, one file per subject."""

from __future__ import annotations

from tests.support.redis import redis_client, redis_server

__all__ = ["redis_client", "redis_server"]
