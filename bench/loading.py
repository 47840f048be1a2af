"""How long weights take to load, and what memory that takes: `python -m bench.loading FOLDER`.

Of a checkpoint whose files are in the page cache, on the CPU, packed as its products want them; each load in
a process of its own. With `--beside`, another checkout is measured in turn with this one, and the last line
is this one's time over the other's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]
LOAD = """
import json, sys, time
from common.engine.runner import loading
from common.engine.runner.model_runner import ModelRunner
from common.settings.config import EngineSettings
load_model, found = loading.load_model, {}
def timed(*arguments):
    begun = time.perf_counter()
    model = load_model(*arguments)
    found["seconds"] = time.perf_counter() - begun
    status = dict(line.split(":") for line in open("/proc/self/status"))
    found.update({name: int(status[name].split()[0]) >> 10 for name in ("VmHWM", "RssAnon", "RssFile")})
    return model
loading.load_model = timed
ModelRunner(EngineSettings(model=sys.argv[1], dtype=sys.argv[2], num_kv_blocks=16, device="cpu"))
print(json.dumps(found))
"""


def load(checkout: Path, folder: Path, dtype: str) -> dict[str, float]:
    process = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), dtype],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, float] = json.loads(process.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.loading",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="of the checkpoint")
    parser.add_argument("--beside", type=Path, help="folder of another checkout")
    parser.add_argument("--dtype", default="bfloat16", help="to compute in")
    parser.add_argument("--loads", type=int, default=3, help="of each, after one that does not count")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    checkouts = [HERE, *([arguments.beside.resolve()] if arguments.beside else [])]
    found: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
    for number in range(1 + arguments.loads):
        for checkout in checkouts:
            measured = load(checkout, folder, arguments.dtype)
            if number:
                found[checkout].append(measured)
    print(f"{os.cpu_count()} cores, {size / 1e6:.0f} MB of weights, computed in {arguments.dtype}\n")
    print("checkout     load   rate      highest  then: own  of files")
    medians = []
    for checkout, loads in found.items():
        seconds = statistics.median(one["seconds"] for one in loads)
        medians.append(seconds)
        one = loads[-1]
        name = "this" if checkout == HERE else "other"
        print(
            f"{name:8s} {seconds:6.2f} s  {size / seconds / 1e9:.2f} GB/s  {one['VmHWM']:6.0f} MiB  "
            f"{one['RssAnon']:5.0f} MiB  {one['RssFile']:4.0f} MiB"
        )
    if len(medians) == 2:
        print(f"\nratio {medians[0] / medians[1]:.2f}")


if __name__ == "__main__":
    main()
