"""A queue on a CUDA stream does what tests elsewhere believe of one (tests/support/fake_accelerator.py).

make test-gpu ARGS="--on cpu tests/gpu/test_device_queue.py" tries the tests themselves, on the pretended one.
"""

from __future__ import annotations

import threading
import time

import pytest
import torch

from common.engine.devices.queue import DeviceQueue

pytestmark = pytest.mark.gpu
SIZE = 1 << 22


@pytest.fixture
def queue(device: str) -> DeviceQueue:
    if device == "cpu":
        from tests.support.fake_accelerator import FakeAccelerator

        return FakeAccelerator().queue()
    from common.engine.devices.cuda.queue import CudaQueue

    return CudaQueue(torch.device(device, 0))


def numbers(memory: torch.Tensor) -> torch.Tensor:
    return memory.view(torch.int32)


def test_copies_and_work_come_in_order_and_an_event_behind_them(queue: DeviceQueue) -> None:
    there, sent, received = queue.zeros(SIZE), queue.pinned(SIZE), queue.pinned(SIZE)
    for turn in range(20):
        numbers(sent).fill_(turn)
        queue.copy(there, sent)
        queue.run(lambda: numbers(there).add_(1))
        queue.copy(received, there)
        event = queue.record()
        event.wait()
        assert event.is_done()
        assert int(numbers(received).min()) == int(numbers(received).max()) == turn + 1


def test_a_graph_computes_on_what_lies_in_its_memory_when_it_is_replayed(queue: DeviceQueue) -> None:
    there, result, received = queue.zeros(64), queue.zeros(64), queue.pinned(64)

    def work() -> None:
        numbers(result).copy_((numbers(there) * 3).cumsum(0))

    queue.run(work)
    queue.synchronize()
    graph = queue.capture(work)
    for value in (1, 2, 5):
        queue.run(lambda value=value: numbers(there).fill_(value))  # type: ignore[misc]
        queue.replay(graph)
        queue.copy(received, result)
        queue.record().wait()
        assert numbers(received).tolist() == [3 * value * (place + 1) for place in range(16)]


def test_another_thread_may_allocate_while_a_graph_is_recorded(queue: DeviceQueue) -> None:
    """As a transport does: it must not spoil the recording."""
    there, made = queue.zeros(64), []

    def work() -> None:
        numbers(there).add_(1)
        thread = threading.Thread(target=lambda: made.append(queue.pinned(1 << 20)))
        thread.start()
        thread.join(30)
        numbers(there).add_(1)

    queue.run(work)
    queue.synchronize()
    graph, before = queue.capture(work), len(made)
    received = queue.pinned(64)
    queue.replay(graph)
    queue.copy(received, there)
    queue.record().wait()
    assert before == len(made) == 2
    assert numbers(received).tolist() == [4] * 16


def test_a_thread_that_waits_leaves_the_interpreter_to_others(queue: DeviceQueue, device: str) -> None:
    if device == "cpu":
        pytest.skip("what is pretended is computed by the thread that waits")
    queue.run(lambda: torch.cuda._sleep(int(2e8)))  # about 0.1 s
    event, turns = queue.record(), 0
    waiter = threading.Thread(target=event.wait)
    waiter.start()
    begun = time.perf_counter()
    while waiter.is_alive() and time.perf_counter() - begun < 5:
        turns += 1
    waiter.join(5)
    assert turns > 1000
