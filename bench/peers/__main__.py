"""What a user would pick instead, beside ours, on one machine in one run: `python -m bench.peers COMMAND`.

    install PEER FOLDER                an environment for a peer, with pinned versions
    loads vllm=PYTHON …                every server over HTTP under the same loads (`make bench-peers`)
    rates vllm=PYTHON …                latency and goodput over the request rate, with plots
    handoff --vllm-python PYTHON …     vLLM's handoff over NIXL beside ours, prompt by prompt

PYTHON is the python of the peer's environment, such as FOLDER/bin/python. Each has --help. All systems get
the 0.5B body in bf16 with random weights, and take turns: while one is measured the others take no CPU. Rows
of several runs add up in the file that --json names.
"""

from __future__ import annotations

import signal
import sys

from bench.peers import compare_handoffs, compare_loads, compare_rates, install

COMMANDS = {
    "install": install.main,
    "loads": compare_loads.main,
    "rates": compare_rates.main,
    "handoff": compare_handoffs.main,
}


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every process is ended
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0)
    if name not in COMMANDS:
        raise SystemExit(f"{name} is not one of {', '.join(COMMANDS)}")
    COMMANDS[name](sys.argv[2:])


if __name__ == "__main__":
    main()
