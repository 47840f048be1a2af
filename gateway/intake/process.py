"""The processes that work on bodies: one that forks, and the workers that it forks.

Owns: their life. The forking process is made once, at the gateway's start, after the models are
loaded and before there is a thread, a socket or an event loop: it holds nothing but what it shares
with the gateway's own memory, copied when written to. A worker is a fork of it: there within
milliseconds, with every tokenizer, and as quickly replaced. A worker ends when its gateway does, when
a body takes more processor time or memory than it may, and after a body that made it grow.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import resource
import signal
import socket
import sys
import warnings
from typing import NoReturn

from common import processor_share
from common.child_process import die_with_parent
from common.errors import InvalidRequest, PdqError, ResourceError
from common.logs import get_logger
from gateway.intake.limits import INTAKE_LIMITS, IntakeLimits
from gateway.intake.prepare import Prepared, prepare
from gateway.intake.wire import LENGTHS, Parts, error_frame, hello_frame, lengths, prepared_frame, question_in
from gateway.served_models import ServedModels

AT_ONCE, IN_SPARE_TIME = b"w", b"s"  # what the forking process is asked for

log = get_logger("intake")


class Forker:
    """The gateway's end of the forking process."""

    def __init__(self, models: ServedModels, limits: IntakeLimits = INTAKE_LIMITS) -> None:
        """Forks. To be called before the process has threads or open connections of its own."""
        self._models, self.limits = models, limits
        self.pid = 0  # once it has been waited for
        self._fork()

    def worker(self, *, in_spare_time: bool = False) -> socket.socket:
        """Start a worker; returns a connection, on which it first sends its process id. Raises
        `ResourceError`.

        A worker `in_spare_time` never takes a processor from anybody else who wants it.
        """
        kind = IN_SPARE_TIME if in_spare_time else AT_ONCE
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._ask(kind, theirs)
            except OSError:
                log.warning("intake.forker_lost", pid=self.pid)
                try:
                    self.close()
                    self._fork()
                    self._ask(kind, theirs)
                except OSError as error:
                    ours.close()
                    raise ResourceError(f"no intake process can be started: {error}") from error
        return ours

    def close(self) -> None:
        """End the forking process, even a stopped one; its workers end with it."""
        self._socket.close()
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def _ask(self, kind: bytes, connection: socket.socket) -> None:
        socket.send_fds(self._socket, [kind], [connection.fileno()])

    def _fork(self) -> None:
        ours, theirs = socket.socketpair()
        die = die_with_parent(os.getpid())
        with warnings.catch_warnings():
            # Python warns of threads; the child takes no lock that a thread may have held.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            die()
            _run(lambda: _fork_workers(theirs, self._models, self.limits), keep=theirs)
        theirs.close()
        self._socket = ours


def _run(main: object, keep: socket.socket) -> NoReturn:
    """Run `main` in a child that shares nothing with the gateway but `keep` and standard error."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the gateway, which closes us
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) != keep.fileno():
                with contextlib.suppress(OSError):
                    os.close(int(name))
        main()  # type: ignore[operator]
        code = 0
    except BaseException as error:
        log.error("intake.failed", exc_info=error)
    finally:
        os._exit(code)


def _fork_workers(commands: socket.socket, models: ServedModels, limits: IntakeLimits) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers: no zombies
    gc.freeze()  # a collection would write to every page that is shared
    die = die_with_parent(os.getpid())
    while True:
        command, descriptors, _, _ = socket.recv_fds(commands, 1, 1)
        if not command:
            return
        with socket.socket(fileno=descriptors[0]) as connection:
            if os.fork() == 0:
                die()
                commands.close()
                main = functools.partial(_work, connection, models, limits, command == IN_SPARE_TIME)
                _run(main, keep=connection)


def _work(connection: socket.socket, models: ServedModels, limits: IntakeLimits, in_spare_time: bool) -> None:
    """Answer one body after the other until the gateway hangs up."""
    begin = _address_space()
    resource.setrlimit(resource.RLIMIT_AS, (begin + limits.memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _send(connection, hello_frame(os.getpid()))
    processor_share.leave(idle=in_spare_time)
    last = False
    while not last and (received := _receive(connection, LENGTHS.size)):
        head_length, body_length, _ = lengths(received)
        head, body = _receive(connection, head_length), _receive(connection, body_length)
        signal.setitimer(signal.ITIMER_PROF, limits.processor_s)  # SIGPROF ends the process
        outcome = _outcome(models, head, body)
        last = _address_space() > begin + limits.growth_bytes
        if isinstance(outcome, PdqError):
            answer = error_frame(outcome, last=last)
        else:
            answer = prepared_frame(outcome, last=last)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(connection, answer)
        del body, outcome, answer


def _outcome(models: ServedModels, head: bytes, body: bytes) -> Prepared | PdqError:
    try:
        return prepare(models, question_in(head), body)
    except PdqError as error:
        return error
    except MemoryError:
        return InvalidRequest("the body takes too much memory to work on")
    except Exception as error:
        log.error("intake.internal_error", error=repr(error), exc_info=error)
        return PdqError("internal error")


def _send(connection: socket.socket, parts: Parts) -> None:
    for part in parts:
        connection.sendall(part)


def _receive(connection: socket.socket, count: int) -> bytes:
    """So many bytes; none at all when the gateway has hung up before the first."""
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(min(count - len(data), 2**20))
        if not piece:
            if data:
                sys.exit(0)
            return b""
        data += piece
    return bytes(data)


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
