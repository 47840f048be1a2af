"""Rules of the house that no other tool holds: one door per dependency, no torch on the floor."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "kv_transfer", "prefill_node", "decode_node", "gateway")

DOORS = {
    "redis": {"common/store/client.py"},
    "zmq": {"common/wire/bus.py", "kv_transfer/transports/tcp_frames.py"},
    "msgpack": {"common/wire/codec.py"},
    "xxhash": {"kv_transfer/digests.py"},
    "nixl": {"kv_transfer/transports/nixl.py"},
    "huggingface_hub": {"common/model_files.py"},
    "flashinfer": {"common/engine/devices/cuda/flashinfer.py"},
    "safetensors": {"common/engine/model/weights.py"},
    "prometheus_client": {"common/metrics.py"},
    "h11": {"gateway/connection.py", "common/metrics_server.py"},
    "pickle": set(),
    "marshal": set(),
    "transformers": {"common/model_folder/conversion_child.py"},
}


LIBRARIES = {  # those that are loaded by name, not imported
    "libcudart": {"kv_transfer/cuda_library.py"},
    "libnccl": {"kv_transfer/nccl_library.py"},
}


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


@functools.cache
def imports_and_texts(path: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Top-level names of everything a file imports, at any depth of its code; and its string constants."""
    names: set[str] = set()
    texts: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
    return frozenset(names), frozenset(texts)


def importers(name: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in sources() if name in imports_and_texts(path)[0]}


@pytest.mark.parametrize("dependency", DOORS)
def test_a_dependency_comes_in_by_its_own_door(dependency: str) -> None:
    assert importers(dependency) == DOORS[dependency]


def test_only_the_gpu_knows_triton() -> None:
    assert importers("triton")
    allowed = ("common/engine/devices/cuda/", "kv_transfer/device_copy.py")
    assert all(path.startswith(allowed) for path in importers("triton"))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_loaded_by_its_own_door(library: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in sources()
        if any(text.startswith(library) for text in imports_and_texts(path)[1])
    }
    assert users == LIBRARIES[library]


def test_only_the_engine_and_what_trains_for_it_or_moves_its_memory_knows_torch() -> None:
    allowed = ("common/engine/", "common/distill/", "common/node/", "kv_transfer/")
    users = importers("torch")
    assert users
    assert not [user for user in users if not user.startswith(allowed)]


def test_the_environment_is_read_where_a_process_begins() -> None:
    """`os.environ` is for entry points; everything else is passed down."""
    users = {
        str(path.relative_to(ROOT))
        for path in sources()
        if re.search(r"\bos\.(environ|getenv)\b", path.read_text(encoding="utf-8"))
    }
    entries = {path for path in users if path.endswith("__main__.py")}
    assert users - entries <= {"common/cli.py", "common/settings/config.py", "common/settings/loader.py"} | {
        user for user in users if user.startswith("common/commands/")
    }
