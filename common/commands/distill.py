"""`pdq distill TARGET`: settings and output are checked here, and then this process becomes the one that
distils (`python -m common.distill`): the command line knows no engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from common.settings.config import DistillSettings, load


def main(argv: Sequence[str]) -> int:
    if argv and not argv[0].startswith("-"):
        argv = ["--model", *argv]
    load(DistillSettings, argv, os.environ, program="pdq distill")
    os.execv(sys.executable, [sys.executable, "-m", "common.distill", *argv])
