"""Which files of a folder hold the weights: those that the index names, and no others.

A repository often has them a second time in another form (`consolidated.safetensors`, `original/`).
"""

from __future__ import annotations

from pathlib import Path

from common.errors import CheckpointError
from common.model_folder.reading import read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX_BYTES = 2**26


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files of the checkpoint in `folder`, whether or not they are there.
    Raises `CheckpointError` for an index that is none, or names a file outside the folder."""
    path = folder / INDEX
    if not path.exists():
        return [SINGLE]
    weight_map = read_object(path, limit=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{path} is no safetensors index: it has no weight_map", param=str(path)
        )
    for name in weight_map.values():
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{path} names the file {name!r:.100}, which is none of the checkpoint's",
                param=str(path),
            )
    return sorted(set(weight_map.values()))
