"""`make test-gpu`: the most telling tests first, within a time, and what they found as JSON.

make test-gpu ARGS="--results gpu.json"
make test-gpu ARGS="--on cpu tests/gpu/test_one_reply.py"      tries the tests themselves, on a host
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ORDER = (
    "one_reply",
    "device_queue",
    "kernels",
    "gpu_products",
    "device_transports",
    "sanitizer",
    "reference_backend",
)  # test_*.py
LIMIT_S = 450.0  # no test begins later
BEGUN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write every test's outcome and figures here, as JSON")
    parser.addoption("--on", default="cuda", choices=("cuda", "cpu"), help="the device of test_one_reply.py")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--results", default=None):
        config.pluginmanager.register(Results(config.getoption("--results")))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only where these tests run by themselves: elsewhere the order is that of all tests."""
    if all("gpu" in item.path.parts for item in items):
        places = {name: place for place, name in enumerate(ORDER)}
        items.sort(key=lambda item: places.get(item.path.stem.removeprefix("test_"), len(places)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    if item.config.getoption("--on", default="cuda") == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if time.monotonic() - BEGUN > LIMIT_S:
        pytest.skip(f"{LIMIT_S:.0f} s are over")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("--on", default="cuda"))


class Results:
    """One JSON object: the machine, and for each test its outcome, seconds, why it was skipped or failed,
    and the figures that it recorded (`record_property`). Written after each test: a crash costs one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        on_gpu = torch.cuda.is_available()
        self._report: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "host",
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "tests": {},
        }

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        entry = {
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            **dict(report.user_properties),
        }
        if report.outcome != "passed":
            entry["why"] = str(report.longreprtext or report.longrepr)[-2000:]
        self._report["tests"][report.nodeid] = entry
        self._path.write_text(json.dumps(self._report, indent=2) + "\n")
