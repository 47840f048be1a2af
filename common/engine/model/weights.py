"""An ordinary Hugging Face checkpoint: safetensors, in one file or sharded by an index.

Owns finding, checking and reading tensors, and writing those of a small model. What is read fails by a
`CheckpointError` that names the file or the tensor; shapes are checked from the headers of all files
before one tensor is read, so that nothing is half loaded. Knows nothing of layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from common.errors import CheckpointError
from common.model_folder.weight_files import INDEX, SINGLE, weight_files

# Buffers that older versions of transformers stored, and that follow from the configuration.
_RECOMPUTED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.masked_bias$")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class TensorSource(Protocol):
    """Where a model takes its tensors from, each once."""

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor `name`, in its stored dtype; raises `CheckpointError` if it is not so."""
        ...

    def has(self, name: str) -> bool: ...


class Checkpoint:
    """The tensors of a checkpoint folder; a context manager that holds its files open."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        try:
            for path in _weight_paths(folder):
                self._open(path)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{path} is no regular file", param=str(path))
        try:
            file: Any = safe_open(path, framework="pt", device="cpu")
            file.__enter__()
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing", param=str(path)) from error
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is corrupt: {error}", param=str(path)) from error
        self._files[path] = file
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            if name in self._where:
                raise CheckpointError(f"tensor {name} is in both {self._where[name]} and {path}", param=name)
            self._where[name] = path

    def has(self, name: str) -> bool:
        return name in self._where

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `CheckpointError` for a tensor that is missing, has another shape, or has no place
        in the model: whoever trained it has computed something else with it."""
        for name, shape in shapes.items():
            self._check(name, shape)
        unused = [n for n in self._where if n not in shapes and not _RECOMPUTED.search(n)]
        if unused:
            named = ", ".join(sorted(unused)[:5])
            raise CheckpointError(
                f"no layer of this configuration takes {len(unused)} of the tensors, such as "
                f"{named}: the model is another than config.json says, or a part of it is missing "
                "here",
                param=min(unused),
            )

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._where:
            raise CheckpointError(f"tensor {name} is missing", param=name)
        path = self._where[name]
        header = self._files[path].get_slice(name)
        found = tuple(header.get_shape())
        if found != shape:
            raise CheckpointError(
                f"tensor {name} in {path} has shape {list(found)}, the configuration asks for {list(shape)}",
                param=name,
            )
        if header.get_dtype() not in _DTYPES:
            raise CheckpointError(
                f"tensor {name} in {path} has dtype {header.get_dtype()}; {', '.join(_DTYPES)} can be loaded",
                param=name,
            )

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        self._check(name, shape)
        path = self._where[name]
        try:
            tensor: torch.Tensor = self._files[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name} in {path} cannot be read: {error}", param=name) from error
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"tensor {name} in {path} has NaN or infinity", param=name)
        return tensor

    def close(self) -> None:
        for file in self._files.values():
            file.__exit__(None, None, None)
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """All tensors in one file. Raises `OSError`."""
    content = save({name: weight.contiguous() for name, weight in weights.items()}, metadata={"format": "pt"})
    (folder / SINGLE).write_bytes(content)


class RandomWeights:
    """Seeded random tensors in place of a checkpoint, for measuring cost (`--load-format dummy`)."""

    def __init__(self, seed: int, *, tied: bool, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._tied = tied
        self._dtype = dtype

    def has(self, name: str) -> bool:
        return not (self._tied and name == "lm_head.weight")

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Any shape can be made."""

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._dtype)
        tensor = torch.empty(shape, dtype=torch.float32)
        tensor.normal_(0.0, 0.02, generator=self._generator)
        return tensor.to(self._dtype)


def _weight_paths(folder: Path) -> list[Path]:
    names = weight_files(folder)
    if names == [SINGLE] and not (folder / SINGLE).exists():
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}", param=str(folder / SINGLE))
    return [folder / name for name in names]
