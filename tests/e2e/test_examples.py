"""deploy/examples, as a person would run them; scale_and_watch.sh is run by test_compose.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.serve_process import ROOT, ServeProcess

EXAMPLES = ROOT / "deploy" / "examples"
RUN_HERE = {"complete_with_curl.sh", "complete_with_openai.py"}
RUN_BY_COMPOSE = {"scale_and_watch.sh"}


def said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_run() -> None:
    found = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert found == RUN_HERE | RUN_BY_COMPOSE


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on the PATH")
def test_curl(served: ServeProcess) -> None:
    whole, *events = said(str(EXAMPLES / "complete_with_curl.sh"), served.url()).splitlines()
    text = json.loads(whole)["choices"][0]["text"]
    chunks = [line.removeprefix("data: ") for line in events if line]
    assert chunks[-1] == "[DONE]"
    streamed = [json.loads(chunk)["choices"] for chunk in chunks[:-1]]
    assert "".join(choices[0]["text"] for choices in streamed if choices) == text != ""


def test_openai(served: ServeProcess) -> None:
    lines = said(sys.executable, str(EXAMPLES / "complete_with_openai.py"), served.url())
    assert lines.startswith("model: pdq-5m\n")
    assert len(lines.splitlines()) >= 5


def test_scripts_are_executable() -> None:
    for path in Path(EXAMPLES).glob("*.sh"):
        assert path.stat().st_mode & 0o111, path
