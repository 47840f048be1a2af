"""The GPU's sampler, interpreted, against the plain reference and the one in torch operations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.engine.devices.cuda.kernels.sampling_cuts import light_key
from common.engine.devices.cuda.kernels.sampling_values import (
    descending,
    group_noise,
    mass,
    token_noise,
    value_of,
)
from common.engine.devices.cuda.sampling import ALL, GREEDY, CudaSampling, PackedSampled, Stages, row_buffers
from common.engine.devices.cuda.sampling_launches import works
from common.engine.devices.reference import philox
from common.engine.devices.reference import sampling as sampling_torch
from common.engine.devices.sampling import RowBuffers
from common.engine.runner.sampler import Sampler
from common.engine.sampling.records import RowFault
from common.sampling import SamplingParams
from tests.support.quick_interpreter import quick_interpreter
from tests.support.recorded_calls import NotCapturable, Recorder, _Recorded
from tests.support.sampling_rule import (
    HOST,
    SHAPES,
    at,
    make_sampler,
    new_sampler,
    random_logits,
    reference_edited,
    reference_token,
    shaped_logits,
)

__all__ = ["quick_interpreter"]

pytestmark = pytest.mark.usefixtures("quick_interpreter", "overflow")
P = SamplingParams
VOCAB = 400


@pytest.fixture
def overflow() -> Iterator[None]:
    """As on a GPU: infinity, and no warning."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


# ---------------------------------------------------------------- what the stages share


@triton.jit
def noise_kernel(least, holders, own, seed, choice, position, SIZE: tl.constexpr):
    ids = tl.arange(0, SIZE)
    exponential, holder = group_noise(ids, seed, choice, position)
    tl.store(least + ids, exponential)
    tl.store(holders + ids, holder)
    tl.store(own + ids, token_noise(ids, seed, choice, position))


@pytest.mark.parametrize("seed", [7, 2**32 + 5, 2**64 - 3])
@pytest.mark.parametrize(("choice", "position"), [(0, 3), (63, 2**31 - 1)])
def test_noise_is_that_of_the_definition(seed: int, choice: int, position: int) -> None:
    size = 64
    signed = int(np.uint64(seed).astype(np.int64))
    least, own = torch.empty(size, dtype=torch.float64), torch.empty(size, dtype=torch.float64)
    holders = torch.empty(size, dtype=torch.int32)
    noise_kernel[(1,)](least, holders, own, signed, choice, position, SIZE=size)
    key = philox.NoiseKey(*(torch.tensor([word]) for word in (signed, choice, position)))
    ids = torch.arange(size).unsqueeze(0)
    wanted, offsets = philox.group_noise(key, ids)
    nothing = torch.zeros_like(wanted)
    assert torch.equal(holders.long(), offsets[0])
    torch.testing.assert_close(least, wanted[0], rtol=3e-16, atol=0)
    others = philox.token_noise(key, ids, nothing, torch.full_like(ids, -1))
    torch.testing.assert_close(own, others[0], rtol=3e-16, atol=0)


