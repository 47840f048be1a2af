"""The first run on a machine that has nothing: no compiler, no root, no network, no cache.

That the kernels are compiled without a compiler, tests/integration/test_kernel_cache.py shows with one of
them; all of them take half a minute.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.engine.devices.cpu import numba_runtime

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534

# In a network namespace of its own, with loopback only; as a user without rights; and with an empty
# PATH. The user is one of a user namespace, so that the files of this one can be read.
PROGRAM = """
import fcntl, json, os, re, signal, socket, struct, subprocess, sys
import httpx

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
    UP, GET, SET = 1, 0x8913, 0x8914
    request = struct.pack("16sh14x", b"lo", 0)
    flags = struct.unpack("16sh14x", fcntl.ioctl(control, GET, request))[1]
    fcntl.ioctl(control, SET, struct.pack("16sh14x", b"lo", flags | UP))
assert [name for _, name in socket.if_nameindex()] == ["lo"]
serve = subprocess.Popen(
    [
        {unshare!r}, "--user", "--map-user={user}", sys.executable, "-m", "common.cli", "serve",
        "--port", "0", "--num-kv-blocks", "256", "--unified", "1",
    ],
    stdout=subprocess.PIPE, text=True,
)
said, found = [], None
try:
    for line in serve.stdout:
        said.append(line)
        found = re.search(r"is served at (\\S+)", line) or found
        if found:
            break
    body = {{"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}}
    answer = httpx.post(found[1] + "/v1/completions", json=body, timeout=60).json()
finally:
    serve.send_signal(signal.SIGINT)
    rest, _ = serve.communicate(timeout=60)
print(json.dumps({{"answer": answer, "code": serve.returncode, "said": said}}))
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("cache", ["kernels", pytest.param("nothing", marks=pytest.mark.slow)])
def test_no_compiler_no_root_no_network_no_cache(tmp_path: Path, cache: str) -> None:
    unshare = shutil.which("unshare") or "unshare"
    lonely = [unshare, "--user", "--map-root-user", "--net"]
    nested = [*lonely, unshare, "--user", f"--map-user={NOBODY}", "true"]
    if not os.path.exists(unshare) or subprocess.run(nested, check=False).returncode:
        pytest.skip("this user may not make user and network namespaces (unshare)")
    if cache == "kernels":
        kept = Path(numba_runtime.numba.config.CACHE_DIR)
        shutil.copytree(kept, tmp_path / ".cache" / "pdq" / kept.name)
    program = PROGRAM.format(unshare=unshare, user=NOBODY)
    environment = {
        "PATH": str(tmp_path / "empty"),
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [*lonely, sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["code"] == 0
    assert result["answer"]["usage"]["completion_tokens"] > 0
    compiled = [line for line in result["said"] if line.split()[1:2] == ["compiling"]]
    assert bool(compiled) == (cache == "nothing")


@pytest.mark.slow  # `make test` is installed in the same way, and test_readme.py serves with it
def test_it_installs_into_an_environment_that_is_there(tmp_path: Path) -> None:
    """`pip install -e .`, and both entry points work from anywhere."""
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if not name.startswith(("tests/", "bench/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    environment = tmp_path / "environment"
    make = [sys.executable, "-m", "venv", "--without-pip", str(environment)]
    subprocess.run(make, check=True, timeout=120)
    python = environment / "bin" / "python"
    # What is there already: everything that this Python has, but not pdq itself.
    site = subprocess.run(
        [str(python), "-c", "import site; print(site.getsitepackages()[0])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    Path(site, "there_already.pth").write_text(f"{ours}\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--editable",
            str(source),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("pip reaches no index here, and the build needs setuptools")
    assert done.returncode == 0, done.stderr
    for command in (["pdq", "--version"], ["pdq", "serve", "--help"]):
        said = subprocess.run(
            [str(environment / "bin" / command[0]), *command[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert said.returncode == 0, said.stderr
    where = subprocess.run(
        [str(python), "-c", "import common; print(common.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert where.startswith(str(source))
