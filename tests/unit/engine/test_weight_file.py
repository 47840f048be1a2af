"""A safetensors file is read as the library reads it, and a damaged one is an error that names it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.engine.model.weight_file import MAX_HEADER_BYTES, WeightFile
from common.errors import CheckpointError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "ids": torch.arange(3),
    "none": torch.zeros(0, 7),
    "scalar": torch.tensor(2.0),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def opened(path: Path) -> WeightFile:
    file = WeightFile(path)
    file.close()
    return file


def refused(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as raised:
        opened(path)
    return raised.value


def library_takes(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return bool(file.keys() or True)
    except (SafetensorError, OSError, ValueError):
        return False


def is_refused(path: Path) -> bool:
    """As a file, or any of its tensors when it is asked for."""
    try:
        file = opened(path)
    except CheckpointError as error:
        return error.param == str(path)
    return any(tensor.kind not in {"F32", "BF16", "I64"} for tensor in file.tensors.values())


def write(path: Path, header: Any, content: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_every_tensor_is_found_with_its_bytes(path: Path) -> None:
    file = WeightFile(path)
    assert set(file.tensors) == set(TENSORS)
    for name, expected in TENSORS.items():
        tensor = file.tensors[name]
        assert tensor.shape == tuple(expected.shape)
        read = bytearray(tensor.num_bytes)
        tensor.read(0, memoryview(read))
        assert bytes(read) == expected.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        if tensor.num_bytes:
            tensor.read(tensor.num_bytes - 1, memoryview(read)[:1])
            assert read[0] == read[-1]
    file.close()


def changed(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


DAMAGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "a hole": changed("b", data_offsets=[59, 69]),
    "an overlap": changed("a", data_offsets=[0, 48]),
    "beyond the end": changed("a", data_offsets=[0, 2**40]),
    "backwards": changed("a", data_offsets=[48, 0]),
    "three offsets": changed("a", data_offsets=[0, 1, 2]),
    "negative": changed("a", data_offsets=[-48, 0]),
    "beyond 64 bits": changed("a", data_offsets=[0, 2**70]),
    "another shape": changed("a", shape=[3, 5]),
    "a shape beyond all memory": changed("a", shape=[2**62] * 30),
    "sizes without end": changed("a", shape=[2] * 200_000),
    "a size that is true": changed("a", shape=[True, 12]),
    "a size that is a fraction": changed("a", shape=[3.0, 4]),
    "no shape": lambda header: header["a"].pop("shape"),
    "a dtype that is none": changed("a", dtype=4),
    "a list for a tensor": lambda header: header.update(a=[]),
    "remarks that are no text": changed("__metadata__", format=1),
    "a tensor too few": lambda header: header.pop("a"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_header_that_lies_is_refused(path: Path, damage: str) -> None:
    header, content = parts(path)
    DAMAGES[damage](header)
    write(path, header, content)
    assert not library_takes(path)
    assert refused(path).param == str(path)


@pytest.mark.parametrize(
    "header", [b"", b"{", b"[]", b"\xff{}", b'{"a":1,"a":1}', b"{}{}", b"[" * 10_000, b'{"a":NaN}']
)
def test_a_header_that_is_none_is_refused(path: Path, header: bytes) -> None:
    write(path, header, b"")
    assert not library_takes(path)
    assert refused(path).param == str(path)


def test_a_header_longer_than_any_is_not_read(path: Path) -> None:
    with path.open("r+b") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)
    assert "are read at most" in str(refused(path))


def test_what_the_library_refuses_is_refused_here(path: Path) -> None:
    """Damaged files: bytes changed, cut off, put in."""
    chance, original = random.Random(5), path.read_bytes()
    begin = 8 + int.from_bytes(original[:8], "little")
    both = 0
    for _ in range(600):
        data = bytearray(original)
        for _ in range(chance.choice((1, 1, 2))):
            at = chance.randrange(begin)
            kind = chance.choice(("digit", "byte", "cut", "put in"))
            if kind == "byte":
                data[at % len(data)] = chance.randrange(256)
            elif kind == "digit":
                digits = [i for i in range(8, min(begin, len(data))) if data[i : i + 1].isdigit()]
                data[chance.choice(digits)] = ord(chance.choice("0123456789"))
            elif kind == "cut":
                del data[-chance.randrange(1, 9) :]
            else:
                data[at:at] = b"0"
        path.write_bytes(data)
        if library_takes(path):
            both += 1
            continue
        assert is_refused(path), bytes(data[:begin])
    assert both > 20


def test_a_file_that_becomes_shorter_is_an_error_that_names_the_tensor(path: Path) -> None:
    """Mapped, it would be the end of the process."""
    file = WeightFile(path)
    os.truncate(path, path.stat().st_size - 4)
    last = max(file.tensors.values(), key=lambda tensor: tensor.offset)
    with pytest.raises(CheckpointError, match="the file has become shorter") as raised:
        last.read(0, memoryview(bytearray(last.num_bytes)))
    assert raised.value.param == last.name
    file.close()


def test_a_disk_that_fails_is_an_error_that_names_the_tensor(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = WeightFile(path)

    def fails(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error") as raised:
        file.tensors["a"].read(0, memoryview(bytearray(4)))
    assert raised.value.param == "a"
    file.close()


def test_a_disk_that_gives_little_at_a_time_is_asked_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, real = WeightFile(path), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:3]], offset))
    read = bytearray(48)
    file.tensors["a"].read(0, memoryview(read))
    assert bytes(read) == TENSORS["a"].numpy().tobytes()
    file.close()


def test_writing_over_a_file_changes_no_model_that_was_loaded(path: Path) -> None:
    file, read = WeightFile(path), bytearray(48)
    file.tensors["a"].read(0, memoryview(read))
    path.write_bytes(bytes(path.stat().st_size))
    assert bytes(read) == TENSORS["a"].numpy().tobytes()
    file.close()
