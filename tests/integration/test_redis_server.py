"""The embedded Redis: found, started, and gone with whoever started it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from common.errors import ConfigError, ResourceError
from common.settings.config import RedisSettings
from common.store import server as redis_server
from common.store.client import RedisClient
from common.store.server import EmbeddedRedis, ServerBinary, find_binary
from tests.support.redis import wait_until


async def test_the_client_sees_the_version_the_binary_told() -> None:
    with EmbeddedRedis() as server:
        client = RedisClient(RedisSettings(url=server.url))
        info = await client.open()
        await client.close()
        assert f"{info.kind} {info.version}" == server.binary.version
        assert info.eviction == "noeviction"


def test_the_folder_is_private_and_goes_with_the_server() -> None:
    with EmbeddedRedis() as server:
        folder, pid = server._folder, server.pid
        assert os.stat(folder).st_mode & 0o077 == 0
    assert not Path(folder).exists()
    assert not psutil.pid_exists(pid)
    server.stop()  # a second time does nothing


async def test_nobody_gets_in_without_the_password_which_no_process_list_shows() -> None:
    with EmbeddedRedis() as server:
        stranger = RedisClient(RedisSettings(url=f"redis://127.0.0.1:{server.port}/0"))
        with pytest.raises(ConfigError, match="Redis refuses the credentials"):
            await stranger.open()
        await stranger.close()
        password = urlsplit(server.url).password
        assert password
        assert len(password) >= 32
        assert password not in " ".join(psutil.Process(server.pid).cmdline())
        assert files_with(password, server._folder) == {"redis.conf": 0o600}
        server.restart()
        client = RedisClient(RedisSettings(url=server.url))
        await client.open()  # the same address, and the same password
        await client.close()


def files_with(text: str, folder: str) -> dict[str, int]:
    """Names and modes of the files in which it stands."""
    found = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {p.name: p.stat().st_mode & 0o777 for p in found if text in p.read_text()}


def test_two_servers_have_two_passwords() -> None:
    assert len({urlsplit(EmbeddedRedis().url).password for _ in range(3)}) == 3


def test_a_binary_on_the_path_comes_before_a_carried_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # this machine may have one
    carried = find_binary()
    fake = tmp_path / "redis-server"
    fake.write_text("#!/bin/sh\necho 'Redis server v=7.4.1 sha=0'\n")
    fake.chmod(0o755)
    assert find_binary() == ServerBinary(str(fake), "redis 7.4.1", "on the PATH")
    fake.write_text("#!/bin/sh\nexit 1\n")
    assert find_binary() == carried


def test_without_any_binary_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server, "_candidates", list)
    with pytest.raises(ResourceError, match="PDQ_REDIS_URL"):
        find_binary()


def test_a_server_that_cannot_start_says_why() -> None:
    server = EmbeddedRedis(options=("--maxmemory-policy", "nonsense"))
    with pytest.raises(ResourceError, match="did not start"):
        server.start()


def a_process_with_a_server() -> subprocess.Popen[str]:
    program = (
        "import sys\n"
        "from common.store.server import EmbeddedRedis\n"
        "server = EmbeddedRedis()\n"
        "server.start()\n"
        "print(server.pid, server._folder, flush=True)\n"
        "sys.stdin.read()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no PR_SET_PDEATHSIG")
async def test_the_server_dies_with_a_parent_that_is_killed() -> None:
    parent = a_process_with_a_server()
    assert parent.stdin is not None
    assert parent.stdout is not None
    pid, folder = parent.stdout.readline().split()
    child = psutil.Process(int(pid))
    assert child.is_running()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()

    def gone() -> bool:  # a zombie where nobody waits for orphans
        return not child.is_running() or child.status() == psutil.STATUS_ZOMBIE

    await wait_until(gone, "the server is gone")
    shutil.rmtree(folder)
