"""A docker engine for tests, the images that they build on, and one deployment by compose.

Owns: finding an engine, or starting one of our own (as root, where `dockerd` is installed), and
taking away whatever was made with it. Where images cannot be pulled, the base image is made with
`debootstrap` from the same archive that this machine's apt uses, and the wheels that the build
needs come from wherever this machine's pip takes them.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ENGINE_LIMIT_S = 60.0
PULL_LIMIT_S = 120.0
BUILD_LIMIT_S = 900.0
READY_LIMIT_S = 240.0
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates,redis-tools"


class NoEngine(Exception):
    """Why no docker engine can be had here; a reason to skip."""


class Engine:
    """One docker engine and the clients that talk to it."""

    def __init__(self, host: str | None) -> None:
        self.host = host
        self.environment = dict(os.environ) | ({"DOCKER_HOST": host} if host else {})
        client = shutil.which("docker")
        if client is None:
            raise NoEngine("there is no docker client on the PATH")
        self._client = client
        self.compose_command = self._compose_command()

    def _compose_command(self) -> list[str]:
        """Compose v2 is a plugin of the client; v1, from 1.29 on, a command of its own."""
        plugin = [self._client, "compose"]
        if subprocess.run([*plugin, "version"], capture_output=True, check=False).returncode == 0:
            return plugin
        if (old := shutil.which("docker-compose")) is not None:
            return [old]
        raise NoEngine("there is neither `docker compose` nor `docker-compose`")

    def answers(self) -> bool:
        asked = [self._client, "info", "--format", "{{.ServerVersion}}"]
        done = subprocess.run(asked, env=self.environment, capture_output=True, check=False)
        return done.returncode == 0

    def run(self, *arguments: str, limit_s: float = 120.0) -> str:
        return run([self._client, *arguments], env=self.environment, limit_s=limit_s)

    def run_all(self, *arguments: str, limit_s: float = 120.0) -> str:
        """As `run`, with what goes to stderr."""
        said = [self._client, *arguments]
        done = subprocess.run(
            said, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit_s
        )
        return done.stdout.decode("utf-8", "replace")

    def has(self, image: str) -> bool:
        return bool(self.run("images", "--quiet", image).strip())


def run(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, limit_s: float = 120.0, cwd: Path = ROOT
) -> str:
    """The command's stdout; an AssertionError with all that it said if it fails."""
    done = subprocess.run(
        command,
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    said = "\n".join((done.stdout + done.stderr).splitlines()[-60:])
    assert done.returncode == 0, f"{shlex.join(command)}: exit code {done.returncode}\n{said}"
    return done.stdout


# ── The engine ───────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def docker_engine() -> Iterator[Engine]:
    """The engine that runs here, or one of our own for as long as the context lasts; `NoEngine`."""
    engine = Engine(None)
    if engine.answers():
        yield engine
        return
    if os.geteuid() != 0:
        raise NoEngine("no docker engine answers, and only root can start one")
    if shutil.which("dockerd") is None:
        raise NoEngine("no docker engine answers, and there is no dockerd to start one")
    with own_engine() as engine:
        yield engine


@contextlib.contextmanager
def own_engine() -> Iterator[Engine]:
    """A dockerd that keeps everything in one folder, which goes with it."""
    folder = Path(tempfile.mkdtemp(prefix="pdq-docker-", dir="/var/tmp"))
    host = f"unix://{folder}/socket"
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                "dockerd",
                "--host",
                host,
                "--data-root",
                str(folder / "data"),
                "--exec-root",
                str(folder / "exec"),
                "--pidfile",
                str(folder / "pid"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        engine = Engine(host)
        deadline = time.monotonic() + ENGINE_LIMIT_S
        while not engine.answers():
            if process.poll() is not None or time.monotonic() > deadline:
                words = log.read_text(errors="replace").splitlines()[-1:]
                raise NoEngine(f"dockerd does not start here: {' '.join(words)}")
            time.sleep(0.1)
        yield engine
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if (place := line.split()[1]).startswith(f"{folder}/"):  # dockerd leaves one or two
                subprocess.run(["umount", place], check=False)
        shutil.rmtree(folder)


# ── Images ───────────────────────────────────────────────────────────────────────────────────────


def images(engine: Engine, check: Callable[[], None]) -> dict[str, str]:
    """The variables of docker-compose.yml with which images can be built here: none where a
    registry can be reached. `NoEngine` where there is no base to build on. `check` is called
    between the steps, and raises where the rest is not wanted any more."""
    # Prometheus is started with a profile of its own only.
    wanted = re.findall(r"(?:BASE|REDIS)_IMAGE:-([^}]+)\}", (ROOT / "docker-compose.yml").read_text())
    published = sorted(set(wanted))
    assert len(published) == 2, published
    try:
        for name in published:
            if not engine.has(name):
                engine.run("pull", "--quiet", name, limit_s=PULL_LIMIT_S)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        check()
        bare = _debian(engine, str(error))
        check()
        base = _with_wheels(engine, bare)
        return {"BASE_IMAGE": base, "REDIS_IMAGE": bare, "BUILD_NETWORK": "host"}
    return {}


def _debian(engine: Engine, why: str) -> str:
    """A Debian with python3 and a Redis."""
    tag = "pdq-test-debian:latest"
    if engine.has(tag):
        return tag
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        raise NoEngine(f"no base image: {why.splitlines()[-1]}; and no debootstrap to make one")
    release = platform.freedesktop_os_release()
    mirror = re.search(
        rf"(https?://\S+) {release.get('VERSION_CODENAME')}/main ", run(["apt-cache", "policy"])
    )
    if release["ID"] != "debian" or mirror is None:
        raise NoEngine("no base image can be pulled, and this is no Debian to make one from")
    with tempfile.TemporaryDirectory(prefix="pdq-debian-", dir="/var/tmp") as folder:
        root = Path(folder, "root")
        run(
            [
                "debootstrap",
                "--variant=minbase",
                f"--include={PACKAGES}",
                release["VERSION_CODENAME"],
                str(root),
                mirror[1],
            ],
            limit_s=BUILD_LIMIT_S,
        )
        # The tools' package holds the server, too, under the name of one of the tools.
        (root / "usr/bin/redis-server").symlink_to("redis-check-rdb")
        for leftover in (root / "var/cache/apt/archives").glob("*.deb"):
            leftover.unlink()
        with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
            subprocess.run(
                ["docker", "import", "-", tag],
                stdin=tar.stdout,
                env=engine.environment,
                stdout=subprocess.DEVNULL,
                check=True,
                timeout=BUILD_LIMIT_S,
            )
    return tag


def _with_wheels(engine: Engine, bare: str) -> str:
    """`bare`, and in it all wheels that the build installs, from where this machine's pip would
    take them: what its settings name is mounted while they are fetched."""
    tag = "pdq-test-base:latest"
    if engine.has(tag):
        return tag
    settings, folders = _pip_settings()
    mounts = {*folders, str(ROOT / "pyproject.toml"), str(ROOT / "constraints.txt")}
    wanted = (
        "import tomllib;"
        f"project = tomllib.load(open('{ROOT}/pyproject.toml', 'rb'));"
        "print(*project['project']['dependencies'], *project['build-system']['requires'], 'wheel',"
        " sep=chr(10))"
    )
    script = "; ".join(
        [
            "set -e",
            f"python3 -c {shlex.quote(wanted)} > /requirements.txt",
            f"env {shlex.join(f'{name}={value}' for name, value in settings.items())} "
            "python3 -m pip download --quiet --only-binary=:all: --dest /wheels "
            f"--constraint {ROOT}/constraints.txt --requirement /requirements.txt",
            "printf '[global]\\nno-index = true\\nfind-links = /wheels\\n' > /etc/pip.conf",
        ]
    )
    name = f"pdq-test-{secrets.token_hex(4)}"
    volumes = [f"--volume={path}:{path}:ro" for path in sorted(mounts)]
    try:
        engine.run(
            "run",
            "--name",
            name,
            "--network",
            "host",
            *volumes,
            bare,
            "sh",
            "-c",
            script,
            limit_s=BUILD_LIMIT_S,
        )
        engine.run("commit", name, tag)
    finally:
        engine.run("rm", "--force", "--volumes", name)
    return tag


def _pip_settings() -> tuple[dict[str, str], set[str]]:
    """This machine's settings of pip, as variables; and the files and folders that they name."""
    listed = run([sys.executable, "-m", "pip", "config", "list"])
    settings: dict[str, str] = {}
    for name, value in re.findall(r"^(?:global|:env:|install|download)\.(\S+?)='(.*)'$", listed, re.M):
        settings["PIP_" + name.upper().replace("-", "_")] = value.replace("\\n", " ").strip()
    places = set()
    for word in " ".join(settings.values()).split():
        local = unquote(urlsplit(word).path) if word.startswith("file:") else word
        if local.startswith("/") and os.path.exists(local):
            # An index refers to files beside it.
            places.add(os.path.dirname(local) if word.startswith("file:") else local)
    return settings, places


# ── One deployment ───────────────────────────────────────────────────────────────────────────────


class Compose:
    """`with Compose(engine, variables) as system`: the project's own docker-compose.yml, its image
    built; `system.up()` starts it.

    At the end it is taken down, and it is an error if anything is left."""

    def __init__(self, engine: Engine, variables: Mapping[str, str]) -> None:
        self.engine = engine
        self.name = f"pdqtest{secrets.token_hex(3)}"
        self.variables = {
            "COMPOSE_PROJECT_NAME": self.name,
            "IMAGE": f"{self.name}:cpu",
            "PORT": "0",
            "HF_HUB_OFFLINE": "1",
            **variables,
        }
        self.url = ""

    def __enter__(self) -> Compose:
        try:
            self.compose("build", "gateway", limit_s=BUILD_LIMIT_S)
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        assert self.left() == {}, self.left()

    def compose(self, *arguments: str, limit_s: float = 300.0, **variables: str) -> str:
        return run(
            [*self.engine.compose_command, *arguments],
            env={**self.engine.environment, **self.variables, **variables},
            limit_s=limit_s,
        )

    def script(self, *command: str, limit_s: float = BUILD_LIMIT_S) -> str:
        """What a command prints that calls compose itself, by $COMPOSE."""
        environment = {
            **self.engine.environment,
            **self.variables,
            "COMPOSE": shlex.join(self.engine.compose_command),
        }
        return run(command, env=environment, limit_s=limit_s) or "(nothing)"

    def config(self, *profiles: str) -> dict[str, Any]:
        """The file with everything filled in, as compose itself reads it."""
        flags = [flag for profile in profiles for flag in ("--profile", profile)]
        found: dict[str, Any] = yaml.safe_load(self.compose(*flags, "config"))
        return found

    def up(self, *arguments: str, **variables: str) -> None:
        self.compose("up", "--detach", *arguments, **variables)
        self.find()

    def find(self) -> None:
        """Where the gateway is published; another place after it was made anew."""
        self.url = f"http://{self.compose('port', 'gateway', '8000').strip()}"

    def down(self) -> None:
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "40")
        if self.engine.has(f"{self.name}:cpu"):
            self.engine.run("rmi", f"{self.name}:cpu")

    def left(self) -> dict[str, str]:
        """What the engine still has of this project, by kind."""
        label = f"label=com.docker.compose.project={self.name}"
        found = {
            "containers": self.engine.run("ps", "--all", "--quiet", "--filter", label),
            "networks": self.engine.run("network", "ls", "--quiet", "--filter", label),
            "volumes": self.engine.run("volume", "ls", "--quiet", "--filter", label),
        }
        return {kind: ids for kind, ids in found.items() if ids.strip()}

    def inside(self, service: str, *command: str) -> str:
        """What a command prints that runs in the service's first container."""
        return self.compose("exec", "-T", service, *command)

    def nodes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.inside("gateway", "pdq", "nodes", "--json"))
        return found

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "--quiet", service).split()

    def logs(self) -> str:
        return "\n".join(self.compose("logs", "--no-color", "--tail", "20").splitlines()[-120:])

    def wait_ready(self, **counts: int) -> list[dict[str, Any]]:
        """Until so many nodes of each role are ready, and the gateway is; the living nodes."""
        deadline = time.monotonic() + READY_LIMIT_S
        while True:
            found = self._ready()
            roles = [node["role"] for node in found]
            if found and all(roles.count(role) == count for role, count in counts.items()):
                return found
            assert time.monotonic() < deadline, f"only {roles} are ready\n{self.logs()}"
            time.sleep(0.2)

    def _ready(self) -> list[dict[str, Any]]:
        try:
            if httpx.get(f"{self.url}/ready", timeout=5.0).status_code != 200:
                return []
            nodes = self.nodes()
        except (httpx.TransportError, AssertionError):
            self.find()
            return []
        return [n for n in nodes if n["state"] == "ready" and n["beat_age_s"] < 3]


