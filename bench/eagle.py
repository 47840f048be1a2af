"""A head on the target's hidden states beside a draft model: `python -m bench.eagle`.

Is a head as in EAGLE (Li et al. 2024, 2025) worth a third proposer for the model that ships? Both learn
from the same texts by the same loss for the same processor time, on one thread, and are measured on texts
that were held out, by the rule of serving: a draft is right where it is the token that the target
sampled, under the noise of the position.

The head sees, at position t, the target's hidden state there and the embedding of token t + 1; one decoder
layer of its own makes of both what stands for the hidden state at t + 1, and the target's head gives
logits of token t + 2. Further drafts go on from what the head made. In training it goes on from its own
states for `PASSES` tokens, with attention to the target's states before them (HASS, Zhang et al. 2024;
EAGLE-3's training-time test), so that what is measured, position by position, is what was trained.

Cost: one step of each by the engine's own layers, one row at `CONTEXT` positions, in turns, in processor
time. The head's is that of one layer and the output head of its shape, and of the product that joins its
inputs: what a good implementation would take, not what this script takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from common.distill import beginnings, folder, start, texts
from common.distill.network import FeedForward, Shape, rope_tables, rotate
from common.distill.optimization import descend, optimizers_of, set_rate, update_average
from common.distill.texts import Lesson, Text
from common.distill.training import Training, divergence, train
from common.engine import Engine, SamplingParams
from common.engine.interface import Chunks
from common.engine.model.decoder import Model
from common.engine.model.weights import RandomWeights
from common.engine.runner.batch import lay_out
from common.engine.runner.draft_step import logits_after
from common.engine.runner.model_runner import ModelRunner
from common.engine.sampling.records import SampleRows
from common.model_files import SHIPPED_MODEL
from common.model_folder.description import describe_model, read_config
from common.model_folder.model_config import ModelConfig, parse_model_config

LENGTH = 256
PASSES = 2  # that are trained
DRAFTED = 8
CONTEXT = 128
SLOT = 100  # of the sampler; the engine closes its own when it goes on
HELD_OUT = 48  # texts at each temperature
TEMPERATURES = (0.0, 0.8)
BATCH = 6144  # tokens
SETTINGS = {"enable_prefix_caching": False, "threads": 1}
FEATURE_WEIGHT = 0.1  # of the distance to the target's states, beside the divergence


class Head(nn.Module):
    """`features` `[batch, n, hidden]` of the target, `ids` `[batch, n]` of the tokens after each."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.joined = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=False)
        self.input_norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.qkv = nn.Linear(shape.hidden_size, query + 2 * key, bias=False)
        self.output = nn.Linear(query, shape.hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.mlp = FeedForward(shape)
        self.sizes = (query, key, key)
        with torch.no_grad():  # at first it takes the state as it is
            self.joined.weight[:, : shape.hidden_size].mul_(0.1)
            self.joined.weight[:, shape.hidden_size :].copy_(torch.eye(shape.hidden_size))
        cos, sin = rope_tables(shape, LENGTH)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, features: Tensor, embedded: Tensor, passes: int) -> list[Tensor]:
        """What stands for the states after each position, by each of `passes`: the first goes on from the
        target's states, the next one from what the one before made of the position before."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        made: list[Tensor] = []
        for _ in range(passes):
            x = self.joined(torch.cat((embedded, features), dim=-1))
            q, k, v = (self._heads(part) for part in self.qkv(self.input_norm(x)).split(self.sizes, dim=-1))
            length = x.shape[1]
            cos, sin = self.cos[:length].to(q.dtype), self.sin[:length].to(q.dtype)
            groups = q.shape[1] // k.shape[1]
            keys.append(rotate(k, cos, sin).repeat_interleave(groups, dim=1))
            values.append(v.repeat_interleave(groups, dim=1))
            x = x + self.output(self._attended(rotate(q, cos, sin), keys, values).transpose(1, 2).flatten(2))
            x = x + self.mlp(self.mlp_norm(x))
            made.append(x)
            features = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return made

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)

    def _attended(self, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """In pass s, positions t - s + 1 and before are seen as the first pass made them, t - i as pass
        s - i did."""
        own = len(keys) - 1  # positions that were made by passes after the first
        if not own:
            return F.scaled_dot_product_attention(q, keys[0], values[0], is_causal=True)
        length, scale = q.shape[2], q.shape[3] ** -0.5
        at = torch.arange(length)
        scores = q @ keys[0].transpose(2, 3)
        scores = scores.masked_fill(at[None] > at[:, None] - own, -torch.inf)
        shifted = [F.pad(keys[own - i], (0, 0, i, 0))[:, :, :length] for i in range(own)]
        near = torch.stack([(q * key).sum(-1) for key in shifted], dim=-1)
        early = at[:, None] < torch.arange(own)  # before the first position
        near = near.masked_fill(early, -torch.inf)
        weights = (torch.cat((scores, near), dim=-1).float() * scale).softmax(-1).to(q.dtype)
        out = weights[..., :length] @ values[0]
        for i in range(own):
            out = out + weights[..., length + i, None] * F.pad(values[own - i], (0, 0, i, 0))[:, :, :length]
        return out


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Of the target: what the head uses as it is."""

    embedding: Tensor  # [vocab, hidden]; its head, too
    norm: Tensor
    eps: float

    def logits(self, states: Tensor) -> Tensor:
        return F.linear(F.rms_norm(states, self.norm.shape, self.norm, self.eps), self.embedding)


