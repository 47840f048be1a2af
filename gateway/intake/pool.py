"""Who gets an intake process when: queues, fairness, time limits, and what is refused.

Owns: the running workers and the bodies that wait for one. Two lanes, so that a chat of a few lines
does not wait behind megabytes; in each lane clients take turns, none has more workers than leaves
one for the others, and when too much waits, the client with most of it is told to come back later.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections import Counter, deque

from common.errors import InvalidRequest, Overloaded, PdqError, ProtocolError, ServiceUnavailable
from common.logs import get_logger
from gateway.intake.prepare import NeedsProcess, Prepared, Question, prepare
from gateway.intake.process import Forker
from gateway.intake.wire import LENGTHS, lengths, pid_in, prepared_in, question_frame
from gateway.served_models import ServedModels

SMALL_BODY = 8_192  # bytes that are worked on in place, 3 ms at most
SHORT_BODY = 65_536  # bytes of the short lane

log = get_logger("intake")


@dataclasses.dataclass(slots=True, eq=False)
class _Job:
    client: str
    question: Question
    body: bytes
    answer: asyncio.Future[Prepared]


class _Worker:
    """One connection to one process."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers_within_s: float
    ) -> None:
        self._reader, self._writer = reader, writer
        self._answers_within_s = answers_within_s
        self._pidfd = -1
        self.is_over = False  # it answers no more

    @classmethod
    async def start(cls, forker: Forker, in_spare_time: bool) -> _Worker:
        connection = forker.worker(in_spare_time=in_spare_time)
        limits = forker.limits
        answers_within_s = limits.spare_wall_s if in_spare_time else limits.wall_s
        worker = cls(*await asyncio.open_connection(sock=connection), answers_within_s)
        try:
            async with asyncio.timeout(limits.wall_s):
                head, _ = await worker._receive()
                worker._pidfd = os.pidfd_open(pid_in(head))
        except BaseException:
            worker.kill()
            raise
        return worker

    async def prepare(self, question: Question, body: bytes) -> Prepared:
        """Raises `EOFError` or `OSError` when the process ends instead of answering, `TimeoutError`
        when it does neither."""
        async with asyncio.timeout(self._answers_within_s):
            for part in question_frame(question, body):
                self._writer.write(part)
            await self._writer.drain()
            head, rest = await self._receive()
        return prepared_in(head, rest)

    async def _receive(self) -> tuple[bytes, bytes]:
        received = await self._reader.readexactly(LENGTHS.size)
        head_length, rest_length, self.is_over = lengths(received)
        head = await self._reader.readexactly(head_length)
        return head, await self._reader.readexactly(rest_length)

    @property
    def has_ended(self) -> bool:
        return self._reader.at_eof() or self._writer.is_closing()

    def kill(self) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = -1
        self._writer.close()


