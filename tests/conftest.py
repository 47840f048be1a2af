"""Fixtures that every test may name, and the order of the tests.

The fixtures live in tests/support, one file per subject.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from common.node.__main__ import OMP_SPIN
from tests.support.docker import docker_ahead
from tests.support.redis import redis_client, redis_server

__all__ = ["docker_ahead", "redis_client", "redis_server"]

# Where the processes of this run, and its own buses, find their key.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="pdq-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

# As in nodes, and before torch is imported: here, too, others have the cores.
os.environ.setdefault("GOMP_SPINCOUNT", OMP_SPIN)

# Those that keep one core busy come first: what takes the other one meanwhile is `docker_ahead`.
# Whole systems, which need both, come when that is done.
LAST = ("e2e", "docker", "faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    kind = "docker" if item.get_closest_marker("docker") else folder
    return LAST.index(kind) if kind in LAST else -1
