"""What is said of a draft: the tables on the terminal, the model card, the JSON beside the weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from common.distill.acceptance import DRAFTED, Acceptance, Speed
from common.distill.network import Shape
from common.distill.training import Moment
from common.settings.config import DistillSettings, describe


@dataclasses.dataclass(frozen=True, slots=True)
class About:
    name: str
    target: str
    command: str
    shape: Shape
    text_tokens: int  # that the target wrote
    training: Moment  # its last
    acceptance: list[Acceptance]
    speed: list[Speed]


def shown_flags(given: Mapping[str, str]) -> list[str]:
    """Of the command, those that are not as they would be without it; folders by their last name."""
    usual = describe(DistillSettings())
    words = []
    for flag, value in given.items():
        if value != usual[flag]:
            if flag in ("model", "output", "prompts"):
                value = value.rstrip("/").rpartition("/")[2]
            words += [value] if flag == "model" else [f"--{flag}", value]
    return words


def tables(about: About) -> str:
    heads = "".join(f" {place} |" for place in range(1, DRAFTED + 1))
    lines = [
        "Drafts are accepted where they are the token that the target chooses, under the same noise.",
        "",
        f"| temperature | equal | tokens a step |{heads}",
        "|---|---|---|" + "---|" * DRAFTED,
    ]
    for row in about.acceptance:
        places = "".join(f" {share:.2f} |" for share in row.by_position)
        lines.append(f"| {row.temperature:g} | {row.equal:.3f} | {row.tokens_per_step:.2f} |{places}")
    if about.speed:
        lines += [
            "",
            "| temperature | tokens/s without | with | ratio | same tokens |",
            "|---|---|---|---|---|",
        ]
    for speed in about.speed:
        same = "yes" if speed.same else "NO"
        lines.append(
            f"| {speed.temperature:g} | {speed.off:.0f} | {speed.draft:.0f} | {speed.ratio:.2f} | {same} |"
        )
    return "\n".join(lines)


def card(about: About) -> str:
    shape, training = about.shape, about.training
    return f"""---
library_name: transformers
pipeline_tag: text-generation
base_model: {json.dumps(about.target)}
---

# {about.name}

A draft for speculative decoding with `{about.target}`, of the same tokenizer. It is good for nothing else.

| | |
|---|---|
| parameters | {shape.num_parameters:,} |
| hidden size, layers | {shape.hidden_size}, {shape.num_layers} |
| heads, key-value heads | {shape.num_heads}, {shape.num_kv_heads} of {shape.head_dim} |
| feed-forward | {shape.intermediate_size} |
| learned from | {about.text_tokens:,} tokens that the target wrote |
| training | {training.step:,} steps, {training.tokens:,} tokens, {training.seconds:.0f} s |
| loss at its end | {training.loss:.3f} nats per token |

    {about.command}

## Measured

On texts from beginnings that were held out. The numbers from 1 to {DRAFTED} are the share of steps in
which so many drafts are right.

{tables(about)}
"""


def as_json(about: About) -> dict[str, Any]:
    return {
        "target": about.target,
        "command": about.command,
        "parameters": about.shape.num_parameters,
        "text_tokens": about.text_tokens,
        "training": dataclasses.asdict(about.training),
        "acceptance": [dataclasses.asdict(row) for row in about.acceptance],
        "speed": [dataclasses.asdict(row) | {"ratio": row.ratio} for row in about.speed],
    }
