"""The process of `pdq distill`. An error is one line and exit code 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich.console import Console

from common.errors import PdqError
from common.settings.config import DistillSettings, load


def main(argv: Sequence[str] | None = None) -> int:
    try:
        settings = load(
            DistillSettings, sys.argv[1:] if argv is None else argv, os.environ, program="pdq distill"
        )
        # Torch comes in here, where an interruption is one line, too.
        from common.distill.display import Display
        from common.distill.distillation import distill
        from common.distill.stop import Stop

        stop = Stop()
        stop.take_signals()
        out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        distill(settings, Display(out), stop)
    except PdqError as error:
        print(f"pdq distill: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pdq distill: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
