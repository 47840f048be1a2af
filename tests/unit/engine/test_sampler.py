"""The sampler against a plain reference: full sort, noise for every token, one row at a time.

The GPU's, which is interpreted here and takes a fifth of a second for a row, has tests of its own in
cuda/test_sampling.py.
"""

from __future__ import annotations

import dataclasses
import math

import numba
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from common.engine.devices.cpu import philox as philox_cpu
from common.engine.devices.cpu import sampling as sampling_cpu
from common.engine.devices.cpu import selection
from common.engine.devices.reference import philox
from common.engine.devices.reference import sampling as sampling_torch
from common.engine.sampling.records import RowFault
from common.engine.sampling.slots import SLOT, RaggedLists
from common.errors import InvalidRequest, TokenOutOfRange
from common.sampling import SamplingParams
from tests.support.sampling_rule import (
    M32,
    SHAPES,
    at,
    make_sampler,
    new_sampler,
    random_logits,
    reference_edited,
    reference_noise,
    reference_philox,
    reference_token,
    sample_many,
    shaped_logits,
)

IMPLEMENTATIONS = ("numba", "torch")
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known-answer file, philox4x32 10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((M32,) * 4, (M32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    words = tuple(np.uint64(w) for w in (*counter, *key))
    assert tuple(int(w) for w in philox_cpu.philox(*words)) == expected
    tensors = [torch.tensor(w) for w in (*counter, *key)]
    assert tuple(int(w) for w in philox.philox(tuple(tensors[:4]), tuple(tensors[4:]))) == expected
    assert tuple(reference_philox(counter, key)) == expected


def noise_table(positions, vocab, seed=7, choice=0):
    key = philox.NoiseKey(
        torch.full((positions,), seed), torch.full((positions,), choice), torch.arange(positions)
    )
    tokens = torch.arange(vocab).unsqueeze(0)
    least, holder = philox.group_noise(key, torch.arange(-(-vocab // 256)).unsqueeze(0))
    group = (tokens // 256).expand(positions, -1)
    return philox.token_noise(key, tokens, least.gather(1, group), holder.gather(1, group))


def test_noise_is_independent_exponentials():
    noise = noise_table(2000, 512)
    assert stats.kstest(noise[:, ::37].flatten().numpy(), "expon").pvalue > 1e-3
    assert stats.kstest(noise[:, :256].amin(1).numpy() * 256, "expon").pvalue > 1e-3
    # The pair statistics: sums of two tokens of a group, and of two groups, are Gamma(2).
    for pair in ((0, 1), (17, 255), (3, 300)):
        total = noise[:, pair[0]] + noise[:, pair[1]]
        assert stats.kstest(total.numpy(), "gamma", args=(2,)).pvalue > 1e-3
    correlation = np.corrcoef(noise[:, ::16].numpy().T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 5 / math.sqrt(2000)


def test_noise_depends_on_seed_choice_and_position_and_not_on_the_vocabulary():
    table = noise_table(3, 300)
    assert torch.equal(noise_table(3, 700)[:, :300], table)
    np.testing.assert_allclose(table[2].numpy(), reference_noise(7, 0, 2, 300), rtol=1e-14)
    for other in (noise_table(3, 300, seed=7 + 2**32), noise_table(3, 300, choice=1), table.roll(1, 0)):
        assert (other == table).double().mean() < 0.01


def test_mass_is_an_accurate_exponential():
    x = torch.linspace(-31, 0, 100_001)
    exact = np.exp(x.double().numpy()) * 2.0**40
    mass = sampling_torch.mass(x, torch.zeros(()), torch.ones(())).numpy()
    assert (np.abs(mass - exact) <= 3e-7 * exact + 1).all()
    assert mass[-1] == 2**40
    assert sampling_torch.mass(torch.tensor(-math.inf), torch.zeros(()), torch.ones(())) == 0


# ---------------------------------------------------------------- distribution


def exact_distribution(logits, params):
    """In float64, by the textbook."""
    scaled = logits.double().numpy() / params.temperature
    p = np.exp(scaled - scaled.max())
    p[p < params.min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    if params.top_p < 1:
        reached = np.searchsorted(np.cumsum(p[order]), params.top_p)
        p[order[reached + 1 :]] = 0
    return p / p.sum()


@both
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=2**63 + 5, temperature=0.6),
        SamplingParams(seed=3, temperature=2.5),
        SamplingParams(seed=4, top_k=7),
        SamplingParams(seed=5, top_p=0.8),
        SamplingParams(seed=6, min_p=0.1),
        SamplingParams(seed=7, temperature=1.3, top_k=40, top_p=0.9, min_p=0.02),
    ],
    ids=repr,
)
@pytest.mark.parametrize("scale", [0.2, 2.0])
def test_frequencies_follow_the_exact_distribution(params, scale, implementation):
    logits = random_logits(1, 600, scale, seed=9)[0]
    count = 4000
    tokens = sample_many(params, logits, count, implementation)
    expected = exact_distribution(logits, params) * count
    observed = np.bincount(tokens, minlength=600)
    assert observed[expected == 0].sum() == 0
    order = np.argsort(-expected)
    order = order[expected[order] > 0]
    # Cells of at least 8 expected: neighbours in probability are put together.
    cells = np.minimum(np.cumsum(expected[order]) // 8, count // 8 - 1).astype(int)
    keep = np.unique(cells, return_inverse=True)[1]
    f_obs, f_exp = np.bincount(keep, observed[order]), np.bincount(keep, expected[order])
    assert len(f_obs) >= 2
    assert stats.chisquare(f_obs, f_exp * f_obs.sum() / f_exp.sum()).pvalue > 1e-3


# ---------------------------------------------------------------- equality with the reference

params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-30, 1e-3, 0.3, 0.8, 1.0, 1.7, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 50, 257, 2000]),
    top_p=st.sampled_from([1.0, 1.0, 1e-9, 0.1, 0.5, 0.95, 1.0 - 1e-12]),
    min_p=st.sampled_from([0.0, 0.0, 1e-6, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    params=params_strategy,
    shape=st.sampled_from(SHAPES),
    vocab=st.sampled_from([2, 255, 256, 300, 1500]),
    position=st.integers(3, 2**31),
    choice=st.integers(0, 127),
    seed=st.integers(0, 2**20),
)
def test_tokens_equal_those_of_the_reference(params, shape, vocab, position, choice, seed):
    logits = shaped_logits(shape, vocab, seed)
    expected = reference_token(logits, params, choice, position)
    for implementation in IMPLEMENTATIONS:
        sampler = make_sampler([params], vocab, implementation, prompt=(0, 1), choice=choice)
        output = sampler.sample(torch.from_numpy(logits)[None], at([0], [position]))
        assert (output.faults[0], output.token_ids[0]) == (RowFault.NONE, expected), implementation


@pytest.mark.parametrize("vocab", [40_000, 151_936])
@pytest.mark.parametrize("shape", ["normal", "flat", "ties", "peaked", "bf16", "zeros"])
def test_implementations_agree_on_large_vocabularies(shape, vocab):
    params = [
        SamplingParams(seed=s, temperature=t, top_k=k, top_p=p, min_p=m)
        for s, (t, k, p, m) in enumerate(
            [
                (1.0, 0, 1.0, 0.0),
                (0.7, 0, 0.9, 0.0),
                (1.0, 50, 1.0, 0.0),
                (1.5, 3000, 0.99, 0.0),
                (1.0, 700, 1.0, 1e-3),
                (0.0, 0, 1.0, 0.0),
            ]
        )
    ]
    logits = torch.from_numpy(np.stack([shaped_logits(shape, vocab, i) for i in range(6)]))
    rows = at(range(6), range(3, 9))
    tokens = [make_sampler(params, vocab, i).sample(logits, rows).token_ids for i in IMPLEMENTATIONS]
    np.testing.assert_array_equal(*tokens)
    # Those without a cut, against the rule with noise for every token.
    noise = noise_table(4, vocab, seed=0)[3].numpy()
    assert tokens[0][0] == reference_token(logits[0].numpy(), params[0], 0, 3, noise)
    kept = logits[1].double().numpy()
    assert tokens[0][5] == int(np.argmax(logits[5].numpy()))
    assert np.isfinite(kept).all()


@pytest.mark.parametrize("decimals", [0, 2, 7])
def test_cuts_equal_those_of_a_full_sort(decimals):
    """Wherever a cut falls, ties included; with many more candidates than are ever sorted."""
    vocab = 4000
    values = np.round(shaped_logits("normal", vocab, decimals), decimals).astype(np.float32)
    order = np.lexsort((np.arange(vocab), -values))
    peaks = np.empty(-(-vocab // 256), np.float32)
    assert selection.find_peaks(values.view(np.int32), peaks)
    scratch = sampling_cpu.make_scratch(vocab, 1)
    peak, one = values.max(), np.float32(1.0)
    masses = sampling_torch.mass(torch.from_numpy(values[order]), torch.tensor(peak), torch.ones(()))
    running = masses.numpy().cumsum()

    def cut(top_k, top_p):
        return selection.cut_of(
            values,
            peaks,
            peak,
            1.0,
            one,
            top_k,
            top_p,
            -math.inf,
            scratch.near[0],
            scratch.near_ids[0],
            scratch.bins[0],
            scratch.keys[0],
        )

    for k in range(1, vocab, 7):
        assert cut(k, 1.0) == (values[order[k - 1]], order[k - 1])
    for top_p in np.linspace(0.001, 0.999, 200):
        for k in (0, 900):
            total = running[-1] if k == 0 else running[k - 1]
            reached = order[np.argmax(running >= math.ceil(top_p * float(total)))]
            assert cut(k, top_p) == (values[reached], reached)


# ---------------------------------------------------------------- independence


def varied_params(count):
    rotation = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.9, logprobs=4),
        SamplingParams(top_k=20, repetition_penalty=1.3, presence_penalty=0.4),
        SamplingParams(min_p=0.05, logit_bias=((5, 4.0),), banned_token_ids=(6, 7)),
        SamplingParams(allowed_token_ids=tuple(range(10, 90)), frequency_penalty=0.3, logprobs=2),
    ]
    return [dataclasses.replace(rotation[i % len(rotation)], seed=i) for i in range(count)]


def assert_same_rows(output, expected, at_rows):
    np.testing.assert_array_equal(output.token_ids, expected.token_ids[at_rows])
    for name in ("chosen", "ranks", "top_ids", "top"):
        got, want = getattr(output.logprobs, name), getattr(expected.logprobs, name)[at_rows]
        np.testing.assert_array_equal(got, want[:, : got.shape[1]] if want.ndim == 2 else want)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch_or_its_place(implementation, dtype):
    vocab, count = 3000, 36
    logits = random_logits(count, vocab).to(dtype)
    sampler = make_sampler(varied_params(count), vocab, implementation)
    rows = at(range(count), [3] * count)
    together = sampler.sample(logits, rows)
    order = np.random.default_rng(1).permutation(count)
    shuffled = sampler.sample(logits[torch.from_numpy(order)], at(order, [3] * count))
    assert_same_rows(shuffled, together, order)
    for row in (2, 5, 8):
        alone = sampler.sample(logits[row : row + 1], at([row], [3]))
        assert_same_rows(alone, together, [row])
    by_source = sampler.sample(logits, at(order, [3] * count, sources=order))
    assert_same_rows(by_source, together, order)


def test_tokens_do_not_depend_on_the_number_of_threads():
    vocab, count = 3000, 37
    logits = random_logits(count, vocab)
    sampler = make_sampler(varied_params(count), vocab, "numba")
    rows = at(range(count), [3] * count)
    before = numba.get_num_threads()
    try:
        outputs = []
        for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            numba.set_num_threads(threads)
            outputs.append(sampler.sample(logits, rows))
    finally:
        numba.set_num_threads(before)
    for output in outputs[1:]:
        assert_same_rows(output, outputs[0], np.arange(count))


# ---------------------------------------------------------------- edits and penalties

VOCAB = 400
token_ids = st.integers(0, VOCAB - 1)
edits_strategy = st.builds(
    SamplingParams,
    max_tokens=st.just(50),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 1000),
    logit_bias=st.lists(
        st.tuples(token_ids, st.floats(-100, 100, width=32)), max_size=5, unique_by=lambda pair: pair[0]
    ).map(tuple),
    banned_token_ids=st.lists(token_ids, max_size=5).map(tuple),
    allowed_token_ids=st.none() | st.lists(token_ids, min_size=9, unique=True).map(tuple),
    stop_token_ids=st.lists(token_ids, max_size=2).map(tuple),
    min_tokens=st.sampled_from([0, 2, 6]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
    presence_penalty=st.sampled_from([0.0, -2.0, 1.1]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.3]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    params=edits_strategy,
    prompt=st.lists(token_ids, min_size=1, max_size=30),
    appended=st.lists(token_ids, max_size=6),
    drafts=st.lists(st.sampled_from([3, 4, 5]), max_size=3),
    seed=st.integers(0, 2**20),
)
def test_edits_penalties_and_drafts_equal_the_reference(params, prompt, appended, drafts, seed):
    logits = random_logits(1 + len(drafts), VOCAB, seed=seed)
    stop_ids = [11, 12]
    start = len(prompt) + len(appended)
    expected = []
    for row in range(1 + len(drafts)):
        before = [*appended, *drafts[:row]]
        values = reference_edited(logits[row].numpy(), params, prompt, before, stop_ids)
        expected.append(reference_token(values, params, 1, start + row))
    places = range(1 + len(drafts))
    for implementation in IMPLEMENTATIONS:
        sampler = new_sampler(VOCAB, 3, implementation)
        sampler.add(2, params, 1, stop_ids, prompt, appended[:2])
        sampler.append(np.full(len(appended[2:]), 2), np.array(appended[2:], np.int64))
        # All rows in one call, as verification does.
        rows = at(
            [2] * len(places),
            [start + i for i in places],
            drafted=[9, *drafts],
            draft_start=[1] * len(places),
            draft_length=list(places),
        )
        assert sampler.sample(logits, rows).token_ids.tolist() == expected, implementation
        # One by one, each after the tokens before it were appended.
        for row in places:
            output = sampler.sample(logits[row : row + 1], at([2], [start + row]))
            assert output.token_ids.tolist() == [expected[row]]
            if row < len(drafts):
                sampler.append(np.array([2]), np.array(drafts[row : row + 1]))


@both
def test_slots_are_reused_without_a_trace(implementation):
    """Many lives in few slots: lists are compacted and counts cleared."""
    sampler = new_sampler(VOCAB, 4, implementation)
    logits = random_logits(1, VOCAB)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, VOCAB, 12).tolist() for _ in range(12)]
    expected = []
    for params, prompt in zip(varied_params(12), prompts, strict=True):
        fresh = new_sampler(VOCAB, 1, implementation)
        fresh.add(0, params, 0, (), prompt)
        expected.append(int(fresh.sample(logits, at([0], [12])).token_ids[0]))
    lives = [None] * 4
    for _ in range(100):
        slot = int(generator.integers(4))
        if lives[slot] is not None:
            sampler.append(np.full(20, slot), generator.integers(0, VOCAB, 20))
            sampler.remove(slot)
        lives[slot] = int(generator.integers(12))
        sampler.add(slot, varied_params(12)[lives[slot]], 0, (), prompts[lives[slot]])
        taken = [s for s in range(4) if lives[s] is not None]
        rows = at(taken, [12] * len(taken), sources=[0] * len(taken))
        wanted = [expected[lives[s]] for s in taken]
        assert sampler.sample(logits, rows).token_ids.tolist() == wanted


def test_ragged_lists_survive_compaction():
    records, lists = np.zeros(4, SLOT), RaggedLists("allowed")
    generator = np.random.default_rng(0)
    wanted = [[], [], [], []]
    for _ in range(200):
        slot = int(generator.integers(4))
        lists.drop(records, slot)
        wanted[slot] = generator.integers(0, 999, generator.integers(80)).tolist()
        lists.put(records[slot], wanted[slot])
        for record, ids in zip(records, wanted, strict=True):
            start = int(record["allowed_start"])
            assert lists.ids[start : start + int(record["allowed_length"])].tolist() == ids
    assert len(lists.ids) < 1000  # it does compact


def test_a_slot_refuses_what_the_vocabulary_does_not_have():
    sampler = new_sampler(VOCAB, 1)
    with pytest.raises(InvalidRequest, match="banned_token_ids"):
        sampler.add(0, SamplingParams(banned_token_ids=(VOCAB,)), 0, (), [1])
    with pytest.raises(InvalidRequest, match="allowed_token_ids"):
        sampler.add(0, SamplingParams(allowed_token_ids=(1,), banned_token_ids=(1,)), 0, (), [1])
    with pytest.raises(TokenOutOfRange):
        sampler.add(0, SamplingParams(presence_penalty=1.0), 0, (), [VOCAB])
    sampler.add(0, SamplingParams(), 0, (), [1])  # none of these took the slot


# ---------------------------------------------------------------- logprobs


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_models_own_logits(implementation, dtype):
    wanted = [None, 0, 3, 20]
    params = [
        SamplingParams(
            logprobs=n, seed=i, temperature=0.5, top_k=9, presence_penalty=1.0, logit_bias=((4, 5.0),)
        )
        for i, n in enumerate(wanted)
    ]
    logits = random_logits(4, 5000, 1.0).to(dtype)
    output = make_sampler(params, 5000, implementation).sample(logits, at(range(4), [3] * 4))
    logprobs = output.logprobs
    exact = torch.log_softmax(logits.double(), -1).numpy()
    raw = logits.float().numpy()
    assert np.isnan(logprobs.chosen[0])
    assert logprobs.ranks[0] == 0
    for row in (1, 2, 3):
        token, n = output.token_ids[row], wanted[row]
        order = np.lexsort((np.arange(5000), -raw[row]))
        assert logprobs.ranks[row] == 1 + np.flatnonzero(order == token)[0]
        np.testing.assert_allclose(logprobs.chosen[row], exact[row, token], atol=2e-6)
        assert logprobs.top_ids[row, :n].tolist() == order[:n].tolist()
        np.testing.assert_allclose(logprobs.top[row, :n], exact[row, order[:n]], atol=2e-6)
        assert (logprobs.top_ids[row, n:] == -1).all()
        assert np.isnan(logprobs.top[row, n:]).all()


@both
def test_no_row_asks_and_there_are_no_logprobs(implementation):
    sampler = make_sampler([SamplingParams()], 300, implementation)
    assert sampler.sample(random_logits(1, 300), at([0], [3])).logprobs is None


@both
def test_logprobs_of_prompt_tokens(implementation):
    sampler = new_sampler(5000, 1, implementation)
    logits = random_logits(6, 5000)
    logits[3, 70] = math.nan
    targets, top = np.array([5, 4999, 0, 1, 2, 3]), np.array([0, 20, 1, 5, 2, 3])
    result, faults = sampler.logprobs(logits, targets, top)
    assert faults.tolist() == [0, 0, 0, RowFault.NOT_FINITE, 0, 0]
    exact = torch.log_softmax(logits.double(), -1).numpy()
    for row in (0, 1, 2, 4, 5):
        np.testing.assert_allclose(result.chosen[row], exact[row, targets[row]], atol=3e-6)
        assert result.ranks[row] == 1 + (exact[row] > exact[row, targets[row]]).sum()
        best = np.argsort(-exact[row])[: top[row]]
        assert result.top_ids[row, : top[row]].tolist() == best.tolist()


@both
def test_what_cannot_be_chosen_is_not_among_the_most_likely(implementation):
    logits = torch.full((1, 300), -math.inf)
    logits[0, [7, 3]] = torch.tensor([1.0, 0.0])
    result, _ = new_sampler(300, 1, implementation).logprobs(logits, np.array([7]), np.array([5]))
    assert result.top_ids[0].tolist() == [7, 3, -1, -1, -1]
    assert np.isnan(result.top[0, 2:]).all()


# ---------------------------------------------------------------- faults


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("token", [0, 299, 777, 999])
def test_a_row_that_is_not_finite_is_flagged_and_others_are_not(implementation, dtype, token):
    params = [SamplingParams(seed=i, temperature=t, logprobs=1) for i, t in enumerate([0.0, 1.0] * 4)]
    logits = random_logits(8, 1000).to(dtype)
    sampler = make_sampler(params, 1000, implementation)
    rows = at(range(8), [3] * 8)
    clean = sampler.sample(logits, rows)
    broken = logits.clone()
    broken[1, token], broken[2, token] = math.nan, -math.nan
    broken[2, token] = -broken[1, token]  # a NaN with the other sign
    broken[4, token], broken[5] = math.inf, -math.inf
    broken[6, token] = -math.inf
    output = sampler.sample(broken, rows)
    none, bad, empty = RowFault.NONE, RowFault.NOT_FINITE, RowFault.NO_TOKEN_LEFT
    assert output.faults.tolist() == [none, bad, bad, none, bad, empty, none, none]
    assert (output.token_ids[[1, 2, 4, 5]] == -1).all()
    assert output.token_ids[[0, 3, 7]].tolist() == clean.token_ids[[0, 3, 7]].tolist()


@both
def test_a_banned_token_never_comes_back(implementation):
    params = SamplingParams(allowed_token_ids=(3, 4), seed=1, temperature=100.0, top_k=50, top_p=0.99)
    tokens = sample_many(params, torch.zeros(300), 200, implementation)
    assert set(tokens.tolist()) == {3, 4}


@both
def test_min_tokens_holds_every_stop_id_back_until_then(implementation):
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(8,))
    logits = torch.zeros(300)
    logits[7], logits[8], logits[9] = 3.0, 2.0, 1.0
    sampler = make_sampler([params], 300, implementation, stop_ids=(7,))
    rows = at([0] * 4, [3, 4, 5, 6], sources=[0] * 4)
    assert sampler.sample(logits[None], rows).token_ids.tolist() == [9, 9, 7, 7]


@both
def test_choices_of_a_request_differ_and_repeat(implementation):
    logits = torch.zeros(1000)
    first = sample_many(SamplingParams(seed=5), logits, 50, implementation, choice=0)
    second = sample_many(SamplingParams(seed=5), logits, 50, implementation, choice=1)
    again = sample_many(SamplingParams(seed=5), logits, 50, implementation, choice=1)
    assert (first != second).mean() > 0.9
    np.testing.assert_array_equal(second, again)
