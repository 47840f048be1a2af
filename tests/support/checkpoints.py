"""Small checkpoints for tests: the models beside the project, and random ones of each family."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

SHARED_MODELS = Path(__file__).resolve().parents[3] / "shared" / "models"
STORIES = SHARED_MODELS / "stories260K"
DRAFT = SHARED_MODELS / "stories124K-draft"  # of STORIES
BABYLLAMA = SHARED_MODELS / "babyllama361"


def transformers_model(folder: Path) -> Any:
    """The reference implementation, in float32, with eager attention."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()


def save_random_model(folder: Path, model_type: str, seed: int, **fields: Any) -> Path:
    """A random checkpoint of a family, as transformers writes it; `max_shard_size` shards it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoConfig, AutoModelForCausalLM

        max_shard_size = fields.pop("max_shard_size", "5GB")
        config = AutoConfig.for_model(model_type, **fields)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("norm.weight", "bias")):
                    parameter.add_(0.3 * torch.randn_like(parameter))
                else:
                    parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
