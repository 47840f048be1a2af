"""Which files of a folder hold the weights: one, or those that the index names, and no others.

A repository often has them a second time in another form (`consolidated.safetensors`, `original/`).
"""

from __future__ import annotations

import os
from pathlib import Path

from common.errors import CheckpointError
from common.model_folder.reading import read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX_BYTES = 2**26
MAX_NAME = 255  # of a file, on the file systems of Linux


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files of the checkpoint in `folder`, whether or not they are there.

    One file holds where there is an index too, as in transformers: it came later. Raises
    `CheckpointError` for an index that is none, or names a file outside the folder.
    """
    path = folder / INDEX
    if os.path.lexists(folder / SINGLE) or not os.path.lexists(path):
        return [SINGLE]
    weight_map = read_object(path, limit=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} is no safetensors index: it has no weight_map", param=str(path))
    for name in weight_map.values():
        if not isinstance(name, str) or not _is_a_shard(name):
            raise CheckpointError(
                f"the index {path} names the file {name!r:.100}, which is none of the checkpoint's",
                param=str(path),
            )
    return sorted(set(weight_map.values()))


def _is_a_shard(name: str) -> bool:
    """Whether it is a name without a folder, that a file can have."""
    return (
        name.endswith(".safetensors")
        and Path(name).name == name
        and "\0" not in name
        and len(name.encode()) <= MAX_NAME
    )