class _Lane:
    """Bodies of about one size, and the workers for them."""

    def __init__(self, forker: Forker, processes: int, *, in_spare_time: bool) -> None:
        self._forker, self._processes, self._in_spare_time = forker, processes, in_spare_time
        self._waiting: dict[str, deque[_Job]] = {}  # clients in the order of their turns
        self._running: Counter[str] = Counter()
        self._idle: list[tuple[_Worker, asyncio.TimerHandle]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def run(self, client: str, question: Question, body: bytes) -> Prepared:
        if self._closed:
            raise ServiceUnavailable("this gateway ends")
        job = _Job(client, question, body, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(client, deque()).append(job)
        self._make_room()
        self._start_next()
        try:
            return await job.answer
        finally:
            job.answer.cancel()  # nobody waits for it any more

    def close(self) -> None:
        self._closed = True
        for job in (job for jobs in self._waiting.values() for job in jobs):
            if not job.answer.done():
                job.answer.set_exception(ServiceUnavailable("this gateway ends"))
        self._waiting.clear()  # so that no worker is started for them
        for task in self._tasks:
            task.cancel()
        for worker, timer in self._idle:
            timer.cancel()
            worker.kill()
        self._idle.clear()

    def _make_room(self) -> None:
        if sum(map(len, self._waiting.values())) <= self._forker.limits.waiting:
            return
        client = max(self._waiting, key=lambda each: len(self._waiting[each]))
        refused = self._waiting[client].pop()
        if not refused.answer.done():
            refused.answer.set_exception(Overloaded("too many large bodies wait to be read"))

    def _start_next(self) -> None:
        most = max(1, self._processes - 1)
        while self._running.total() < self._processes:
            client = next((c for c in self._waiting if self._running[c] < most), None)
            if client is None:
                return
            jobs = self._waiting.pop(client)
            job = jobs.popleft()
            if jobs:
                self._waiting[client] = jobs  # its next turn is after everybody else's
            if job.answer.done():
                continue
            self._running[client] += 1
            task = asyncio.create_task(self._work(job), name="intake")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _work(self, job: _Job) -> None:
        worker: _Worker | None = None
        try:
            worker = await self._worker()
            prepared = await worker.prepare(job.question, job.body)
        except ProtocolError as error:
            self._end(worker, job, error)
        except PdqError as error:  # the answer of a worker that is well
            self._give_back(worker)
            if not job.answer.done():
                job.answer.set_exception(error)
        except TimeoutError:  # a worker that gets processor time reaches its own limit first
            self._end(worker, job, Overloaded("no processor had time to work on the body"))
        except (EOFError, OSError):
            self._end(worker, job, InvalidRequest("the body takes too much time or memory to work on"))
        except Exception as error:
            log.error("intake.failed", exc_info=error)
            self._end(worker, job, PdqError("internal error"))
        except BaseException:
            self._end(worker, job, ServiceUnavailable("this gateway ends"))
            raise
        else:
            self._give_back(worker)
            if not job.answer.done():
                job.answer.set_result(prepared)
        finally:
            self._running[job.client] -= 1
            if not self._running[job.client]:
                del self._running[job.client]
            self._start_next()

    def _end(self, worker: _Worker | None, job: _Job, error: PdqError) -> None:
        log.warning("intake.worker_lost", error=error, bytes=len(job.body))
        if worker is not None:
            worker.kill()
        if not job.answer.done():
            job.answer.set_exception(error)

    async def _worker(self) -> _Worker:
        while self._idle:
            worker, timer = self._idle.pop()
            timer.cancel()
            if not worker.has_ended:
                return worker
            worker.kill()
        return await _Worker.start(self._forker, self._in_spare_time)

    def _give_back(self, worker: _Worker | None) -> None:
        if worker is None:
            return
        if worker.is_over:
            worker.kill()
            return
        timer = asyncio.get_running_loop().call_later(self._forker.limits.idle_s, self._dismiss, worker)
        self._idle.append((worker, timer))

    def _dismiss(self, worker: _Worker) -> None:
        self._idle = [(each, timer) for each, timer in self._idle if each is not worker]
        worker.kill()


class Intake:
    """Turns bodies into `Prepared`, in place or in a process."""

    def __init__(self, models: ServedModels, forker: Forker, processes: int) -> None:
        """`processes` for large bodies; one more takes the short ones."""
        self._models, self._forker = models, forker
        self._short = _Lane(forker, 1, in_spare_time=False)
        self._long = _Lane(forker, processes, in_spare_time=True)

    async def prepare(self, client: str, question: Question, body: bytes) -> Prepared:
        """Raises `InvalidRequest` for the body, `Overloaded` when too many wait."""
        if len(body) <= SMALL_BODY:
            with contextlib.suppress(NeedsProcess):
                return prepare(self._models, dataclasses.replace(question, in_place=True), body)
        lane = self._short if len(body) <= SHORT_BODY else self._long
        return await lane.run(client, question, body)

    def close(self) -> None:
        """End every process; bodies that are worked on, or wait, fail with `ServiceUnavailable`."""
        self._short.close()
        self._long.close()
        self._forker.close()
