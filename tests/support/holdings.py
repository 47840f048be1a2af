"""What a process holds of the machine, looked at from outside: descriptors, connections, memory.

Read from /proc while the process runs, also while it is stopped or cut off. A descriptor that
vanishes meanwhile is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

LISTEN = "0A"  # net/tcp_states.h
SHM = Path("/dev/shm")


class Place(NamedTuple):
    host: str
    port: int


class Connection(NamedTuple):
    own: Place
    peer: Place


@dataclasses.dataclass(frozen=True, slots=True)
class Holdings:
    """`descriptors`: how many, by kind ("eventfd", "unix socket", "file", …), but for those of
    `connections`. Of the memfds that are mapped, the inodes: `own` can be written, `foreign` not."""

    descriptors: Counter[str]
    connections: tuple[Connection, ...]
    own: frozenset[int]
    foreign: frozenset[int]


def holdings(pid: int) -> Holdings:
    """Of a process that runs."""
    connections: list[Connection] = []
    descriptors: Counter[str] = Counter()
    links = _links(pid)
    tcp = _tcp(pid)  # after the links: what was opened between the two counts as another socket
    for target in links:
        if (inode := _socket(target)) is None:
            descriptors[_kind(target)] += 1
        elif inode not in tcp:
            descriptors["unix socket"] += 1
        elif tcp[inode][1] == LISTEN:
            descriptors["listening socket"] += 1
        else:
            connections.append(tcp[inode][0])
    mapped = _mapped(pid)
    own = frozenset(inode for inode, writable in mapped if writable)
    foreign = frozenset(inode for inode, _ in mapped) - own
    return Holdings(descriptors, tuple(connections), own, foreign)


def shared_files() -> frozenset[str]:
    """What of ours lies in /dev/shm under a name: nothing should, ever. Others may use it, too."""
    return frozenset(name for name in os.listdir(SHM) if "pdq" in name) if SHM.exists() else frozenset()


def _links(pid: int) -> list[str]:
    found = []
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    return found


def _socket(target: str) -> int | None:
    match = re.fullmatch(r"socket:\[(\d+)\]", target)
    return int(match[1]) if match else None


def _kind(target: str) -> str:
    """ "anon_inode:[eventfd]" is an "eventfd", "pipe:[7]" a "pipe"; a path is a "file"."""
    if target.startswith("/"):
        return "memfd" if target.startswith("/memfd:") else "file"
    kind, _, name = target.partition(":")
    return name.strip("[]") if kind == "anon_inode" else kind


def _mapped(pid: int) -> list[tuple[int, bool]]:
    """Inode of each mapping of a memfd, and whether it is writable."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    parts = [line.split() for line in lines if "/memfd:" in line]
    return [(int(part[4]), "w" in part[1]) for part in parts]


def _tcp(pid: int) -> dict[int, tuple[Connection, str]]:
    """Inode → addresses and state of the sockets of the process's network namespace."""
    found = {}
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                _, own, peer, state, *rest = line.split()
                found[int(rest[5])] = Connection(_place(own), _place(peer)), state
    return found


def _place(text: str) -> Place:
    """From the kernel's form: 32-bit words in the machine's order of bytes, then the port."""
    host, _, port = text.partition(":")
    words = [bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return Place(str(mapped or address), int(port, 16))
