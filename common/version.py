"""Which version of pdq this is."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    try:
        return metadata.version("pdq")
    except metadata.PackageNotFoundError:
        return "(not installed)"
