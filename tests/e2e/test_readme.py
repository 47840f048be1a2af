"""Every command of the README does what stands there."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.readme import COMMAND, KINDS, Block, blocks, marked
from tests.support.serve_process import ROOT, ServeProcess, serving

BIN = Path(sys.executable).parent
REASONS = {
    "docker": "run by test_compose.py, on an engine",
    "network": "downloads a model",
    "gpu": "there is no GPU here",
}


def each(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", [_param(block) for block in marked(*kinds)], ids=str)


def _param(block: Block) -> Any:
    """Slow are servers in other sizes: test_same_tokens.py and test_serve.py have them without make."""
    is_slow = block.kind == "serve" and "ARGS=" in block.text
    return pytest.param(block, marks=[pytest.mark.slow] if is_slow else [])


def made(command: str) -> str:
    """`make …` without installing anything: this Python has it all."""
    installed = shlex.quote(str(BIN.parent / ".installed"))
    return command.replace("make ", f"make -o {installed} VENV={shlex.quote(str(BIN.parent))} ", 1)


def beside(served: ServeProcess, text: str) -> str:
    """The text as it would be for this server and this Python."""
    return installed(text.replace("http://127.0.0.1:8000", served.url()))


def installed(text: str) -> str:
    """With this Python's commands; `pdq` is run as a module where it is not installed."""
    if not (BIN / "pdq").exists():
        text = text.replace(".venv/bin/pdq", ".venv/bin/python -m common.cli")
    return text.replace(".venv/bin/", f"{BIN}/")


def test_every_block_of_commands_has_a_mark() -> None:
    for block in blocks():
        assert block.kind in ("", *KINDS), block
        if not block.kind:
            assert not COMMAND.match(block.text), f"line {block.line} has commands, and no mark"


@each("serve")
def test_what_starts_a_server_serves(block: Block, tmp_path: Path) -> None:
    if not (BIN / "pdq").exists():
        pytest.skip("pdq is not installed in this environment")
    for number, command in enumerate(block.commands):
        folder = tmp_path / str(number)
        folder.mkdir()
        with serving(folder, command=["sh", "-c", f"exec env PDQ_PORT=0 {made(command)}"]) as serve:
            serve.url()
            line = serve.line("^curl .*").group()
            done = subprocess.run(
                ["sh", "-c", line.replace("curl ", "curl --fail --silent --show-error ", 1)],
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            for child in serve.children.values():
                if child.is_running() and "serve" in child.cmdline():
                    child.send_signal(signal.SIGINT)
            serve.end()
        serve.assert_nothing_left()


@each("use")
def test_what_looks_at_a_server_works(block: Block, served: ServeProcess) -> None:
    for command in block.commands:
        program = shlex.split(beside(served, command), comments=True)[0]
        program = "redis-cli" if "pdq redis" in command else program
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program} here")
        done = subprocess.run(
            ["sh", "-c", beside(served, command)],
            cwd=ROOT,
            env=served.environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.strip()


@each("python")
def test_what_is_python_runs(block: Block, served: ServeProcess) -> None:
    done = subprocess.run(
        [sys.executable, "-c", beside(served, block.text)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=served.environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


PYTHON_M = ".venv/bin/python -m "
# Each of the modules as `python -m` runs it, in one process, which imports torch once for all.
HELP_OF_EACH = """
import runpy, sys
for module in sys.argv[1:]:
    sys.argv = [module, "--help"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    else:
        sys.exit(f"{module} has done more than help")
"""


@each("plan")
def test_what_takes_long_is_known(block: Block) -> None:
    shown, modules = [], []
    for command in block.commands:
        if command.startswith("make"):
            shown.append(made(command).replace("make ", "make --dry-run ", 1))
        elif command.startswith(PYTHON_M):
            modules.append(command.removeprefix(PYTHON_M).split()[0])
        else:
            shown.append(installed(command.partition("#")[0]) + " --help")
    if modules:
        shown.append(shlex.join([sys.executable, "-c", HELP_OF_EACH, *modules]))
    for text in shown:
        done = subprocess.run(
            ["sh", "-c", text],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            env=dict(os.environ),
            check=False,
        )
        assert done.returncode == 0, done.stderr


@each("docker", "network", "gpu")
def test_what_needs_more_than_this_machine(block: Block) -> None:
    pytest.skip(REASONS[block.kind])
