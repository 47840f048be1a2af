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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch import Tensor

from deploy.model.corpus import BOS, END, EOS, PAD, SPECIAL_TOKENS, Message, render
from deploy.model.network import Llama, Shape

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


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds, for training and drawing."""

    model: Llama
    tokenizer: Tokenizer


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write beside and rename, so that a stop leaves the old state or the new one."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_state(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([Shape]):
        state: dict[str, Any] = torch.load(path)
    return state


def config_of(shape: Shape) -> dict[str, Any]:
    """The `config.json` of a `LlamaForCausalLM`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "eos_token_id": [SPECIAL_TOKENS.index(EOS), SPECIAL_TOKENS.index(END)],
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def shape_of(config: dict[str, Any]) -> Shape:
    """The inverse of `config_of`."""
    return Shape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        intermediate_size=config["intermediate_size"],
        max_positions=config["max_position_embeddings"],
        rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
    )


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
    rounded = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    partial = folder / "model.safetensors.partial"
    partial.write_bytes(save(rounded, metadata={"format": "pt"}))
    os.replace(partial, folder / "model.safetensors")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": shape.max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    config = config_of(shape)
    generation_config = {name: config[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    special_tokens = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation_config),
        ("tokenizer_config.json", tokenizer_config),
        ("special_tokens_map.json", special_tokens),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer_path, folder / "tokenizer.json")


def read_checkpoint(folder: Path) -> Checkpoint:
    """The model in float32 (its weights are those of the file, rounded to bf16), not training."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = Llama(shape_of(config))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    model.eval()
    return Checkpoint(model, Tokenizer.from_file(str(folder / "tokenizer.json")))


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
