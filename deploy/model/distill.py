"""Distil the draft from the target's checkpoint: `python -m deploy.model.distill --help`.

Owns the recipe of the draft. It is worth what it predicts of the target, so it learns the target's
whole distribution (forward KL, Hinton et al. 2015), on text of the corpus and on text that the
target itself wrote, which is what a draft sees when it serves.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from deploy.model.checkpoint import load_state, read_checkpoint, save_state
from deploy.model.corpus import BOS, Run, Stream, documents, read_runs
from deploy.model.network import DRAFT, Llama, Past
from deploy.model.train import descend, optimizers_of, set_rate, update_average

PROMPT_LENGTHS = (1, 12, 48)  # tokens
TEMPERATURES = (0.0, 0.6, 0.8, 1.0)
SAMPLE_LENGTH = 257
# (source, rows, length) of a step, and how often.
BATCHES = (("samples", 24, 256), ("short", 24, 256), ("long", 3, 2048))
SHARES = (0.5, 0.4, 0.1)


@torch.no_grad()
def draw(model: Llama, prompts: Tensor, temperatures: Tensor, length: int) -> Tensor:
    """Continue `[batch, n]` prompts to `[batch, length]`; a temperature of 0 is greedy.

    An ended text is followed by a new one, as in training.
    """
    model = copy.deepcopy(model).to(torch.bfloat16)
    past = Past(model.shape, prompts.shape[0], length, torch.bfloat16)
    ids, last = prompts, prompts
    cool = temperatures.clamp(min=1e-3)[:, None]
    while ids.shape[1] < length:
        logits = model(last, past)[:, -1].float()
        noise = -torch.empty_like(logits).exponential_().log()  # Gumbel
        last = (logits / cool + noise * (temperatures > 0)[:, None]).argmax(-1, keepdim=True)
        ids = torch.cat((ids, last), dim=1)
    return ids


def draw_samples(model: Llama, runs: list[Run], tokenizer: Tokenizer, seed: int, count: int) -> Tensor:
    """`[count, 257]` ids of the target's own: beginnings from the corpus, and the rest drawn."""
    choice = random.Random(f"{seed}/samples")
    texts = documents(runs, choice, 48, 512, chat_share=0.5)
    encoded = [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]
    beginnings = [ids for ids in encoded if len(ids) >= max(PROMPT_LENGTHS)]
    assert all(ids[0] == tokenizer.token_to_id(BOS) for ids in beginnings)
    pieces: list[Tensor] = []
    batch = 192
    for index in range(count // batch):
        n = PROMPT_LENGTHS[index % len(PROMPT_LENGTHS)]
        prompts = torch.tensor([ids[:n] for ids in choice.choices(beginnings, k=batch)])
        # A greedy text from an empty prompt is one text only: draw those instead.
        allowed = TEMPERATURES if n > 1 else TEMPERATURES[1:]
        temperatures = torch.tensor(choice.choices(allowed, k=batch))
        pieces.append(draw(model, prompts, temperatures, SAMPLE_LENGTH))
    return torch.cat(pieces)


def divergence(draft: nn.Module, target: nn.Module, ids: Tensor) -> Tensor:
    """Mean KL(target || draft) in nats of next-token distributions after `ids` `[batch, n]`."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            wanted = target(ids)
        guessed = draft(ids)
    wanted = F.log_softmax(wanted.flatten(0, 1).float(), dim=-1)
    guessed = F.log_softmax(guessed.flatten(0, 1).float(), dim=-1)
    return (wanted.exp() * (wanted - guessed)).sum(-1).mean()


@torch.no_grad()
def agreement(draft: Llama, target: Llama, windows: Tensor) -> float:
    """Share of positions of `[batch, n]` ids at which both would choose the same next token."""
    draft.eval()
    with torch.autocast("cpu", torch.bfloat16):
        same = draft(windows).argmax(-1) == target(windows).argmax(-1)
    draft.train()
    return float(same.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text-dir", type=Path, default=Path("../shared/data/text"))
    parser.add_argument("--target", type=Path, default=Path("common/models/pdq-5m"))
    parser.add_argument("--out", type=Path, default=Path("build/model"), help="working folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--samples", type=int, default=1152, help="texts drawn from the target")
    parser.add_argument("--threads", type=int, default=1, help="part of what a seed reproduces")
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    target, tokenizer = (checkpoint := read_checkpoint(options.target)).model, checkpoint.tokenizer
    target.requires_grad_(False)
    runs = read_runs(options.text_dir)
    training = [run for run in runs if not run.held_out]
    held_out = [run for run in runs if run.held_out]
    short = Stream(training, tokenizer, options.seed + 1, 48, 512)
    long = Stream(training, tokenizer, options.seed + 1, 700, 2400)
    validation = Stream(held_out, tokenizer, options.seed, 48, 512, chat_share=0.0).take(48, 256)

    draft = Llama(DRAFT)
    average = {name: p.detach().clone() for name, p in draft.named_parameters()}
    optimizers = optimizers_of(draft, weight_decay=0.02)
    state_path, first, seconds = options.out / "draft.pt", 0, 0.0
    started = time.monotonic()
    if state_path.exists():
        state = load_state(state_path)
        draft.load_state_dict(state["model"])
        average, samples = state["average"], state["samples"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        short.seek(*state["short"])
        long.seek(*state["long"])
        first, seconds = state["step"], state["seconds"]
        print(f"going on from step {first}", flush=True)
    else:
        samples = draw_samples(target, training, tokenizer, options.seed, options.samples)
        print(f"drew {samples.numel()} tokens, {time.monotonic() - started:.0f} s", flush=True)

    own, shown = samples[-48:, :-1], samples[:-48]
    step_loss = divergence if options.eager else torch.compile(divergence, dynamic=False)
    judge = Llama(DRAFT)
    started = started - seconds
    for step in range(first, options.steps):
        set_rate(optimizers, step, options.steps)
        choice = random.Random(f"{options.seed}/draft/{step}")
        source, rows, length = choice.choices(BATCHES, SHARES)[0]
        if source == "samples":
            ids = shown[choice.sample(range(len(shown)), rows)][:, :length]
        else:
            ids = (short if source == "short" else long).take(rows, length)[:, :-1].contiguous()
        loss = step_loss(draft, target, ids)
        descend(draft, loss, optimizers)
        update_average(average, draft, step)
        done = step + 1
        if done % 20 == 0:
            seconds = time.monotonic() - started
            print(f"step {done} {source} {float(loss.detach()):.3f} {seconds:.0f} s", flush=True)
        if done % options.save_every == 0 or done == options.steps:
            judge.load_state_dict(average)
            print(
                f"step {done} agreement: held out {agreement(judge, target, validation):.4f},"
                f" the target's own text {agreement(judge, target, own):.4f}",
                flush=True,
            )
            save_state(
                state_path,
                {
                    "model": draft.state_dict(),
                    "average": average,
                    "samples": samples,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "short": (short.epoch, short.offset),
                    "long": (long.epoch, long.offset),
                    "step": done,
                    "seconds": time.monotonic() - started,
                    "shape": DRAFT,
                },
            )


if __name__ == "__main__":
    main()
