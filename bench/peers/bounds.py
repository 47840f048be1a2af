"""The least time that the machine's own limits allow for a load: what a share of the limit is a share of.

Counted is what cannot be left out: products with every weight, scores and sums of causal attention, the head
for the last position of a prompt only; of bytes, each weight once a step and the KV that a step reads. Norms,
activations, sampling, HTTP cost nothing here. All on both cores, also for systems that divide them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from bench.limits import Limits

WEIGHT_BYTES = 2  # bf16


@dataclasses.dataclass(frozen=True, slots=True)
class Body:
    """Sizes of a model of Llama's family."""

    layer_parameters: int  # of all layers
    head_parameters: int
    num_layers: int
    query_width: int
    kv_bytes_per_token: int

    @classmethod
    def read(cls, config: Path) -> Body:
        found = json.loads(config.read_text())
        hidden, layers = found["hidden_size"], found["num_hidden_layers"]
        head_dim = found.get("head_dim") or hidden // found["num_attention_heads"]
        query, kv = found["num_attention_heads"] * head_dim, found["num_key_value_heads"] * head_dim
        layer = hidden * (2 * query + 2 * kv) + 3 * hidden * found["intermediate_size"]
        head = hidden * found["vocab_size"]
        return cls(layers * layer, head, layers, query, 2 * WEIGHT_BYTES * kv * layers)

    def prompt_s(self, length: int, limits: Limits) -> float:
        """Of one prompt of `length` tokens up to its first token."""
        products = 2 * self.layer_parameters * length + 2 * self.head_parameters
        attention = 2 * self.query_width * length * length * self.num_layers  # half of the square
        return (products + attention) / limits.matmul_flops

    def step_s(self, rows: int, context: int, limits: Limits) -> float:
        """Of a decode step of `rows` sequences that read `context` tokens of KV each."""
        parameters = self.layer_parameters + self.head_parameters
        read = WEIGHT_BYTES * parameters + rows * context * self.kv_bytes_per_token
        return max(read / limits.read_bytes, 2 * parameters * rows / limits.matmul_flops)

    def stream_tokens_per_s(self, prompt: int, output: int, limits: Limits) -> float:
        """Of one stream, between its tokens."""
        return 1 / self.step_s(1, prompt + output // 2, limits)

    def batch_tokens_per_s(self, rows: int, prompt: int, output: int, limits: Limits) -> float:
        """Output of `rows` requests that come at once: all prompts, then the steps after the first token."""
        steps = (output - 1) * self.step_s(rows, prompt + output // 2, limits)
        return rows * output / (rows * self.prompt_s(prompt, limits) + steps)

    def prompt_tokens_per_s(self, length: int, limits: Limits) -> float:
        return length / self.prompt_s(length, limits)
