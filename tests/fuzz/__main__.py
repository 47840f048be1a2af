"""Fuzz with atheris (libFuzzer), guided by coverage: `python -m tests.fuzz [TARGET…] [--seconds N]`.

Each target runs in a process of its own, and begins with one message of each kind. The exit status
says whether any failed; child.py repeats a failure.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.targets import TARGETS, seeds


def fuzz(name: str, seconds: int, corpus: Path) -> bool:
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.child",
        name,
        f"-max_total_time={seconds}",
        "-rss_limit_mb=2048",
        "-timeout=10",
        "-print_final_stats=1",
        str(corpus),
    ]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    runs = re.findall(r"number_of_executed_units: (\d+)", ended.stderr)
    covered = re.findall(r"cov: (\d+)", ended.stderr)
    well = ended.returncode == 0 and bool(runs)
    print(
        f"{name:18} {(runs or ['0'])[-1]:>9} inputs, {(covered or ['0'])[-1]:>4} branches, "
        f"{seconds} s: {'ok' if well else 'FAILED'}",
        flush=True,
    )
    if not well:
        print(ended.stderr[-4000:], flush=True)
    return well


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=300, help="for all of them together")
    arguments = parser.parse_args()
    names = arguments.targets or list(TARGETS)
    all_well = True
    with tempfile.TemporaryDirectory(prefix="pdq-fuzz-") as folder:
        for name in names:
            corpus = Path(folder, name)
            corpus.mkdir()
            for number, seed in enumerate(seeds()):
                (corpus / f"seed-{number}").write_bytes(seed)
            all_well &= fuzz(name, max(1, arguments.seconds // len(names)), corpus)
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
