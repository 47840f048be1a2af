"""Weights on disk: a run's state file, and the Hugging Face folder that ships.

Owns both formats and the chat template. Its command makes a folder of a state file, at any time
in a run: `python -m deploy.model.checkpoint --help`. The model card (`README.md`) of a folder is
written by hand and left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import Tensor

from common.distill.folder import config_of
from common.distill.network import Shape
from common.engine.model.weights import write_weights
from deploy.model.corpus import BOS, END, EOS, PAD, SPECIAL_TOKENS, Message, render

# No extensions and no functions of any one renderer. An unknown role speaks as the user; content
# may be a string or OpenAI's list of parts, of which the text counts.
CHAT_TEMPLATE = """\
{{- '<|bos|>' -}}
{%- for message in messages -%}
    {%- if message['role'] in ['system', 'developer'] -%}
        {{- '<|system|>' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|assistant|>' -}}
    {%- else -%}
        {{- '<|user|>' -}}
    {%- endif -%}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for part in message['content'] or [] if part['type'] == 'text' -%}
            {{- part['text'] | trim -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write beside and rename, so that a stop leaves the old state or the new one."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_state(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([Shape]):
        state: dict[str, Any] = torch.load(path)
    return state


SPECIAL_IDS = {
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
    "bos_token_id": SPECIAL_TOKENS.index(BOS),
    "eos_token_id": [SPECIAL_TOKENS.index(EOS), SPECIAL_TOKENS.index(END)],
}


def check_template() -> None:
    """The template must give, in a plain sandbox, the string that training saw."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(CHAT_TEMPLATE)
    messages: list[Message] = [
        {"role": "system", "content": " Be concise.\n"},
        {"role": "user", "content": "Who is there?\n\n  Answer!"},
        {"role": "assistant", "content": "Nay, answer me."},
    ]
    assert template.render(messages=messages) == render(messages)
    prompt = template.render(messages=messages, add_generation_prompt=True)
    assert prompt == render(messages) + "<|assistant|>"


def write_checkpoint(folder: Path, weights: dict[str, Tensor], shape: Shape, tokenizer_path: Path) -> None:
    """Weights in bf16, configs, tokenizer and chat template; each file readable by itself."""
    check_template()
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, {name: weight.to(torch.bfloat16) for name, weight in weights.items()})
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": shape.max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    config = config_of(shape, SPECIAL_IDS)
    generation_config = SPECIAL_IDS
    special_tokens = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation_config),
        ("tokenizer_config.json", tokenizer_config),
        ("special_tokens_map.json", special_tokens),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer_path, folder / "tokenizer.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, default=Path("build/model/target.pt"))
    parser.add_argument("--tokenizer", type=Path, default=Path("build/model/tokenizer.json"))
    parser.add_argument("--into", type=Path, default=Path("common/models/pdq-5m"))
    options = parser.parse_args()
    state = load_state(options.state)
    write_checkpoint(options.into, state["average"], state["shape"], options.tokenizer)
    size = (options.into / "model.safetensors").stat().st_size
    print(f"{options.into}: {state['step']} steps, {size:,} bytes of weights")


if __name__ == "__main__":
    main()
