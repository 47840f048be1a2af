"""A small trained model in a large body: real text at the cost of half a billion parameters.

    python -m bench.widened ../shared/models/stories260K build/widened

The new model computes the function of the old one: what the body adds is multiplied by zero before it
reaches the output. So drafts are right as often as for the small model, and steps take as long as the large
one's.

- The hidden states are the old ones, then zeros: embeddings are extended by zeros, the output sides of
  `o_proj` and `down_proj` are zero but for the old rows and columns, and in added layers throughout.
- A norm's mean is over more elements: its weight is scaled by sqrt(old / new), its epsilon by old / new.
- A head gets more dimensions, in which query and key are zero. The pairs that rotate together move to where
  the new head has their frequency, and queries are scaled for the other divisor of the scores.
- All that meets zeros on its way is random, so that no library finds something to skip.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BODY = {
    "hidden_size": 1024,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
PREFIX = "model.layers"


class Widening:
    """From `old` to `new`, two configurations of a Llama with the same vocabulary."""

    def __init__(self, old: dict[str, Any], new: dict[str, Any], seed: int) -> None:
        self.old, self.new = old, new
        self._random = torch.Generator().manual_seed(seed)
        old_dim, new_dim = old["head_dim"], new["head_dim"]
        if new_dim % old_dim or new["num_key_value_heads"] < old["num_key_value_heads"]:
            raise SystemExit("a head's dimensions can be multiplied only, and heads can be added only")
        self._old_group = old["num_attention_heads"] // old["num_key_value_heads"]
        self._new_group = new["num_attention_heads"] // new["num_key_value_heads"]
        if self._new_group < self._old_group:
            raise SystemExit("a key's group of queries can grow only")

    def noise(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self._random) * 0.02

    def into(self, target: Tensor, rows: Tensor, old: Tensor) -> Tensor:
        """`old` into these rows of `target` and its first columns; these rows are zero behind them."""
        target[rows] = 0.0
        target[rows, : old.shape[1]] = old
        return target

    def norm(self, weight: Tensor) -> Tensor:
        wide = torch.ones(self.new["hidden_size"])
        wide[: len(weight)] = weight * math.sqrt(len(weight) / len(wide))
        return wide

    def embedding(self, weight: Tensor) -> Tensor:
        return torch.nn.functional.pad(weight, (0, self.new["hidden_size"] - weight.shape[1]))

    def rotated(self) -> Tensor:
        """Where each dimension of an old head is in a new one."""
        old, new = self.old["head_dim"], self.new["head_dim"]
        low = torch.arange(old // 2) * (new // old)
        return torch.cat((low, low + new // 2))

    def heads(self, count: int, *, of_queries: bool) -> Tensor:
        """Which new head each old one is."""
        index = torch.arange(count)
        if not of_queries:
            return index
        return index // self._old_group * self._new_group + index % self._old_group

    def projection(self, weight: Tensor, *, of_queries: bool, rotates: bool) -> Tensor:
        """q, k or v, `[heads * head_dim, hidden]`."""
        old, new = self.old, self.new
        count = new["num_attention_heads" if of_queries else "num_key_value_heads"]
        wide = self.noise(count * new["head_dim"], new["hidden_size"])
        places = self.rotated() if rotates else torch.arange(old["head_dim"])
        of_old = self.heads(weight.shape[0] // old["head_dim"], of_queries=of_queries)
        for head in of_old.tolist():
            wide[head * new["head_dim"] : (head + 1) * new["head_dim"]] = 0.0
        if of_queries:
            weight = weight * math.sqrt(new["head_dim"] / old["head_dim"])
        rows = (of_old[:, None] * new["head_dim"] + places).flatten()
        return self.into(wide, rows, weight)

    def output(self, weight: Tensor | None) -> Tensor:
        """o_proj, `[hidden, heads * head_dim]`; None: of a layer that is added."""
        old, new = self.old, self.new
        wide = torch.zeros(new["hidden_size"], new["num_attention_heads"] * new["head_dim"])
        if weight is not None:
            heads = self.heads(old["num_attention_heads"], of_queries=True)
            columns = (heads[:, None] * new["head_dim"] + torch.arange(old["head_dim"])).flatten()
            wide[: weight.shape[0], columns] = weight
        return wide

    def into_mlp(self, weight: Tensor) -> Tensor:
        wide = self.noise(self.new["intermediate_size"], self.new["hidden_size"])
        return self.into(wide, torch.arange(weight.shape[0]), weight)

    def out_of_mlp(self, weight: Tensor | None) -> Tensor:
        wide = torch.zeros(self.new["hidden_size"], self.new["intermediate_size"])
        if weight is not None:
            wide[: weight.shape[0], : weight.shape[1]] = weight
        return wide

    def layer(self, index: int, old: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one layer; one that is added is the first one without its output."""
        added = index >= self.old["num_hidden_layers"]
        source = f"{PREFIX}.{0 if added else index}."

        def of(name: str) -> Tensor:
            return old[f"{source}{name}.weight"]

        found = {
            "input_layernorm": self.norm(of("input_layernorm")),
            "post_attention_layernorm": self.norm(of("post_attention_layernorm")),
            "self_attn.q_proj": self.projection(of("self_attn.q_proj"), of_queries=True, rotates=True),
            "self_attn.k_proj": self.projection(of("self_attn.k_proj"), of_queries=False, rotates=True),
            "self_attn.v_proj": self.projection(of("self_attn.v_proj"), of_queries=False, rotates=False),
            "self_attn.o_proj": self.output(None if added else of("self_attn.o_proj")),
            "mlp.gate_proj": self.into_mlp(of("mlp.gate_proj")),
            "mlp.up_proj": self.into_mlp(of("mlp.up_proj")),
            "mlp.down_proj": self.out_of_mlp(None if added else of("mlp.down_proj")),
        }
        return {f"{PREFIX}.{index}.{name}.weight": tensor for name, tensor in found.items()}


def widen(
    source: Path, into: Path, body: dict[str, int], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """Write `source`, a Llama with tied embeddings, in a body of this shape."""
    old = json.loads((source / "config.json").read_text())
    old.setdefault("head_dim", old["hidden_size"] // old["num_attention_heads"])
    new = {**old, **body, "torch_dtype": str(dtype).removeprefix("torch.")}
    new["rms_norm_eps"] = old["rms_norm_eps"] * old["hidden_size"] / new["hidden_size"]
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    widening = Widening(old, new, seed)
    wide = {
        "model.embed_tokens.weight": widening.embedding(tensors["model.embed_tokens.weight"]),
        "model.norm.weight": widening.norm(tensors["model.norm.weight"]),
    }
    if not old.get("tie_word_embeddings"):
        wide["lm_head.weight"] = widening.embedding(tensors["lm_head.weight"])
    for index in range(new["num_hidden_layers"]):
        wide |= widening.layer(index, tensors)
    into.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, into)
    (into / "config.json").write_text(json.dumps(new, indent=2))
    saved = {name: tensor.to(dtype).contiguous() for name, tensor in wide.items()}
    save_file(saved, into / "model.safetensors", metadata={"format": "pt"})
    return into


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("into", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    for field, value in BODY.items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    body = {field: getattr(args, field) for field in BODY}
    print(widen(args.source, args.into, body, getattr(torch, args.dtype)))


if __name__ == "__main__":
    main()