def states(runner: ModelRunner, ids: Sequence[int]) -> Tensor:
    """Hidden states before the last norm, `[positions, hidden]`."""
    chunks = _prompt(runner, ids)
    batch = lay_out(chunks, chunks.lengths, runner.facts.layout.block_size, runner.backend.row_plan)
    hidden = runner.model.forward(runner.backend.prepare(batch.rows), runner.cache)
    return hidden[torch.from_numpy(batch.sampled)].clone()


def _prompt(runner: ModelRunner, ids: Sequence[int]) -> Chunks:
    return Chunks.of_prompt(ids, runner.facts.layout.block_size)


def train_head(
    head: Head, frozen: Frozen, lesson: Lesson, features: Tensor, seconds: float
) -> tuple[int, float]:
    """Steps, and the last loss of the first pass in nats. The head keeps the average of its weights."""
    average = {name: p.detach().clone() for name, p in head.named_parameters()}
    optimizers = optimizers_of(head, 0.02)
    choice = random.Random("eagle")
    began, step, smooth = time.process_time(), 0, 0.0
    while (progress := (time.process_time() - began) / seconds) < 1.0:
        set_rate(optimizers, step, progress)
        rows = choice.sample(range(len(lesson.ids)), min(len(lesson.ids), BATCH // LENGTH))
        ids, valid = lesson.ids[rows].long(), lesson.valid[rows][:, 1:]
        tokens, logprobs = lesson.tokens[rows][:, 1:], lesson.logprobs[rows][:, 1:]
        wanted = features[rows]
        with torch.autocast("cpu", torch.bfloat16):
            made = head(wanted[:, :-1].float(), frozen.embedding[ids[:, 1:]], PASSES)
        losses = []
        for number, made_states in enumerate(made):
            right = valid.clone()
            right[:, :number] = False
            with torch.autocast("cpu", torch.bfloat16):
                logits = frozen.logits(made_states.float())[right]
            loss = divergence(logits, tokens[right], logprobs[right]).mean()
            near = F.smooth_l1_loss(made_states[right].float(), wanted[:, 1:][right].float())
            losses.append(loss + FEATURE_WEIGHT * near)
            if not number:
                smooth += (float(loss.detach()) - smooth) / min(step + 1, 20)
        torch.autograd.backward(torch.stack(losses).mean())
        descend(head, optimizers)
        update_average(average, head, step)
        step += 1
    head.load_state_dict(average, strict=False)
    return step, smooth


# ── Acceptance ───────────────────────────────────────────────────────────────────────────────────


def chosen(runner: ModelRunner, logits: Tensor, text: Text, first: int) -> np.ndarray:
    """The tokens at positions from `first` on, by the sampler of serving."""
    params = SamplingParams(temperature=text.temperature, seed=text.seed)
    runner.sampler.add(SLOT, params, 0, (), (), prompt_len=len(text.prompt))
    count = logits.shape[0]
    rows = SampleRows(slots=np.full(count, SLOT), positions=np.arange(first, first + count))
    tokens: np.ndarray = runner.sampler.sample(logits.float(), rows).token_ids
    runner.sampler.remove(SLOT)
    return tokens


def right_of_head(head: Head, frozen: Frozen, target: ModelRunner, text: Text) -> np.ndarray:
    """bool `[DRAFTED, reply]`: whether the draft number s of a step, if it is of this token, is right."""
    ids = torch.tensor(text.ids)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = states(target, text.ids)[None, :-2].float()
        made = head(features, frozen.embedding[ids[None, 1:-1]], DRAFTED)
        logits = [frozen.logits(one[0].float()) for one in made]
    begin = len(text.prompt) + 1  # the first one is the target's
    right = np.zeros((DRAFTED, len(text.reply)), np.bool_)
    for number, of_pass in enumerate(logits):  # row i is of token i + 2
        tokens = chosen(target, of_pass[begin - 2 :], text, begin)
        right[number, 1:] = tokens == np.array(text.ids[begin:])
        right[number, 1 : 1 + number] = False  # these have no such draft
    return right


def right_of_draft(draft: ModelRunner, text: Text) -> np.ndarray:
    chunks, begin = _prompt(draft, text.ids[:-1]), len(text.prompt) + 1
    count = np.array([len(text.ids) - begin])
    logits = logits_after(draft.model, draft.backend, chunks, count, draft.cache)
    right = np.zeros((DRAFTED, len(text.reply)), np.bool_)
    right[:, 1:] = chosen(draft, logits, text, begin) == np.array(text.ids[begin:])
    return right


def by_position(each: Sequence[np.ndarray], most: int) -> tuple[list[float], float]:
    """Shares of steps of `most` drafts in which the first 1, 2, … are right, and tokens per step."""
    reached, steps, tokens = np.zeros(most), 0, 0
    for right in each:
        at, end = 1, right.shape[1]
        while at < end:
            count = 0
            while count < most and at + count < end and right[count, at + count]:
                count += 1
            reached[:count] += 1
            steps, at = steps + 1, at + count + 1
        tokens += end - 1
    return (reached / steps).tolist(), tokens / steps


# ── Cost ─────────────────────────────────────────────────────────────────────────────────────────


def seconds_of(works: Sequence[Callable[[], object]]) -> list[float]:
    """Medians of each, in turns."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(300):
        for work, taken in zip(works, times, strict=True):
            began = time.process_time()
            work()
            taken.append(time.process_time() - began)
    return [statistics.median(taken[20:]) for taken in times]


def step_of(model: Model, runner: ModelRunner, rows: int) -> Callable[[], object]:
    """A step of `rows` tokens of one sequence, and their logits."""
    size = runner.facts.layout.block_size
    chunks = Chunks(
        num_generated=1,
        starts=np.array([CONTEXT]),
        lengths=np.array([rows]),
        token_ids=np.full(rows, 300, np.int64),
        generated_tables=np.arange((CONTEXT + rows) // size + 1, dtype=np.int32)[None],
        prompt_tables=np.zeros((0, 1), np.int32),
    )
    return lambda: logits_after(model, runner.backend, chunks, chunks.lengths, runner.cache)


def head_step(runner: ModelRunner, config: ModelConfig, inner: int) -> Callable[[], object]:
    one = dataclasses.replace(config, num_layers=1, windows=(0,), intermediate_size=inner)
    source = RandomWeights(0, tied=True, device=runner.backend.device)
    layer = step_of(Model(one, runner.backend, source, 512), runner, 1)
    weight = runner.backend.memory(config.hidden_size, 2 * config.hidden_size)
    source.fill("joined", (config.hidden_size, 2 * config.hidden_size), weight)
    joined = runner.backend.linear(weight, None)
    padded = runner.backend.row_plan.padded_generated(1)
    x = torch.zeros(padded, 2 * config.hidden_size, dtype=runner.backend.dtype)

    def step() -> None:
        joined(x, padded)
        layer()

    return step


@dataclasses.dataclass(frozen=True)
class Measured:
    name: str
    trained: int  # parameters
    products: int  # weights that a draft is multiplied with
    step: Callable[[], object]
    right: dict[float, list[np.ndarray]]  # by temperature


def report(found: Sequence[Measured], target: ModelRunner) -> None:
    works = [step_of(target.model, target, 1), step_of(target.model, target, 1 + DRAFTED)]
    one, many, *each = seconds_of([*works, *(measured.step for measured in found)])
    print(f"the target: {1e6 * one:.0f} us for a token, {1e6 * many:.0f} us for {1 + DRAFTED}")
    for measured, took in zip(found, each, strict=True):
        print(f"\n{measured.name}: {measured.trained:,} parameters trained")
        cost = f"{1e6 * took:.0f} us, {took / one:.3f} of the target's token"
        print(f"  a draft: {measured.products:,} products, {cost}")
        for temperature, right in measured.right.items():
            shares, tokens = by_position(right, DRAFTED)
            gains = {}
            for most in range(1, DRAFTED + 1):
                verified = one + (many - one) * most / DRAFTED
                gains[most] = by_position(right, most)[1] * one / (verified + most * took)
            best = max(gains, key=lambda most: gains[most])
            shown = " ".join(f"{share:.2f}" for share in shares)
            print(f"  T={temperature:g}: accepted up to 1, 2, …: {shown}; {tokens:.2f} tokens a step")
            print(f"         best with {best} drafts: {gains[best]:.2f} times as fast as without")


def draft_model(
    lesson: Lesson, config: ModelConfig, held_out: dict[float, list[Text]], steps: int
) -> tuple[Measured, float]:
    """And the processor time that its training took."""
    shape = start.shape_for(config, None, None)
    draft = start.fresh(shape, config, SHIPPED_MODEL, LENGTH)
    began = time.process_time()
    weights = train(draft, lesson, None, Training(steps, None, BATCH, 0), lambda _: None, lambda: False)
    seconds = time.process_time() - began
    with tempfile.TemporaryDirectory() as place:
        folder.write_draft(Path(place), SHIPPED_MODEL, read_config(SHIPPED_MODEL), shape, weights)
        alone = Engine.load(place, max_num_seqs=2, max_model_len=512, **SETTINGS).runner
    assert isinstance(alone, ModelRunner)
    right = {t: [right_of_draft(alone, text) for text in some] for t, some in held_out.items()}
    products = parse_model_config(folder.config_of(shape, {})).num_linear_parameters
    name = f"draft model, {steps} steps"
    return Measured(name, shape.num_parameters, products, step_of(alone.model, alone, 1), right), seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="of the draft model; heads get as much time")
    parser.add_argument("--texts", type=int, default=768)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = parse_model_config(read_config(SHIPPED_MODEL, required=True))
    engine = Engine.load(SHIPPED_MODEL, max_model_len=512, **SETTINGS)
    target = engine.runner
    assert isinstance(target, ModelRunner)
    known = beginnings.by_target(engine, describe_model(SHIPPED_MODEL), options.texts, 0)

    def write(some: Sequence[beginnings.Beginning], count: int, *temperatures: float) -> list[Text]:
        written = texts.write(engine, some, count, LENGTH, temperatures, 0, lambda _: None)
        return [text for text in written if len(text.reply) > 1]

    rows = texts.packed([x.ids for x in write(known.shown, options.texts, 0.0, 0.6, 0.8, 1.0)], LENGTH)
    held_out = {t: write(known.held_out, HELD_OUT, t) for t in TEMPERATURES}
    lesson = texts.score(target, rows, LENGTH, lambda _: None)
    features = torch.zeros(len(rows), LENGTH, config.hidden_size, dtype=torch.bfloat16)
    for index, row in enumerate(rows):
        features[index, : len(row)] = states(target, row)

    draft, seconds = draft_model(lesson, config, held_out, options.steps)
    print(f"{int(lesson.valid.sum()):,} tokens of the target's own text; {seconds:.0f} s of training each")
    found = [draft]
    tensors = load_file(SHIPPED_MODEL / "model.safetensors")
    embedding, norm = (tensors[f"model.{name}.weight"].float() for name in ("embed_tokens", "norm"))
    frozen = Frozen(embedding, norm, config.rms_norm_eps)
    for name, inner in (("head of a target's layer", config.intermediate_size), ("slim head", 160)):
        torch.manual_seed(0)
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        head = Head(Shape(config.vocab_size, config.hidden_size, 1, *heads, inner))
        steps, loss = train_head(head, frozen, lesson, features, seconds)
        print(f"{name}: {steps} steps, loss {loss:.3f} nats", flush=True)
        right = {t: [right_of_head(head, frozen, target, x) for x in some] for t, some in held_out.items()}
        trained = sum(p.numel() for p in head.parameters())
        step = head_step(target, config, inner)
        found.append(Measured(f"{name}, {steps} steps", trained, trained + embedding.numel(), step, right))
    report(found, target)


if __name__ == "__main__":
    main()
