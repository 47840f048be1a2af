"""An ordinary Hugging Face checkpoint: safetensors, in one file or sharded by an index.

Owns finding and checking tensors, where a model gets them from, and writing those of a small model. What is
read fails by a `CheckpointError` that names the file or the tensor; shapes are checked from the headers of
all files before one tensor is read, so that nothing is half loaded. Knows nothing of layers, and not into
whose memory tensors are read (devices/filling.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from safetensors.torch import save
from torch import Tensor

from common.engine.devices.filling import Filler
from common.engine.model.weight_file import DTYPES, StoredTensor, WeightFile
from common.errors import CheckpointError
from common.model_folder.weight_files import INDEX, SINGLE, weight_files

# Buffers that older versions of transformers stored, and that follow from the configuration.
_RECOMPUTED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.masked_bias$")


class TensorSource(Protocol):
    """Where a model takes its tensors from, each once."""

    def has(self, name: str) -> bool: ...

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `CheckpointError` unless these are all tensors there are, and of these shapes."""
        ...

    def fill(self, name: str, shape: tuple[int, ...], place: Tensor) -> None:
        """The tensor `name` into a place as in devices/filling.py: work that is asked for afterwards finds it
        there. Raises `CheckpointError`, here or in `finish`."""
        ...

    def finish(self) -> None:
        """Everything lies in its place, and is finite."""
        ...


class Checkpoint:
    """The tensors of a checkpoint folder; a context manager that holds its files open."""

    def __init__(self, folder: Path) -> None:
        self._files: list[WeightFile] = []
        self._tensors: dict[str, StoredTensor] = {}
        try:
            for path in _weight_paths(folder):
                self._open(path)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        file = WeightFile(path)
        self._files.append(file)
        for name, tensor in file.tensors.items():
            if name in self._tensors:
                other = self._tensors[name].file.path
                raise CheckpointError(f"tensor {name} is in both {other} and {path}", param=name)
            self._tensors[name] = tensor

    def has(self, name: str) -> bool:
        return name in self._tensors

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `CheckpointError` for a tensor that is missing, has another shape, or has no place
        in the model: whoever trained it has computed something else with it."""
        for name, shape in shapes.items():
            self.stored(name, shape)
        unused = [n for n in self._tensors if n not in shapes and not _RECOMPUTED.search(n)]
        if unused:
            named = ", ".join(sorted(unused)[:5])
            raise CheckpointError(
                f"no layer of this configuration takes {len(unused)} of the tensors, such as "
                f"{named}: the model is another than config.json says, or a part of it is missing "
                "here",
                param=min(unused),
            )

    def stored(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """Raises `CheckpointError` if it is missing, or not so."""
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"tensor {name} is missing", param=name)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.where} has shape {list(tensor.shape)}, the configuration asks for {list(shape)}",
                param=name,
            )
        if tensor.kind not in DTYPES:
            raise CheckpointError(
                f"{tensor.where} has dtype {tensor.kind}; {', '.join(DTYPES)} can be loaded", param=name
            )
        return tensor

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StoredWeights:
    """Implements `TensorSource` by a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, filler: Filler) -> None:
        """Both open, the checkpoint for longer than the filler."""
        self._checkpoint, self._filler = checkpoint, filler

    def has(self, name: str) -> bool:
        return self._checkpoint.has(name)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._checkpoint.check(shapes)

    def fill(self, name: str, shape: tuple[int, ...], place: Tensor) -> None:
        self._filler.fill(place, self._checkpoint.stored(name, shape))

    def finish(self) -> None:
        self._filler.finish()


def write_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """All tensors in one file. Raises `OSError`."""
    content = save({name: weight.contiguous() for name, weight in weights.items()}, metadata={"format": "pt"})
    (folder / SINGLE).write_bytes(content)


class RandomWeights:
    """Seeded random tensors in place of a checkpoint, for measuring cost (`--load-format dummy`). They are
    made where they are wanted: other ones on a GPU than on a CPU."""

    def __init__(self, seed: int, *, tied: bool, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._tied = tied

    def has(self, name: str) -> bool:
        return not (self._tied and name == "lm_head.weight")

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Any shape can be made."""

    def fill(self, name: str, shape: tuple[int, ...], place: Tensor) -> None:
        if name.endswith("norm.weight"):
            place.fill_(1.0)
            return
        values = torch.empty(shape, dtype=torch.float32, device=place.device)
        values.normal_(0.0, 0.02, generator=self._generator)
        place.copy_(values.view(place.shape))

    def finish(self) -> None:
        """Nothing can be wrong with them."""


def _weight_paths(folder: Path) -> list[Path]:
    names = weight_files(folder)
    if names == [SINGLE] and not (folder / SINGLE).exists():
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}", param=str(folder / SINGLE))
    return [folder / name for name in names]
