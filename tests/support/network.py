"""Machines on one switch, made of network namespaces: their cables can be pulled and put back.

Owns: the namespaces, the bridge and the veth pairs. Nothing of it has a name outside: namespaces are
held by open descriptors, so that all of it goes with this process, also by kill -9.

    hub (the test itself, Redis, gateways)          one namespace per machine
        10.77.0.1  bridge ═══ port ─────── cable ─────── eth0  10.77.0.2, …
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

CLONE_NEWNET = 0x40000000  # linux/sched.h
HUB = "10.77.0.1"
_OWN = "/proc/thread-self/ns/net"


class NoNamespaces(Exception):
    """Namespaces cannot be made here; says why."""


class Network:
    """Use `network`. While it lasts, the thread that made it, and all that it starts, is the hub."""

    def __init__(self) -> None:
        self.addresses: dict[str, str] = {}
        self._namespaces: dict[str, int] = {}  # open descriptors
        self._hub = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        _ip("link", "set", "lo", "up")
        _ip("link", "add", "switch", "type", "bridge")
        _ip("address", "add", f"{HUB}/24", "dev", "switch")
        _ip("link", "set", "switch", "up")

    def add(self, name: str) -> None:
        """A machine with a cable to the switch."""
        number = len(self.addresses) + 2
        with ThreadPoolExecutor(1) as thread:
            self._namespaces[name] = thread.submit(_new_namespace).result()
        self.addresses[name] = f"10.77.0.{number}"
        place = f"/proc/{os.getpid()}/fd/{self._namespaces[name]}"
        _ip("link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", place)
        _ip("link", "set", f"port{number}", "master", "switch", "up")
        for command in (
            ("address", "add", f"{self.addresses[name]}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            _run(*self.at(name), "ip", *command)

    def at(self, name: str) -> tuple[str, ...]:
        """What stands before a command that is to run on this machine."""
        return ("nsenter", f"--net=/proc/{os.getpid()}/fd/{self._namespaces[name]}")

    def pull(self, name: str) -> tuple[str, ...]:
        """The command that pulls a machine's cable, whoever runs it."""
        hub = f"--net=/proc/{os.getpid()}/fd/{self._hub}"
        return ("nsenter", hub, "ip", "link", "set", self._port(name), "down")

    def put_back(self, name: str) -> None:
        _ip("link", "set", self._port(name), "up")

    def close(self) -> None:
        for descriptor in (*self._namespaces.values(), self._hub):
            os.close(descriptor)

    def _port(self, name: str) -> str:
        return "port" + self.addresses[name].rpartition(".")[2]


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Put this thread into the hub of a new network, and back at the end; `NoNamespaces`."""
    for tool in ("ip", "nsenter"):
        if shutil.which(tool) is None:
            raise NoNamespaces(f"there is no {tool} here")
    home = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            os.close(_new_namespace())
            made = Network()
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or error
            raise NoNamespaces(f"no network namespaces can be made here: {said}") from error
        with contextlib.closing(made):
            yield made
    finally:
        _call("setns", home, CLONE_NEWNET)
        os.close(home)


def _new_namespace() -> int:
    """A new one, which the calling thread is in from here on; its descriptor."""
    _call("unshare", CLONE_NEWNET)
    return os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)


def _call(function: str, *arguments: int) -> None:
    """`os.setns` and `os.unshare` came with Python 3.12."""
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
