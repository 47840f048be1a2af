"""Train the tokenizer and the target model: `python -m deploy.model.train --help`.

Owns the recipe of the target: batch shapes, optimizers, schedule, and a state file from which a
stopped run goes on with the same data, weights and random numbers. `checkpoint.py` makes a folder
of the state file, at any time.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from common.distill.network import Llama, Shape
from common.distill.optimization import descend, optimizers_of, set_rate, update_average
from deploy.model.checkpoint import load_state, save_state
from deploy.model.corpus import Stream, read_runs, train_tokenizer

# (rows, length) of a step, and how often: about the same number of tokens each.
BATCHES = ((24, 256), (6, 1024), (3, 2048))
SHARES = (0.80, 0.12, 0.08)
TARGET = Shape()


def window_loss(model: nn.Module, window: Tensor) -> Tensor:
    """Mean next-token loss in nats of a window `[batch, length + 1]`, in bf16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(window[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


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
        set_rate(optimizers, step, step / options.steps)
        rows, length = random.Random(f"{options.seed}/{step}").choices(BATCHES, SHARES)[0]
        window = (short if length == 256 else long).take(rows, length)
        loss = step_loss(model, window)
        torch.autograd.backward(loss)
        descend(model, optimizers)
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