# ── While other tests run ────────────────────────────────────────────────────────────────────────


class Ahead:
    """The engine and its images, made by a process of its own: tests that count what this one holds run
    meanwhile."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_make_ahead, args=(theirs,), name="docker-ahead")
        self._process.start()
        theirs.close()
        self._stack = contextlib.ExitStack()
        self._made: object = None

    def compose(self) -> Compose:
        """A deployment that is not up yet, once its images are there; or why they could not be made:
        `NoEngine`, or whatever failed."""
        if self._made is None:
            self._made = self._connection.recv()
        if isinstance(self._made, BaseException):
            raise self._made
        assert isinstance(self._made, tuple)
        host, variables = self._made
        return self._stack.enter_context(Compose(Engine(host), variables))

    def close(self) -> None:
        """Take everything away again. What is being made is waited for, up to its next step."""
        self._stack.close()
        self._connection.close()
        self._process.join()


def _make_ahead(connection: Connection) -> None:
    def check() -> None:
        if connection.poll():  # closed
            raise NoEngine("nobody waits for it any more")

    with contextlib.ExitStack() as stack:
        try:
            engine = stack.enter_context(docker_engine())
            variables = images(engine, check) | {"MODELS": str(ROOT / "common" / "models")}
            check()
            made: object = (engine.host, variables)
        except NoEngine as error:
            made = error
        except Exception:
            made = AssertionError(traceback.format_exc())
        with contextlib.suppress(EOFError, OSError):
            connection.send(made)
            connection.recv()


@pytest.fixture(scope="session")
def docker_ahead(request: pytest.FixtureRequest) -> Iterator[Ahead | None]:
    """None if there will be no docker tests."""
    if not any(item.get_closest_marker("docker") for item in request.session.items):
        yield None
        return
    with contextlib.closing(Ahead()) as ahead:
        yield ahead
