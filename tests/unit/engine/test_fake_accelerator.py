"""The accelerator that tests pretend to have is as unforgiving as a real one: it shows what is too early."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import pytest
import torch

from tests.support.fake_accelerator import GARBAGE, FakeAccelerator, FakeQueue, Fault, HostLooked, Order
from tests.support.recorded_calls import NotCapturable
from tests.support.redis import HANGS_S

ORDERS = [(Order.EARLY, 0), (Order.LATE, 0), *((Order.RANDOM, seed) for seed in range(4))]


@pytest.fixture
def accelerator() -> FakeAccelerator:
    return FakeAccelerator()


@pytest.fixture
def queue(accelerator: FakeAccelerator) -> FakeQueue:
    return accelerator.queue()


def adding(to: torch.Tensor, value: int) -> Callable[[], object]:
    return lambda: to.add_(value)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_a_queue_keeps_its_order_and_an_event_comes_behind_what_was_before_it(
    order: Order, seed: int
) -> None:
    queue, done = FakeAccelerator(order, seed).queue(), []
    for number in range(5):
        queue.run(functools.partial(done.append, number))
    event = queue.record()
    queue.run(lambda: done.append(5))
    event.wait()
    assert done[:5] == [0, 1, 2, 3, 4]
    assert event.is_done()
    queue.synchronize()
    assert done == [0, 1, 2, 3, 4, 5]


def test_work_is_done_no_earlier_than_somebody_waits_for_it(
    accelerator: FakeAccelerator, queue: FakeQueue
) -> None:
    done: list[int] = []
    queue.run(lambda: done.append(0))
    event = queue.record()
    queue.run(lambda: done.append(1))
    assert not event.is_done()
    assert not done
    event.wait()
    assert done == [0]


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_two_queues_meet_at_an_event_and_nowhere_else(order: Order, seed: int) -> None:
    accelerator = FakeAccelerator(order, seed)
    one, other, done = accelerator.queue(), accelerator.queue(), []
    one.run(lambda: done.append("before"))
    other.wait_for(one.record())
    other.run(lambda: done.append("after"))
    other.synchronize()
    assert done == ["before", "after"]


def test_random_orders_differ_between_queues() -> None:
    found = set()
    for seed in range(20):
        accelerator = FakeAccelerator(Order.RANDOM, seed)
        queues, done = [accelerator.queue() for _ in range(2)], []
        for name, queue in zip("ab", queues, strict=True):
            for _ in range(2):
                queue.run(functools.partial(done.append, name))
        for queue in queues:
            queue.synchronize()
        found.add("".join(done))
    assert len(found) > 2


def test_what_a_copy_has_not_brought_yet_is_garbage(queue: FakeQueue) -> None:
    there, here = queue.zeros(4), queue.pinned(4)
    queue.run(adding(there, 7))
    here.zero_()
    queue.copy(here, there)
    event = queue.record()
    assert here.tolist() == [GARBAGE] * 4
    event.wait()
    assert here.tolist() == [7] * 4


def test_a_buffer_that_is_written_again_too_early_is_copied_as_it_is_then(queue: FakeQueue) -> None:
    there, here = queue.zeros(1), queue.pinned(1)
    here[0] = 1
    queue.copy(there, here)
    here[0] = 2
    queue.synchronize()
    assert int(there[0]) == 2


def test_the_host_may_not_look_at_device_memory(accelerator: FakeAccelerator, queue: FakeQueue) -> None:
    there = queue.zeros(8).view(torch.int32)
    looks: list[Callable[[], object]] = [
        there.tolist,
        there.numpy,
        lambda: int(there[0]),
        lambda: there + 1,
        lambda: there.copy_(torch.zeros(2, dtype=torch.int32)),
    ]
    with accelerator.watching():
        assert there[1:].shape == (1,)
        for look in looks:
            with pytest.raises(HostLooked):
                look()
        queue.run(adding(there, 1))
        queue.synchronize()
    assert there.tolist() == [1, 1]


def test_a_replay_computes_the_same_operations_on_the_same_memory(queue: FakeQueue) -> None:
    values, sums, called = queue.zeros(4), queue.zeros(1), []

    def work() -> None:
        called.append(1)
        sums.copy_((values * 2).view(2, 2).sum().to(torch.uint8).unsqueeze(0))

    graph = queue.capture(work)
    for value in (1, 2):
        queue.run(functools.partial(values.fill_, value))
        queue.replay(graph)
        queue.synchronize()
        assert int(sums[0]) == 8 * value
    assert len(called) == 1, "the host's part is not run again"


@pytest.mark.parametrize(
    "look",
    [
        lambda tensor: tensor.tolist(),
        lambda tensor: bool(tensor[0] > 0),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: torch.nonzero(tensor),
        lambda tensor: tensor.numpy(),
    ],
)
def test_a_recording_refuses_to_wait_for_the_device(
    queue: FakeQueue, look: Callable[[torch.Tensor], object]
) -> None:
    tensor = queue.zeros(4)
    with pytest.raises(NotCapturable):
        queue.capture(lambda: look(tensor))


@pytest.mark.parametrize("what", ["synchronize", "event", "pinned"])
def test_a_recording_refuses_what_would_spoil_it(queue: FakeQueue, what: str) -> None:
    event = queue.record()
    work: dict[str, Callable[[], object]] = {
        "synchronize": queue.synchronize,
        "event": event.wait,
        "pinned": lambda: queue.pinned(1),
    }
    with pytest.raises(NotCapturable):
        queue.capture(lambda: work[what]())
    queue.synchronize()


def test_another_thread_may_do_so_meanwhile(queue: FakeQueue) -> None:
    def work() -> None:
        thread = threading.Thread(target=lambda: made.append(queue.pinned(3)))
        thread.start()
        thread.join(HANGS_S)

    made: list[torch.Tensor] = []
    queue.capture(work)
    assert len(made) == 1


def test_a_fault_when_something_is_given_leaves_the_rest(
    accelerator: FakeAccelerator, queue: FakeQueue
) -> None:
    values = queue.zeros(1)
    accelerator.inject("run", 1, Fault.AT_ENQUEUE)
    queue.run(adding(values, 1))
    with pytest.raises(RuntimeError, match="could not be given"):
        queue.run(adding(values, 10))
    queue.run(adding(values, 1))
    queue.synchronize()
    assert int(values[0]) == 2


def test_a_fault_while_something_is_computed_is_for_good(
    accelerator: FakeAccelerator, queue: FakeQueue
) -> None:
    values = queue.zeros(1)
    accelerator.inject("run", 0, Fault.IN_WORK)
    queue.run(adding(values, 1))
    queue.run(adding(values, 1))
    event = queue.record()
    calls: list[Callable[[], object]] = [event.wait, queue.synchronize, lambda: queue.run(lambda: None)]
    for call in calls:
        with pytest.raises(RuntimeError, match="CUDA error"):
            call()
    assert int(values[0]) == 0


def test_a_fault_of_an_event_leaves_its_work_running(accelerator: FakeAccelerator, queue: FakeQueue) -> None:
    values = queue.zeros(1)
    accelerator.inject("run", 0, Fault.AT_EVENT)
    queue.run(adding(values, 1))
    event = queue.record()
    with pytest.raises(RuntimeError, match="could not be waited for"):
        event.wait()
    queue.synchronize()
    assert int(values[0]) == 1


def test_what_hangs_holds_up_its_queue_until_it_is_released(
    accelerator: FakeAccelerator, queue: FakeQueue
) -> None:
    accelerator.inject("run", 0, Fault.HANGS)
    done: list[int] = []
    queue.run(lambda: done.append(1))
    event = queue.record()
    waiter = threading.Thread(target=event.wait)
    waiter.start()
    other = accelerator.queue()
    other.run(lambda: done.append(2))
    other.synchronize()
    assert done == [2]
    assert not event.is_done()
    accelerator.release()
    waiter.join(HANGS_S)
    assert done == [2, 1]
