"""One safetensors file: which tensors it has, and where their bytes are.

Owns the format: eight bytes with the length of a header, the header in JSON, and all tensors one after the
other (https://github.com/huggingface/safetensors, "Format"). The header is checked as the library does, for a
file may come from anybody; then bytes are read, and not mapped: what a disk does not give is an error and no
signal, and whoever writes over the file later changes nothing here. Knows no model.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from common.errors import CheckpointError
from common.model_folder.reading import is_int, open_regular, parse_object

MAX_HEADER_BYTES = 2**26  # of 100,000 tensors: 12 MB
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # that can be loaded
_BITS = {  # of those that stand beside them
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """Implements `Stored`, but for a `kind` that is not among `DTYPES`."""

    file: WeightFile
    name: str
    kind: str  # as the header says
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    num_bytes: int

    @property
    def where(self) -> str:
        return f"tensor {self.name} in {self.file.path}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.kind]

    def read(self, start: int, into: memoryview) -> None:
        self.file.read(self, start, into)


class WeightFile:
    """An open file. Raises `CheckpointError` for one that is none, or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = open_regular(path)
        try:
            try:
                self.tensors = self._read_header()
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}", param=str(path)) from error
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> dict[str, StoredTensor]:
        size = os.fstat(self._descriptor).st_size
        begin = os.pread(self._descriptor, 8, 0)
        length = int.from_bytes(begin, "little")
        if len(begin) < 8 or length > size - 8:
            raise self._corrupt("it ends within its header")
        if length > MAX_HEADER_BYTES:
            raise self._corrupt(f"a header of {length} bytes, {MAX_HEADER_BYTES} are read at most")
        header = os.pread(self._descriptor, length, 8)
        if len(header) < length:
            raise self._corrupt("it ends within its header")
        try:
            described = parse_object(self.path, header.decode())
        except (UnicodeDecodeError, CheckpointError) as error:
            raise self._corrupt(f"its header is no JSON object: {error}") from error
        remarks = described.pop("__metadata__", {})
        if not isinstance(remarks, dict) or not all(isinstance(text, str) for text in remarks.values()):
            raise self._corrupt("its __metadata__ is no object of texts")
        content = size - 8 - length
        tensors = [self._tensor(name, said, 8 + length, content) for name, said in described.items()]
        end = 8 + length
        for tensor in sorted(tensors, key=lambda one: (one.offset, one.num_bytes)):
            if tensor.offset != end:
                raise self._corrupt(f"tensor {tensor.name:.100} does not begin where the one before it ends")
            end += tensor.num_bytes
        if end != size:
            raise self._corrupt(f"it has {size} bytes, and the tensors end at {end}")
        return {tensor.name: tensor for tensor in tensors}

    def _tensor(self, name: str, said: Any, begin: int, content: int) -> StoredTensor:
        """What the header says of one; `content` bytes follow the header, which ends at `begin`."""
        if not isinstance(said, dict) or set(said) != _FIELDS:
            raise self._corrupt(f"its header says of tensor {name:.100} {said!r:.100}")
        kind, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
        if not isinstance(kind, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise self._corrupt(f"its header says of tensor {name:.100} {said!r:.100}")
        start, end = offsets
        if not start <= end <= content:
            raise self._corrupt(f"tensor {name:.100} ends at {end} of {content} bytes: the file was cut")
        bits = _BITS.get(kind)
        if bits is not None and (end - start) * 8 != _numbers(shape, content * 8) * bits:
            raise self._corrupt(f"tensor {name:.100} has {end - start} bytes, and the shape {shape!r:.100}")
        return StoredTensor(self, name, kind, tuple(shape), begin + start, end - start)

    def read(self, tensor: StoredTensor, start: int, into: memoryview) -> None:
        """Bytes of `tensor` from `start` on, as many as `into` has. Raises `CheckpointError`."""
        assert start + len(into) <= tensor.num_bytes
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self._descriptor, [into[done:]], tensor.offset + start + done)
            except OSError as error:
                raise CheckpointError(
                    f"{tensor.where} cannot be read: {error.strerror}", param=tensor.name
                ) from error
            if not count:
                raise CheckpointError(
                    f"{tensor.where} cannot be read: the file has become shorter", param=tensor.name
                )
            done += count

    def _corrupt(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is corrupt: {what}", param=str(self.path))

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(is_int(size) and 0 <= size < 2**63 for size in value)


def _numbers(shape: list[int], limit: int) -> int:
    """Their product, or some number beyond `limit` where it is larger: a header may have any sizes."""
    if 0 in shape:
        return 0
    count = 1
    for size in shape:
        count *= size
        if count > limit:
            break
    return count
