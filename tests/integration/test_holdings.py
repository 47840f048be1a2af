"""What the fault tests look at from outside is what a process has, and not less."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys

import pytest

from tests.support.holdings import Connection, Place, holdings
from tests.support.network import HUB, NoNamespaces, network


def test_every_kind_of_thing_is_seen_while_it_is_held() -> None:
    before = holdings(os.getpid())
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(listener.getsockname()))
        server, _ = listener.accept()
        stack.enter_context(server)
        for end in socket.socketpair():
            stack.enter_context(end)
        stack.callback(os.close, os.eventfd(0))
        memory = os.memfd_create("pdq-pool")
        stack.callback(os.close, memory)
        os.ftruncate(memory, mmap.PAGESIZE)
        stack.enter_context(mmap.mmap(memory, mmap.PAGESIZE))
        now = holdings(os.getpid())
        more = now.descriptors - before.descriptors
        assert more == {"listening socket": 1, "unix socket": 2, "eventfd": 1, "memfd": 2}
        ends = Place(*client.getsockname()), Place(*server.getsockname())
        assert set(now.connections) - set(before.connections) == {
            Connection(*ends),
            Connection(*reversed(ends)),
        }
        assert now.own - before.own == {os.fstat(memory).st_ino}
        assert now.foreign == before.foreign
    assert holdings(os.getpid()) == before


def test_a_mapping_that_cannot_be_written_is_somebody_elses() -> None:
    memory = os.memfd_create("pdq-pool")
    os.ftruncate(memory, mmap.PAGESIZE)
    inode = os.fstat(memory).st_ino
    with mmap.mmap(memory, mmap.PAGESIZE, prot=mmap.PROT_READ):
        os.close(memory)
        assert inode in holdings(os.getpid()).foreign
    assert inode not in holdings(os.getpid()).foreign


def test_nothing_passes_a_cable_that_is_pulled() -> None:
    try:
        with network() as made, socket.create_server((HUB, 0)) as listener:
            made.add("one")
            place = listener.getsockname()
            say = f"import socket, sys; socket.create_connection({place}, float(sys.argv[1]))"
            connect = (*made.at("one"), sys.executable, "-c", say)
            passes = (*connect, "30")  # a first packet may be lost, and is sent again after a second
            subprocess.run(passes, check=True)
            subprocess.run(made.pull("one"), check=True)
            fails = subprocess.run((*connect, "1.5"), stderr=subprocess.DEVNULL, check=False)
            assert fails.returncode
            made.put_back("one")
            subprocess.run(passes, check=True)
    except NoNamespaces as reason:
        pytest.skip(str(reason))