@triton.jit
def mass_kernel(values, out, keys, back, peak, inverse, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(values + place)
    tl.store(out + place, mass(value, peak, inverse))
    tl.store(keys + place, descending(value))
    tl.store(back + place, value_of(descending(value)))


@pytest.mark.parametrize(("peak", "inverse"), [(0.0, 1.0), (3.25, 0.7), (11.0, 3.4028234e38)])
def test_masses_and_keys_are_those_of_the_definition(peak: float, inverse: float) -> None:
    values = peak - torch.linspace(0, 40, 2**14)
    values[1:7] = torch.tensor([-math.inf, 0.0, -0.0, 1e-45, -1e-45, -3e38]).clamp_max(peak)
    out, keys = torch.empty(len(values), dtype=torch.int64), torch.empty(len(values), dtype=torch.int64)
    back = torch.empty_like(values)
    mass_kernel[(4,)](values, out, keys, back, peak, inverse, SIZE=2**12)
    assert torch.equal(out, sampling_torch.mass(values, torch.tensor(peak), torch.tensor(inverse)))
    assert torch.equal(keys, 2**31 - 1 - sampling_torch._ordered(values).long())
    assert torch.equal(back, values)
    assert (keys[2] == keys[3]).all()


@triton.jit
def light_kernel(spares, keys, vocab, peak, inverse):
    place = tl.program_id(0)
    tl.store(keys + place, light_key(tl.load(spares + place), vocab, tl.load(peak), tl.load(inverse)))


@pytest.mark.parametrize("inverse", [0.01, 1.0, 1000.0, 3.4028234e38])
def test_what_a_nucleus_does_not_look_at_cannot_matter(inverse: float) -> None:
    vocab, peak = 1000, 5.0
    spares = torch.tensor([0, 999, 1000, 5000, 10**6, 10**9, 2**40, 2**45])
    keys = torch.empty_like(spares)
    light_kernel[(len(spares),)](spares, keys, vocab, torch.tensor([peak]), torch.tensor([inverse]))
    for spare, key in zip(spares.tolist(), keys.tolist(), strict=True):
        bits = 2**31 - 1 - (key + 1)  # the largest logit that is left out
        if key < 2**32 - 1:
            value = torch.tensor(bits if bits >= 0 else bits ^ 0x7FFFFFFF, dtype=torch.int32)
            weight = sampling_torch.mass(value.view(torch.float32), torch.tensor(peak), torch.tensor(inverse))
            assert vocab * int(weight) <= spare


# ---------------------------------------------------------------- tokens

params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 1.7, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 50, 257, 2000]),
    top_p=st.sampled_from([1.0, 1e-9, 0.1, 0.5, 0.95, 1.0 - 1e-12]),
    min_p=st.sampled_from([0.0, 0.0, 1e-6, 0.05, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(
    max_examples=24,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    params=params_strategy,
    shape=st.sampled_from(SHAPES),
    vocab=st.sampled_from([2, 255, 256, 300, 1500]),
    position=st.integers(3, 2**31),
    choice=st.integers(0, 127),
    seed=st.integers(0, 2**20),
)
def test_tokens_equal_those_of_the_reference(
    params: P, shape: str, vocab: int, position: int, choice: int, seed: int
) -> None:
    logits = shaped_logits(shape, vocab, seed)
    expected = reference_token(logits, params, choice, position)
    sampler = make_sampler([params], vocab, "triton", prompt=(0, 1), choice=choice)
    output = sampler.sample(torch.from_numpy(logits)[None], at([0], [position]))
    assert (output.faults[0], output.token_ids[0]) == (RowFault.NONE, expected)


def sampling_of(sampler: Sampler) -> CudaSampling:
    sampling = sampler._sampling
    assert isinstance(sampling, CudaSampling)
    return sampling


@pytest.mark.parametrize("shape", ["ties", "normal"])
def test_cuts_equal_those_of_a_full_sort_however_many_programs_share_a_row(shape: str) -> None:
    vocab = 7000
    values = shaped_logits(shape, vocab, 3)
    order = np.lexsort((np.arange(vocab), -values))
    ordered = torch.from_numpy(values[order])
    masses = sampling_torch.mass(ordered, ordered[0], torch.ones(())).numpy().cumsum()
    asked = [(1, 1.0), (700, 1.0), (0, 0.37), (0, 0.999), (900, 0.8)]
    params = [P(top_k=k, top_p=p, seed=i) for i, (k, p) in enumerate(asked)]
    rows = at(range(len(asked)), [3] * len(asked), sources=[0] * len(asked))
    logits = torch.from_numpy(values)[None]
    tokens = []
    for multiprocessors in (1, 100):  # one program of four tiles, and four of one
        sampling = CudaSampling(vocab, HOST, max_rows=8, multiprocessors=multiprocessors)
        sampler = Sampler(vocab, len(params), sampling)
        for slot, each in enumerate(params):
            sampler.add(slot, each, 0, (), [1, 2, 3])
        tokens.append(sampler.sample(logits, rows).token_ids.tolist())
        assert sampling._space is not None
        cuts = sampling._space.cuts[2][: len(asked)].numpy()
        for (k, p), (bits, last) in zip(asked, cuts, strict=True):
            count = k or vocab
            reached = (
                int(np.argmax(masses >= math.ceil(p * float(masses[count - 1])))) if p < 1 else count - 1
            )
            cut = np.array(bits, np.int64).astype(np.int32).view(np.float32)
            assert (cut, last) == (values[order[reached]], order[reached]), (k, p)
    assert tokens[0] == tokens[1]
    expected = make_sampler(params, vocab, "torch").sample(logits, rows)
    assert tokens[0] == expected.token_ids.tolist()


def test_a_large_vocabulary_gives_the_tokens_of_torch() -> None:
    vocab = 20_000
    params = [P(seed=1, top_k=300, top_p=0.95, temperature=0.8), P(seed=2, temperature=1.4)]
    logits = random_logits(2, vocab, seed=5).bfloat16()
    rows = at(range(2), [9, 10])
    tokens = [make_sampler(params, vocab, i).sample(logits, rows).token_ids for i in ("torch", "triton")]
    np.testing.assert_array_equal(*tokens)


def varied_params() -> list[P]:
    return [
        P(temperature=0.0, logprobs=0),
        P(seed=1),
        P(seed=2, temperature=0.7, top_p=0.9, logprobs=4),
        P(seed=3, top_k=20, repetition_penalty=1.3, presence_penalty=0.4),
        P(seed=4, min_p=0.05, logit_bias=((5, 4.0),), banned_token_ids=(6, 7)),
        P(seed=5, allowed_token_ids=tuple(range(10, 90)), frequency_penalty=0.3, logprobs=20),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_its_batch_or_its_place(dtype: torch.dtype) -> None:
    vocab = 2300
    params = varied_params()
    count = len(params)
    logits = random_logits(count, vocab).to(dtype)
    together = make_sampler(params, vocab, "torch").sample(logits, at(range(count), [3] * count))
    order = np.random.default_rng(1).permutation(count)
    sampler = make_sampler(params, vocab, "triton")
    sampling_of(sampler)._max_rows = 4  # so that calls are cut
    shuffled = sampler.sample(logits, at(order, [3] * count, sources=order))
    assert shuffled.token_ids.tolist() == together.token_ids[order].tolist()
    assert shuffled.logprobs is not None
    assert together.logprobs is not None
    for field in dataclasses.fields(together.logprobs):
        wanted = getattr(together.logprobs, field.name)[order]
        np.testing.assert_allclose(getattr(shuffled.logprobs, field.name), wanted, rtol=1e-6)
    assert sampler.sample(logits[2:3], at([2], [3])).token_ids[0] == together.token_ids[2]


# ---------------------------------------------------------------- edits, penalties, state

token_ids = st.integers(0, VOCAB - 1)
edits_strategy = st.builds(
    SamplingParams,
    max_tokens=st.just(50),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 1000),
    logit_bias=st.lists(st.tuples(token_ids, st.floats(-100, 100, width=32)), max_size=5).map(tuple),
    banned_token_ids=st.lists(token_ids, max_size=5).map(tuple),
    allowed_token_ids=st.none() | st.lists(token_ids, min_size=9, unique=True).map(tuple),
    stop_token_ids=st.lists(token_ids, max_size=2).map(tuple),
    min_tokens=st.sampled_from([0, 2, 6]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
    presence_penalty=st.sampled_from([0.0, -2.0, 1.1]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.3]),
)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    params=edits_strategy,
    prompt=st.lists(token_ids, min_size=1, max_size=30),
    appended=st.lists(token_ids, max_size=6),
    drafts=st.lists(st.sampled_from([3, 4, 5]), max_size=2),
    seed=st.integers(0, 2**20),
)
def test_edits_penalties_and_drafts_equal_the_reference(
    params: P, prompt: list[int], appended: list[int], drafts: list[int], seed: int
) -> None:
    places = range(1 + len(drafts))
    logits = random_logits(len(places), VOCAB, seed=seed)
    stop_ids = [11, 12]
    start = len(prompt) + len(appended)
    expected = []
    for row in places:
        before = [*appended, *drafts[:row]]
        values = reference_edited(logits[row].numpy(), params, prompt, before, stop_ids)
        expected.append(reference_token(values, params, 1, start + row))
    sampler = new_sampler(VOCAB, 3, "triton")
    sampler.add(2, params, 1, stop_ids, prompt, appended[:2])
    sampler.append(np.full(len(appended[2:]), 2), np.array(appended[2:], np.int64))
    rows = at(
        [2] * len(places),
        [start + i for i in places],
        drafted=[9, *drafts],
        draft_start=[1] * len(places),
        draft_length=list(places),
    )
    assert sampler.sample(logits, rows).token_ids.tolist() == expected


def test_slots_are_reused_without_a_trace() -> None:
    """Many lives in few slots: lists grow and are compacted, rows of counts are cleared."""
    slots, generator = 12, np.random.default_rng(0)
    long = tuple(range(0, VOCAB, 2))
    kinds = [
        P(temperature=0.0, allowed_token_ids=long, logit_bias=tuple((i, 0.5) for i in range(300))),
        P(temperature=0.0, repetition_penalty=1.3, presence_penalty=1.4, min_tokens=9),
        P(temperature=0.0, banned_token_ids=tuple(range(1, VOCAB, 2)), frequency_penalty=-0.7),
        P(temperature=0.0),
    ]
    logits = random_logits(1, VOCAB)
    prompts = [generator.integers(0, VOCAB, 12).tolist() for _ in kinds]
    expected = []
    for params, prompt in zip(kinds, prompts, strict=True):
        fresh = new_sampler(VOCAB, 1, "torch")
        fresh.add(0, params, 0, (4, 5), prompt)
        expected.append(int(fresh.sample(logits, at([0], [12])).token_ids[0]))
    sampler = new_sampler(VOCAB, slots, "triton")
    lives: dict[int, int] = {}
    for turn in range(120):
        slot = int(generator.integers(slots))
        if slot in lives:
            sampler.append(np.full(20, slot), generator.integers(0, VOCAB, 20))
            sampler.remove(slot)
        lives[slot] = int(generator.integers(len(kinds)))
        sampler.add(slot, kinds[lives[slot]], 0, (4, 5), prompts[lives[slot]])
        if turn % 30 == 29:
            taken = sorted(lives)
            rows = at(taken, [12] * len(taken), sources=[0] * len(taken))
            wanted = [expected[lives[each]] for each in taken]
            assert sampler.sample(logits, rows).token_ids.tolist() == wanted
    state = sampling_of(sampler)._state
    assert state is not None
    assert len(state._memory[1]) > 1024  # they have grown


def test_nothing_is_sent_where_nothing_changed() -> None:
    sampler = make_sampler([P(repetition_penalty=1.2)], VOCAB, "triton")
    sampling = sampling_of(sampler)
    assert len(sampling.changes(sampler._table).words)
    assert len(sampling.changes(sampler._table).words) == 0


def test_everything_is_sent_anew_when_it_may_have_been_lost() -> None:
    params = [P(temperature=0.0, logit_bias=((7, 50.0),)), P(temperature=0.0)]
    sampler = make_sampler(params, VOCAB, "triton")
    sampling = sampling_of(sampler)
    sampling.changes(sampler._table)  # and never applied
    sampling.resend()
    rows = at([0, 1], [3, 3], sources=[0, 0])
    logits = random_logits(1, VOCAB)
    assert sampler.sample(logits, rows).token_ids.tolist() == [7, int(logits.argmax())]


# ---------------------------------------------------------------- logprobs and faults


def test_logprobs_of_prompt_tokens() -> None:
    vocab = 3000
    sampler = make_sampler([P()], vocab, "triton")
    logits = random_logits(5, vocab)
    logits[2, 70] = math.nan
    logits[4, 5:] = -math.inf  # fewer are possible than were asked for
    targets, top = np.array([5, 2999, 0, 1, 4]), np.array([0, 20, 1, 5, 9])
    sampler.sample(logits[:1], at([0], [3]))
    result, faults = sampler.logprobs(logits, targets, top)
    wanted, same = make_sampler([P()], vocab, "torch").logprobs(logits, targets, top)
    assert faults.tolist() == same.tolist() == [0, 0, RowFault.NOT_FINITE, 0, 0]
    for field in dataclasses.fields(wanted):
        np.testing.assert_allclose(getattr(result, field.name), getattr(wanted, field.name), rtol=1e-6)


def test_a_row_that_is_not_finite_is_flagged_and_others_are_not() -> None:
    vocab = 1000
    params = [P(seed=i, temperature=t) for i, t in enumerate([0.0, 1.0] * 4)]
    logits = random_logits(8, vocab).bfloat16()
    sampler = make_sampler(params, vocab, "triton")
    clean = make_sampler(params, vocab, "torch").sample(logits, at(range(8), [3] * 8))
    logits[1, 999], logits[2, 0] = math.nan, -math.nan
    logits[4, 299], logits[5] = math.inf, -math.inf
    logits[6, 300] = -math.inf
    logits[7] = math.nan
    output = sampler.sample(logits, at(range(8), [3] * 8))
    none, bad, empty = RowFault.NONE, RowFault.NOT_FINITE, RowFault.NO_TOKEN_LEFT
    assert output.faults.tolist() == [none, bad, bad, none, bad, empty, none, bad]
    assert (output.token_ids[[1, 2, 4, 5, 7]] == -1).all()
    assert output.token_ids[[0, 3, 6]].tolist() == clean.token_ids[[0, 3, 6]].tolist()


# ---------------------------------------------------------------- in a graph


@dataclasses.dataclass
class Captured:
    """`sample_into` of `count` rows, recorded once, and its buffers."""

    sampler: Sampler
    logits: torch.Tensor
    rows: RowBuffers
    out: PackedSampled
    recorder: Recorder

    @classmethod
    def of(cls, params: list[P], vocab: int, rows: int, stages: Stages, prompt: list[int]) -> Captured:
        sampler = new_sampler(vocab, len(params), "triton")
        for slot, each in enumerate(params):
            sampler.add(slot, each, 0, (), prompt)
        sampling = sampling_of(sampler)
        sampling.bind(len(params))
        made = cls(
            sampler,
            torch.zeros(rows, vocab),
            row_buffers(torch.zeros(5, rows, dtype=torch.int64), torch.zeros(12, dtype=torch.int64)),
            PackedSampled.allocate(rows, HOST),
            Recorder(),
        )
        made.rows.slots.fill_(-1)
        with made.recorder.recording():
            sampling.sample_into(made.logits, made.rows, made.out, stages, append=True)
        return made

    def change(self) -> None:
        sampling = sampling_of(self.sampler)
        changes = sampling.changes(self.sampler._table)
        sampling.apply(torch.from_numpy(changes.words), changes)

    def replay(self) -> None:
        for call in self.recorder.calls:
            call()

    def counts(self, row: int) -> list[int]:
        state = sampling_of(self.sampler)._state
        assert state is not None
        return state._memory[0][row].tolist()


def test_a_captured_sampler_is_launches_alone_and_computes_what_its_buffers_say() -> None:
    vocab = 600
    params = varied_params()
    graph = Captured.of(params, vocab, 8, ALL, [1, 2, 3])  # of padding alone
    assert not any(isinstance(call, _Recorded) for call in graph.recorder.calls)  # no operation of torch
    graph.change()
    plain = make_sampler(params, vocab, "torch")
    for turn, slots in enumerate([[5, 0, 2, 3], [4, 3, 1, 5, 2]]):
        count = len(slots)
        logits = random_logits(8, vocab, seed=turn)
        rows = at(slots, [3 + turn] * count)
        # at position 4 those of the first turn have a token more
        rows.positions[[slot not in (5, 0, 2, 3) for slot in slots]] = 3
        graph.logits.copy_(logits)
        graph.rows.slots.fill_(-1)
        graph.rows.slots[:count] = torch.from_numpy(rows.slots)
        graph.rows.positions[:count] = torch.from_numpy(rows.positions)
        graph.rows.sources.copy_(torch.arange(8))
        graph.replay()
        output = PackedSampled.output(graph.out.packed.numpy().copy(), 8, 20)
        expected = plain.sample(logits, rows)
        plain.accept(rows, expected)  # tokens count, as they do in the graph
        assert output.token_ids[:count].tolist() == expected.token_ids.tolist()
        assert output.token_ids[count:].tolist() == [-1] * (8 - count)
        assert output.logprobs is not None
        assert expected.logprobs is not None
        np.testing.assert_array_equal(output.logprobs.ranks[:count], expected.logprobs.ranks)
        np.testing.assert_array_equal(output.logprobs.top_ids[:count], expected.logprobs.top_ids)


def test_a_graph_cannot_be_captured_where_the_host_looks() -> None:
    """The recorder that the test above relies on does refuse."""
    sampler = make_sampler([P()], 300, "triton")
    with pytest.raises(NotCapturable), Recorder().recording():
        sampler.sample(random_logits(1, 300), at([0], [3]))


@pytest.mark.usefixtures("programs_in_reverse")
def test_drafts_that_were_right_count_on_the_device_as_on_the_host() -> None:
    """Three slots with four drafts each: all right, the second wrong, and one whose third row has a fault."""
    vocab, drafts = 300, [[7, 8, 9, 7], [7, 6, 9, 9], [7, 8, 9, 9]]
    sampled = [[7, 8, 9, 7, 5], [7, 8, 9, 9, 5], [7, 8, 9, 9, 5]]
    params = [P(temperature=0.0, presence_penalty=1e-3) for _ in drafts]
    slots = np.repeat(np.arange(3), 5)
    rows = at(
        slots,
        np.tile(np.arange(2, 7), 3),
        drafted=np.ravel(drafts),
        draft_start=np.repeat([0, 4, 8], 5),
        draft_length=np.tile(np.arange(5), 3),
    )
    logits = torch.zeros(15, vocab)
    logits[torch.arange(15), torch.tensor(sampled).ravel()] = 9.0
    logits[12, 0] = math.nan
    graph = Captured.of(params, vocab, 16, dataclasses.replace(GREEDY, edits=True), [7, 2])
    graph.change()
    graph.logits[:15] = logits
    for name in ("slots", "positions", "draft_start", "draft_length"):
        getattr(graph.rows, name)[:15] = torch.from_numpy(getattr(rows, name))
    assert rows.drafted is not None
    graph.rows.drafted.copy_(torch.from_numpy(rows.drafted))
    graph.rows.sources[:15] = torch.arange(15)
    graph.replay()

    plain = make_sampler(params, vocab, "torch", prompt=(7, 2))
    output = plain.sample(logits, rows)
    assert graph.out.tokens[:15].tolist() == output.token_ids.tolist()
    assert plain.accept(rows, output).tolist() == [5, 2, 2]
    for slot in range(3):
        places = [s._table.records["counts"][slot] for s in (graph.sampler, plain)]
        assert graph.counts(places[0]) == plain._sampling._counts[places[1]].tolist()  # type: ignore[attr-defined]


# ---------------------------------------------------------------- cost


def test_penalties_and_top_p_on_64_rows_fit_into_a_twentieth_of_a_step() -> None:
    """By bytes, at what a copy on an H100 reaches; a step of Qwen3-8B takes 8.3 ms there."""
    unused = ("peaks", "ranks", "logprobs")
    needed = [w for w in works(64, 151_936, "bf16", 2, 132, every=True) if w.name.split()[1] not in unused]
    assert sum(work.num_bytes for work in needed) / 3.0e12 < 0.05 * 8.3e-3
