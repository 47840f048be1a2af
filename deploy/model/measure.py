"""Measure the shipped checkpoints: `python -m deploy.model.measure --help`.

Owns the numbers and samples of the model cards. It loads the target through transformers as anybody would,
in float32, and so also checks that what training wrote is an ordinary checkpoint. Drafts are measured as
`pdq distill` measures them, on beginnings that no training has seen; several, beside each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.distill import texts
from common.distill.acceptance import acceptance
from common.engine import Engine
from common.engine.runner.loaded_model import LoadedModel
from deploy.model.corpus import ASSISTANT, documents, read_runs

POSITIONS = (0, 64, 256, 1024, 2048)
TEXT_PROMPTS = (
    "Once upon a time there was a king who had three daughters.",
    "ROMEO:\nWhat light is this?\n\n",
    "My fellow citizens, tonight I ask the Congress",
)
CHAT_PROMPTS = (
    "Tell me a story about a wolf.",
    "Why is education important?",
    "My lord, what news from the camp?",
    "Hello! Who are you?",
)


def load(folder: Path) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), tokenizer


@torch.no_grad()
def held_out(target: Any, whole: list[str], tokenizer: Any) -> dict[str, Any]:
    """Loss by position over whole documents (the end token counts)."""
    sums = torch.zeros(len(POSITIONS) - 1, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    tokens, size = 0, 0
    for text in whole:
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])[:, :2048]
        logits = target(ids).logits[0, :-1]
        loss = F.cross_entropy(logits, ids[0, 1:], reduction="none").double()
        for index in range(len(sums)):
            part = loss[POSITIONS[index] : POSITIONS[index + 1]]
            sums[index] += part.sum()
            counts[index] += len(part)
        tokens += len(loss)
        size += len(tokenizer.decode(ids[0], skip_special_tokens=True).encode())
    nats = float(sums.sum()) / tokens
    return {
        "documents": len(whole),
        "tokens": tokens,
        "bytes_per_token": size / tokens,
        "nats_per_token": nats,
        "nats_per_byte": nats * tokens / size,
        "bits_per_byte": nats * tokens / size / 0.6931471805599453,
        "nats_per_token_by_position": {
            f"{POSITIONS[i]} to {POSITIONS[i + 1]}": float(sums[i] / counts[i])
            for i in range(len(sums))
            if counts[i]
        },
    }


@torch.no_grad()
def generate(model: Any, ids: Tensor, tokens: int, temperature: float) -> Tensor:
    """New ids only, the end token included when there is one."""
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    mask = torch.ones_like(ids)
    whole: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **sampling)
    return whole[0, ids.shape[1] :]


def own_text(target: Any, prompts: list[list[int]], temperature: float) -> dict[str, float]:
    """How long the target's replies are, and whether they end."""
    ends = set(target.generation_config.eos_token_id)
    replies = [generate(target, torch.tensor([prompt]), 256, temperature) for prompt in prompts]
    return {
        "ended_within_256": sum(int(reply[-1]) in ends for reply in replies) / len(replies),
        "mean_tokens": sum(map(len, replies)) / len(replies),
    }


def accepted(
    target: Path, drafts: list[Path], prompts: list[list[int]], temperature: float
) -> dict[str, Any]:
    """By the folder of the draft, of what the target writes after these prompts."""
    writer = Engine.load(target, enable_prefix_caching=False)
    beginnings = [tuple(prompt) for prompt in prompts]
    replies = texts.write(writer, beginnings, len(prompts), 256, (temperature,), 1, lambda _: None)
    found = {}
    for draft in drafts:
        runner = Engine.load(draft, max_num_seqs=2, enable_prefix_caching=False).runner
        assert isinstance(runner, LoadedModel)
        found[str(draft)] = dataclasses.asdict(acceptance(runner, replies, temperature))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text-dir", type=Path, default=Path("../shared/data/text"))
    parser.add_argument("--target", type=Path, default=Path("common/models/pdq-5m"))
    parser.add_argument("--drafts", type=Path, nargs="*", default=[Path("common/models/pdq-5m-draft")])
    parser.add_argument("--drafts-only", action="store_true", help="nothing of the target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=40, help="of each kind, held out")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    target, tokenizer = load(options.target)

    runs = [run for run in read_runs(options.text_dir) if run.held_out]
    choice = random.Random(f"{options.seed}/measure")
    whole = documents(runs, choice, 200, 2000, chat_share=0.0)
    chats = [text for text in documents(runs, choice, 48, 512, 1.0) if ASSISTANT in text]
    beginnings = [tokenizer.encode(t, add_special_tokens=False)[:24] for t in whole]
    asked = [text.partition(ASSISTANT)[0] + ASSISTANT for text in chats]
    questions = [tokenizer.encode(text, add_special_tokens=False) for text in asked]
    report: dict[str, Any] = {}
    for kind, prompts in (("text", beginnings), ("chat", questions)):
        some = prompts[: options.prompts]
        for temperature in (0.0, 0.8):
            drafts = accepted(options.target, options.drafts, some, temperature)
            own = {} if options.drafts_only else own_text(target, some, temperature)
            report[f"own_{kind}_at_{temperature}"] = own | {"drafts": drafts}
    if not options.drafts_only:
        report["held_out"] = held_out(target, whole, tokenizer)
    print(json.dumps(report, indent=2))
    if options.drafts_only:
        return

    for temperature in (0.0, 0.8):
        for text in TEXT_PROMPTS:
            ids = torch.tensor([tokenizer.encode(text)])
            new = generate(target, ids, 120, temperature)
            print(f"\n[text, temperature {temperature}] {text}\n--> {tokenizer.decode(new)}")
        for text in CHAT_PROMPTS:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
            new = generate(target, ids, 160, temperature)
            print(f"\n[chat, temperature {temperature}] {text}\n--> {tokenizer.decode(new)}")


if __name__ == "__main__":
    main()
