"""How much of a prompt a step takes while others decode, on devices whose steps cost what a formula says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common.engine.core.block_pool import BlockPool
from common.engine.core.prompt_share import DecodePace, StepSeconds, pairs_of
from common.engine.core.scheduler import Scheduler
from common.engine.core.sequence import Sequence
from common.engine.core.step import Step
from common.sampling import SamplingParams

Cost = Callable[[int, float], float]
TARGET_S = 0.5
SLACK = 1.25  # of an estimate
CHATS = 4


def by_line(rows: int, pairs: float) -> float:
    return 0.02 + 0.0025 * rows + 8e-7 * pairs


def by_memory_first(rows: int, pairs: float) -> float:
    """Rows are free until the weights are read."""
    return max(0.1, 0.002 * rows) + 2e-7 * pairs


def by_attention(rows: int, pairs: float) -> float:
    return 0.03 + 0.0005 * rows + 3e-6 * pairs


class Device:
    """Runs a scheduler's steps in the time that `cost` says."""

    def __init__(self, cost: Cost, *, target_s: float = TARGET_S, multiple: int = 16) -> None:
        self.cost, self.costs = cost, StepSeconds()
        self.scheduler = Scheduler(
            BlockPool(4096, 16, enable_prefix_cache=False),
            max_num_seqs=64,
            max_num_batched_tokens=512,
            max_model_len=32768,
            pace=DecodePace(target_s, self.costs, multiple),
        )
        self.num_sequences = 0

    def add(self, prompt_len: int, max_tokens: int, *, replayed: int = 0) -> Sequence:
        number = self.num_sequences
        self.num_sequences += 1
        params = SamplingParams(max_tokens=max_tokens + replayed, ignore_eos=True)
        tokens = [1] * (prompt_len + replayed)
        sequence = Sequence(number, f"r{number}", 0, prompt_len, tokens, params, arrival=number)
        self.scheduler.add(sequence)
        return sequence

    def chat(self) -> None:
        """Some sequences that decode."""
        for _ in range(CHATS):
            self.add(16, 8000)
        for _ in range(3):
            self.step()

    def step(self, *, takes: float = 1.0) -> tuple[Step, float]:
        """The step, and its seconds: so many times what it costs."""
        step = self.scheduler.schedule()
        pairs = sum(pairs_of(chunk.start, chunk.length) for chunk in step.chunks if chunk.length > 1)
        seconds = self.cost(step.num_tokens, pairs) * takes
        self.costs.took(step.num_tokens, pairs, seconds)
        chosen = {chunk.sequence.sequence_id: [1] for chunk in step.chunks if chunk.samples}
        self.scheduler.postprocess(step, chosen)
        return step, seconds

    def steps_of(self, prompt: Sequence) -> list[tuple[int, float]]:
        """Prompt tokens and seconds of each step until the prompt is computed."""
        steps = []
        while not prompt.num_generated:
            step, seconds = self.step()
            steps.append((step.num_prompt_tokens, seconds))
        return steps


@pytest.mark.parametrize("cost", [by_line, by_memory_first, by_attention])
def test_once_costs_are_known_steps_with_prompts_end_near_the_target_and_not_far_below(cost: Cost) -> None:
    device = Device(cost)
    device.chat()
    for _ in range(3):  # what is learned of a prompt
        device.steps_of(device.add(4096, 1))
    steps = device.steps_of(device.add(4096, 1))
    assert all(seconds < TARGET_S * SLACK for tokens, seconds in steps if tokens > 64)
    assert any(seconds > TARGET_S / SLACK for _, seconds in steps)


def test_the_first_prompt_after_the_start_is_cut_by_what_the_start_measured() -> None:
    device = Device(by_line)
    for prompt_len in (64, 1):
        device.add(prompt_len, 1)
        device.step()
    device.chat()
    steps = device.steps_of(device.add(2048, 1))
    assert all(seconds < TARGET_S * SLACK for _, seconds in steps)


def test_prompts_have_whole_steps_while_nobody_decodes() -> None:
    device = Device(by_line, target_s=0.01)
    device.steps_of(device.add(2048, 1))
    assert [tokens for tokens, _ in device.steps_of(device.add(2048, 1))] == [512] * 4


def test_several_prompts_share_what_fits_the_most_important_first() -> None:
    device = Device(by_line)
    device.chat()
    device.steps_of(device.add(2048, 1))
    for _ in range(8):
        device.add(48, 1)
    step, seconds = device.step()
    lengths = [chunk.length for chunk in step.chunks if chunk.is_prompt]
    assert lengths[:2] == [48, 48]
    assert sum(lengths) < 8 * 48
    assert seconds < TARGET_S * SLACK


def test_whatever_a_step_costs_prompts_progress_and_all_that_decode_get_a_token() -> None:
    device = Device(by_line, target_s=0.001)
    device.chat()
    prompts = [device.add(256, 1) for _ in range(3)]
    while not prompts[-1].num_generated:
        step, _ = device.step()
        assert step.num_prompt_tokens == 64
        assert step.num_generated_chunks == CHATS
    assert all(prompt.num_generated for prompt in prompts)


def test_a_replay_of_delivered_tokens_is_cut_as_a_prompt_is() -> None:
    device = Device(by_line)
    device.chat()
    device.steps_of(device.add(2048, 1))
    replayed = device.add(16, 1, replayed=2048)
    while not replayed.finish_reason:
        _, seconds = device.step()
        assert seconds < TARGET_S * SLACK


@pytest.mark.parametrize("multiple", [16, 128])
def test_prompt_rows_fill_the_calls_of_products(multiple: int) -> None:
    device = Device(by_line, multiple=multiple)
    device.chat()
    *cut, _ = device.steps_of(device.add(2048, 1))
    assert cut
    assert all(tokens % multiple == 0 for tokens, _ in cut)


def test_one_step_that_was_held_up_makes_the_next_ones_little_shorter() -> None:
    device = Device(by_line)
    device.chat()
    usual = len(device.steps_of(device.add(2048, 1)))
    device.add(2048, 1)
    device.step(takes=100.0)
    assert len(device.steps_of(device.add(2048, 1))) <= 2.5 * usual  # two prompts, one after the other


def test_a_device_that_becomes_slower_or_faster_is_followed() -> None:
    device = Device(by_line)
    device.chat()
    device.steps_of(device.add(4096, 1))
    for factor in (3.0, 0.5):
        device.cost = lambda rows, pairs, factor=factor: by_line(rows, pairs) * factor
        device.steps_of(device.add(8192, 1))
        steps = device.steps_of(device.add(2048, 1))
        assert all(seconds < TARGET_S * 1.5 for tokens, seconds in steps if tokens > 64)
        assert any(seconds > TARGET_S / 2 for _, seconds in steps)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clock_that_says_what_cannot_be_teaches_nothing(seconds: float) -> None:
    costs = StepSeconds()
    costs.took(64, 10.0, 0.2)
    before = costs.of(64, 10.0)
    costs.took(64, 10.0, seconds)
    assert costs.of(64, 10.0) == before
