"""The README's commands: its indented blocks, by the mark in the comment before each.

<!-- test: serve -->      starts a server: it must serve, and stop at Ctrl-C
<!-- test: use -->        shell, beside a running server
<!-- test: python -->     Python, beside a running server
<!-- test: plan -->       a target of the Makefile that takes long: it must be known to make
<!-- test: docker -->     run by tests/e2e/test_compose.py, on its deployment
<!-- test: network -->    downloads something
<!-- test: gpu -->        needs a GPU
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("serve", "use", "python", "plan", "docker", "network", "gpu")
MARK = re.compile(r"<!-- test: (\w+) -->")
COMMAND = re.compile(r"(make|\.venv/|docker|curl|redis-cli|pip|python3?|from|import|deploy/\S+\.sh)\b")


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """An indented block: its mark ("" without one), the line it starts in, and its text."""

    kind: str
    line: int
    text: str

    @property
    def commands(self) -> list[str]:
        """One per line, a continued line with those that continue it."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]

    def __str__(self) -> str:
        return f"{self.kind}-line{self.line}"


def blocks() -> list[Block]:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    found: list[Block] = []
    kind, number = "", 0
    while number < len(lines):
        if mark := MARK.fullmatch(lines[number].strip()):
            kind = mark[1]
        elif lines[number].startswith("    "):
            start = number
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number]):
                number += 1
            text = "\n".join(line[4:] for line in lines[start:number]).strip("\n")
            found.append(Block(kind, start + 1, text))
            kind = ""
            continue
        elif lines[number]:
            kind = ""
        number += 1
    return found


def marked(*kinds: str) -> list[Block]:
    return [block for block in blocks() if block.kind in kinds]
