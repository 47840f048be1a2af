"""How long a start takes, from no compiled kernels and from all of them: `python -m bench.start`.

Starts `pdq serve` with the model that ships, first with an empty home, then again with what that left, and
measures until it serves; `cpu` is what all its processes took together, and the time to end them. With
`--beside`, another checkout is measured in turn with this one, and the last column is this one's time over
the other's. Kernels are counted as `pdq serve` shows them; a checkout that does not show them has none.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parents[1]
DEPLOYMENTS = {"1 unified": ("--prefill", "0", "--decode", "0", "--unified", "1"), "1P1D": ()}


@dataclasses.dataclass(frozen=True)
class Start:
    seconds: float
    cpu_seconds: float
    kernels: int


def start(checkout: Path, home: Path, flags: tuple[str, ...]) -> Start:
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "common.cli", "serve", "--port", "0", "--num-kv-blocks", "256", *flags],
        cwd=checkout,
        env=os.environ | {"HOME": str(home), "PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    seconds, kernels = float("nan"), 0
    assert process.stdout is not None
    for line in process.stdout:
        kernels += " compiling " in line and "(kernel " in line
        if " is served at " in line:
            seconds = time.monotonic() - begun
            break
    process.send_signal(signal.SIGINT)
    process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Start(seconds, spent, kernels)


def median(starts: list[Start]) -> Start:
    return Start(
        statistics.median(one.seconds for one in starts),
        statistics.median(one.cpu_seconds for one in starts),
        max(one.kernels for one in starts),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--beside", type=Path, help="folder of another checkout")
    parser.add_argument("--cold", type=int, default=1, help="starts without compiled kernels, of each")
    parser.add_argument("--warm", type=int, default=3, help="starts with them, of each")
    arguments = parser.parse_args()
    checkouts = [HERE, *([arguments.beside.resolve()] if arguments.beside else [])]
    print(f"{os.cpu_count()} cores\n")
    print("deployment  kernels    checkout      until it serves       cpu  compiled  ratio")
    for name, flags in DEPLOYMENTS.items():
        found: dict[tuple[str, Path], list[Start]] = {}
        for checkout in checkouts * arguments.cold:
            with tempfile.TemporaryDirectory(prefix="bench-start-") as home:
                found.setdefault(("none", checkout), []).append(start(checkout, Path(home), flags))
                for _ in range(arguments.warm):
                    found.setdefault(("compiled", checkout), []).append(start(checkout, Path(home), flags))
        for state in ("none", "compiled"):
            other = median(found[state, checkouts[-1]]).seconds
            for checkout in reversed(checkouts):
                one = median(found[state, checkout])
                whose = "this one" if checkout == HERE else "the other"
                print(
                    f"{name:<11} {state:<10} {whose:<10} {one.seconds:15.1f} s {one.cpu_seconds:10.1f} s"
                    f" {one.kernels:9} {one.seconds / other:6.2f}"
                )


if __name__ == "__main__":
    main()
