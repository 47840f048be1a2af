"""Fixtures that every test may name, and the order of the tests.

The fixtures live in tests/support, one file per subject.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from typing import Any

import pytest

from common.node.__main__ import OMP_SPIN
from tests.support.docker import docker_ahead
from tests.support.kernels import compile_kernels
from tests.support.redis import redis_client, redis_server
from tests.support.schedule import Schedule, arrange, needs_kernels, scope

__all__ = ["docker_ahead", "redis_client", "redis_server"]

BEGAN_WITH_SYSTEMS = pytest.StashKey[bool]()

# Where the processes of this run, and its own buses, find their key.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="pdq-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

# GPU kernels are interpreted, on tensors of the host. Before triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# As in nodes, and before torch is imported: here, too, others have the cores.
os.environ.setdefault("GOMP_SPINCOUNT", OMP_SPIN)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    arrange(items)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Schedule:
    config.option.loadscopereorder = False
    return Schedule(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where several processes run tests, one of them compiles for all."""
    if "PYTEST_XDIST_WORKER" in os.environ and needs_kernels(scope(item.nodeid)):
        compile_kernels()


@pytest.fixture(autouse=True)
def meanwhile(request: pytest.FixtureRequest) -> None:
    """Images are begun beside the first test of a process that begins with no whole system."""
    stash, is_system = request.config.stash, request.node.get_closest_marker("system") is not None
    if not stash.setdefault(BEGAN_WITH_SYSTEMS, is_system):
        request.getfixturevalue("docker_ahead")


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> None:
    """Tests that collect garbage look through what their own module made, not through torch."""
    gc.collect()
    gc.freeze()
