"""The sampler's rule by a plain reference: full sort, noise for every token, one row at a time; and builders.

Knows no device: `SAMPLINGS` says which implementations there are.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch

from common.engine.devices.cpu.sampling import NumbaSampling
from common.engine.devices.cuda.sampling import CudaSampling
from common.engine.devices.reference import sampling as sampling_torch
from common.engine.runner.sampler import Sampler
from common.engine.sampling.records import SampleRows

M32 = 0xFFFFFFFF
HOST = torch.device("cpu")
SAMPLINGS = {
    "numba": NumbaSampling,
    "torch": lambda vocab: sampling_torch.TorchSampling(vocab, HOST),
    "triton": lambda vocab: CudaSampling(vocab, HOST, max_rows=64),
}


def reference_philox(counter, key):
    """Python integers, from the paper's figure."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & M32, (a >> 32) ^ c[3] ^ k[1], a & M32]
        k = [(k[0] + 0x9E3779B9) & M32, (k[1] + 0xBB67AE85) & M32]
    return c


def reference_exponential(words):
    bits = (words[0] << 20) | (words[1] >> 12)
    return -math.log((bits + 0.5) * 2.0**-52)


def reference_noise(seed, choice, position, vocab):
    """Exponentials of all tokens."""
    key = seed & M32, seed >> 32
    noise = np.empty(vocab)
    for group in range(-(-vocab // 256)):
        words = reference_philox((group, position, choice, 0x70647147), key)
        least, holder = reference_exponential(words) / 256, words[2] >> 24
        for token in range(group * 256, min(group * 256 + 256, vocab)):
            own = reference_philox((token, position, choice, 0x70647154), key)
            other = least + reference_exponential(own)
            noise[token] = least if token % 256 == holder else other
    return noise


def reference_edited(logits, params, prompt, before, stop_ids):
    f = np.float32
    out = logits.astype(np.float32)
    if params.allowed_token_ids is not None:
        keep = set(params.allowed_token_ids)
        out = np.array([v if i in keep else f(-np.inf) for i, v in enumerate(out)], np.float32)
    for token, bias in params.logit_bias:
        out[token] += f(bias)
    out[list(params.banned_token_ids)] = -np.inf
    if len(before) < params.min_tokens:
        out[list({*stop_ids, *params.stop_token_ids})] = -np.inf
    counts = Counter(before)
    penalty = f(params.repetition_penalty)
    for token in {*prompt, *before}:
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
        if counts[token]:
            out[token] = out[token] - f(params.frequency_penalty) * f(counts[token])
            out[token] = out[token] - f(params.presence_penalty)
    return out


def reference_kept(values, params):
    """The ids that may be chosen, most likely first."""
    order = sorted((i for i in range(len(values)) if values[i] > -np.inf), key=lambda i: (-values[i], i))
    peak = values.max()
    if params.min_p > 0:
        bound = np.float32(np.float64(peak) + params.temperature * math.log(params.min_p))
        order = [i for i in order if values[i] >= bound]
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1:
        inverse = min(1.0 / params.temperature, float(np.finfo(np.float32).max))
        masses = sampling_torch.mass(
            torch.from_numpy(values[order]), torch.tensor(peak), torch.tensor(inverse).float()
        ).tolist()
        target = math.ceil(params.top_p * float(sum(masses)))
        running = np.cumsum(masses)
        order = order[: int(np.argmax(running >= target)) + 1]
    return order


def reference_token(values, params, choice, position, noise=None):
    if params.temperature == 0.0:
        return int(np.argmax(values))
    kept = np.array(sorted(reference_kept(values, params)))
    if noise is None:
        noise = reference_noise(params.seed, choice, position, len(values))
    with np.errstate(over="ignore"):
        lead = (values[kept].astype(np.float64) - np.float64(values.max())) / params.temperature
    return int(kept[np.argmax(lead - np.log(noise[kept]))])


# ---------------------------------------------------------------- builders


def new_sampler(vocab, slots, implementation="numba"):
    return Sampler(vocab, slots, SAMPLINGS[implementation](vocab))


def make_sampler(params, vocab, implementation, prompt=(1, 2, 3), stop_ids=(), choice=0):
    """One slot per entry of `params`."""
    sampler = new_sampler(vocab, len(params), implementation)
    for slot, each in enumerate(params):
        sampler.add(slot, each, choice, stop_ids, prompt)
    return sampler


def at(slots, positions, **drafts):
    as_ids = lambda values: np.asarray(values, np.int64)  # noqa: E731
    return SampleRows(
        as_ids(slots), as_ids(positions), **{name: as_ids(value) for name, value in drafts.items()}
    )


def sample_many(params, logits, count, implementation, choice=0):
    """Tokens of one sequence at positions 3, 4, …, all from the same logits row."""
    sampler = make_sampler([params], len(logits), implementation, choice=choice)
    rows = at(np.zeros(count), np.arange(3, 3 + count), sources=np.zeros(count))
    return sampler.sample(logits[None], rows).token_ids


def random_logits(rows, vocab, scale=3.0, seed=0):
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


SHAPES = ("normal", "flat", "ties", "peaked", "bf16", "banned", "steep", "zeros")


def shaped_logits(shape, vocab, seed):
    g = np.random.default_rng(seed)
    x = g.standard_normal(vocab).astype(np.float32) * np.float32(3)
    if shape == "flat":
        x = x * np.float32(1e-3)
    elif shape == "ties":
        x = np.round(x)
    elif shape == "peaked":
        x[g.integers(vocab)] += np.float32(12)
    elif shape == "bf16":
        x = torch.from_numpy(x).bfloat16().float().numpy()
    elif shape == "banned":
        x[g.random(vocab) < 0.7] = -np.inf
        x[g.integers(vocab)] = 1.0
    elif shape == "steep":
        x = x * np.float32(1e30)
    elif shape == "zeros":
        x = np.where(g.random(vocab) < 0.5, np.float32(0.0), np.float32(-0.0))
    return x.astype(np.float32)
