"""Train the tokenizer and the target model: `python -m deploy.model.train --help`.

Owns the recipe of the target: batch shapes, optimizers, schedule, and a state file from which a
stopped run goes on with the same data, weights and random numbers. `checkpoint.py` makes a folder
of the state file, at any time.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from deploy.model.checkpoint import load_state, save_state
from deploy.model.corpus import Stream, read_runs, train_tokenizer
from deploy.model.network import TARGET, Llama

# (rows, length) of a step, and how often: about the same number of tokens each.
BATCHES = ((24, 256), (6, 1024), (3, 2048))
SHARES = (0.80, 0.12, 0.08)
WARM_UP = 42  # steps


def window_loss(model: nn.Module, window: Tensor) -> Tensor:
    """Mean next-token loss in nats of a window `[batch, length + 1]`, in bf16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(window[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


def optimizers_of(model: nn.Module, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices, Adam for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    table = [p for name, p in named if "embed" in name]
    norms = [p for _, p in named if p.ndim < 2]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=weight_decay)
    adam = torch.optim.Adam(
        [{"params": table, "lr": 4e-3}, {"params": norms, "lr": 2e-3}], betas=(0.9, 0.98), fused=True
    )
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def set_rate(optimizers: list[torch.optim.Optimizer], step: int, steps: int) -> None:
    """Warm up, hold to 35%, then fall along a cosine to a hundredth of the peak."""
    rise = min(1.0, (step + 0.02) / WARM_UP)
    fall = 0.5 + 0.5 * math.cos(math.pi * max(0.0, step / steps - 0.35) / 0.65)
    factor = rise * (0.01 + 0.99 * fall)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def descend(model: nn.Module, loss: Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
    """One step down the gradient of `loss`, clipped to a norm of 1."""
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def update_average(average: dict[str, Tensor], model: nn.Module, step: int) -> None:
    """Exponential moving average of the weights; its memory grows to 100 steps."""
    keep = min(0.99, (step + 1) / (step + 10))
    for name, parameter in model.named_parameters():
        average[name].lerp_(parameter.detach(), 1 - keep)


@torch.no_grad()
def held_out_loss(model: Llama, windows: list[Tensor]) -> float:
    model.eval()
    loss = sum(float(window_loss(model, window)) for window in windows) / len(windows)
    model.train()
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text-dir", type=Path, default=Path("../shared/data/text"))
    parser.add_argument("--out", type=Path, default=Path("build/model"), help="working folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1, help="part of what a seed reproduces")
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    runs = read_runs(options.text_dir)
    training = [run for run in runs if not run.held_out]
    held_out = [run for run in runs if run.held_out]
    tokenizer_path = options.out / "tokenizer.json"
    if not tokenizer_path.exists():
        train_tokenizer(runs, TARGET.vocab_size).save(str(tokenizer_path))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))

    short = Stream(training, tokenizer, options.seed, 48, 512)
    long = Stream(training, tokenizer, options.seed, 700, 2400)
    validation = Stream(held_out, tokenizer, options.seed, 48, 512, chat_share=0.0)
    windows = [validation.take(24, 256) for _ in range(6)]

    model = Llama(TARGET, options.dropout)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = optimizers_of(model, options.weight_decay)
    state_path, first, seconds = options.out / "target.pt", 0, 0.0
    if state_path.exists():
        state = load_state(state_path)
        model.load_state_dict(state["model"])
        average = state["average"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        short.seek(*state["short"])
        long.seek(*state["long"])
        torch.set_rng_state(state["random"])
        first, seconds = state["step"], state["seconds"]
        print(f"going on from step {first}", flush=True)

    step_loss = window_loss if options.eager else torch.compile(window_loss, dynamic=False)
    judge = Llama(TARGET)
    started, running = time.monotonic() - seconds, 0.0
    for step in range(first, options.steps):
        set_rate(optimizers, step, options.steps)
        rows, length = random.Random(f"{options.seed}/{step}").choices(BATCHES, SHARES)[0]
        window = (short if length == 256 else long).take(rows, length)
        loss = step_loss(model, window)
        descend(model, loss, optimizers)
        update_average(average, model, step)
        running += (float(loss.detach()) - running) / min(step - first + 1, 50)
        done = step + 1
        if done % 20 == 0:
            seconds = time.monotonic() - started
            print(f"step {done} loss {running:.3f} seconds {seconds:.0f}", flush=True)
        if done % options.save_every == 0 or done == options.steps:
            judge.load_state_dict(average)
            judged = held_out_loss(judge, windows)
            print(f"step {done} held out {judged:.4f} nats/token", flush=True)
            save_state(
                state_path,
                {
                    "model": model.state_dict(),
                    "average": average,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "short": (short.epoch, short.offset),
                    "long": (long.epoch, long.offset),
                    "random": torch.get_rng_state(),
                    "step": done,
                    "seconds": time.monotonic() - started,
                    "shape": TARGET,
                },
            )


if __name__ == "__main__":
    main()
