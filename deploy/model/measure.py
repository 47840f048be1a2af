"""Measure the shipped checkpoints through transformers: `python -m deploy.model.measure --help`.

Owns the numbers and samples of the model cards. It loads the folders as anybody would, in float32,
and so also checks that what training wrote is an ordinary checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.model.corpus import ASSISTANT, documents, read_runs

POSITIONS = (0, 64, 256, 1024, 2048)
DRAFTED = 4  # tokens per step of the simulated speculation
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
def held_out(target: Any, draft: Any, texts: list[str], tokenizer: Any) -> dict[str, Any]:
    """Loss by position over whole documents (the end token counts), and greedy agreement."""
    sums = torch.zeros(len(POSITIONS) - 1, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    draft_sum, same, tokens, size = 0.0, 0, 0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])[:, :2048]
        logits, guessed = target(ids).logits[0, :-1], draft(ids).logits[0, :-1]
        loss = F.cross_entropy(logits, ids[0, 1:], reduction="none").double()
        for index in range(len(sums)):
            part = loss[POSITIONS[index] : POSITIONS[index + 1]]
            sums[index] += part.sum()
            counts[index] += len(part)
        draft_sum += float(F.cross_entropy(guessed, ids[0, 1:], reduction="sum"))
        same += int((logits.argmax(-1) == guessed.argmax(-1)).sum())
        tokens += len(loss)
        size += len(tokenizer.decode(ids[0], skip_special_tokens=True).encode())
    nats = float(sums.sum()) / tokens
    return {
        "documents": len(texts),
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
        "draft_nats_per_token": draft_sum / tokens,
        "greedy_agreement": same / tokens,
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


@torch.no_grad()
def own_text(target: Any, draft: Any, prompts: list[list[int]], temperature: float) -> dict[str, float]:
    """The draft on what the target writes: the share of tokens it would have had accepted.

    Greedy: its choice is the target's. Otherwise: the overlap of both distributions, which is the
    acceptance of speculative sampling (Leviathan et al. 2023).
    """
    accepted, tokens, ended, length, steps = 0.0, 0, 0, 0, 0
    ends = set(target.generation_config.eos_token_id)
    for prompt in prompts:
        ids = torch.tensor([prompt])
        new = generate(target, ids, 256, temperature)
        whole = torch.cat((ids, new[None]), dim=1)
        wanted = target(whole).logits[0, len(prompt) - 1 : -1]
        guessed = draft(whole).logits[0, len(prompt) - 1 : -1]
        if temperature > 0:
            p, q = (wanted / temperature).softmax(-1), (guessed / temperature).softmax(-1)
            accepted += float(torch.minimum(p, q).sum())
        else:
            hits = (guessed.argmax(-1) == new).tolist()
            accepted += sum(hits)
            position = 0
            while position < len(hits):
                run = 0
                while run < DRAFTED and position + run < len(hits) and hits[position + run]:
                    run += 1
                position += run + 1
                steps += 1
        tokens += len(new)
        ended += int(new[-1]) in ends
        length += len(new)
    result = {
        "acceptance": accepted / tokens,
        "ended_within_256": ended / len(prompts),
        "mean_tokens": length / len(prompts),
    }
    if steps:
        result[f"tokens_per_step_drafting_{DRAFTED}"] = tokens / steps
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text-dir", type=Path, default=Path("../shared/data/text"))
    parser.add_argument("--target", type=Path, default=Path("common/models/pdq-5m"))
    parser.add_argument("--draft", type=Path, default=Path("common/models/pdq-5m-draft"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=40, help="of each kind, held out")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    target, tokenizer = load(options.target)
    draft, draft_tokenizer = load(options.draft)
    assert tokenizer.get_vocab() == draft_tokenizer.get_vocab()

    runs = [run for run in read_runs(options.text_dir) if run.held_out]
    choice = random.Random(f"{options.seed}/measure")
    texts = documents(runs, choice, 200, 2000, chat_share=0.0)
    chats = [text for text in documents(runs, choice, 48, 512, 1.0) if ASSISTANT in text]
    report: dict[str, Any] = {"held_out": held_out(target, draft, texts, tokenizer)}
    beginnings = [tokenizer.encode(t, add_special_tokens=False)[:24] for t in texts]
    asked = [text.partition(ASSISTANT)[0] + ASSISTANT for text in chats]
    questions = [tokenizer.encode(text, add_special_tokens=False) for text in asked]
    for kind, prompts in (("text", beginnings), ("chat", questions)):
        some = prompts[: options.prompts]
        for temperature in (0.0, 0.8):
            report[f"own_{kind}_at_{temperature}"] = own_text(target, draft, some, temperature)
    print(json.dumps(report, indent=2))

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
