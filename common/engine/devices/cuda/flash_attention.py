"""FlashAttention, for `--attention flash-attn`: version 3 where it is, else version 2 with large blocks.

The only importer of the library. Version 3 (`flash_attn_interface`, on Hopper) takes pages of any size;
version 2 takes multiples of 256 only ("Paged KV cache block size must be divisible by 256",
csrc/flash_attn/flash_api.cpp), so with our usual 16 it is refused. All rows of a step are one ragged call,
causal, as the last positions of their sequences. Nothing is planned but the arrays that describe them.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.engine.devices.cuda.library_attention import PagedRequests, library_version, window_left
from common.engine.devices.device import HeadShape
from common.errors import ConfigError, UnsupportedModel

THIRD_PACKAGES = ("flash-attn-3", "flash_attn_3")
LEAST_SECOND = (2, 6)
PAGES_OF_SECOND = 256
HOPPER = 9  # major number of its capability


class FlashAttention:
    """Implements `LibraryAttention`."""

    def __init__(self, device: torch.device, block_size: int, capability: int) -> None:
        """`capability`: the card's major number. Raises `ConfigError` where no version serves."""
        self._device = device
        third = _third_version() if capability == HOPPER else None
        self._is_third = third is not None
        if third is not None:
            self.name = f"flash-attn-{third}"
            self._library: Any = _imported("flash_attn_interface")
            return
        version = library_version("flash-attn", "flash-attn", LEAST_SECOND)
        if block_size % PAGES_OF_SECOND:
            raise ConfigError(
                f"flash-attn {version} takes blocks of {PAGES_OF_SECOND} positions or multiples of that, "
                f"not of {block_size}; set --block-size {PAGES_OF_SECOND}, take a Hopper GPU with "
                "flash-attn 3, or --attention flashinfer, or leave attention to our own kernels",
                param="attention",
            )
        self.name = f"flash-attn-{version}"
        self._library = _imported("flash_attn")

    def check(self, shape: HeadShape, dtype: torch.dtype) -> None:
        if shape.head_dim % 8 or shape.head_dim > 256:
            raise UnsupportedModel(
                f"flash-attn computes heads of 8 to 256 in steps of 8, this model's have {shape.head_dim}",
                param="attention",
            )
        if dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"flash-attn computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}",
                param="attention",
            )

    def plan(self, requests: PagedRequests, shapes: list[HeadShape], dtype: torch.dtype) -> None:
        counts = np.diff(requests.page_ends)
        tables = np.zeros((requests.num_requests, int(counts.max())), np.int32)
        tables[np.arange(tables.shape[1]) < counts[:, None]] = requests.pages
        key_ends = np.concatenate(([0], np.cumsum(requests.lengths))).astype(np.int32)
        self._tables, self._lengths, self._query_ends, self._key_ends = (
            torch.from_numpy(array).to(self._device)
            for array in (tables, requests.lengths, requests.query_ends, key_ends)
        )
        self._most_queries = int(np.diff(requests.query_ends).max())
        self._most_keys = int(requests.lengths.max())

    def run(self, query: Tensor, keys: Tensor, values: Tensor, shape: HeadShape) -> Tensor:
        left = window_left(shape)
        common = {"causal": True, "window_size": (left, 0 if left >= 0 else -1)}
        out: Tensor
        if self._is_third:
            out = self._library.flash_attn_with_kvcache(
                query,
                keys,
                values,
                cache_seqlens=self._lengths,
                page_table=self._tables,
                cu_seqlens_q=self._query_ends,
                max_seqlen_q=self._most_queries,
                **common,
            )
        else:
            out = self._library.flash_attn_varlen_func(
                query,
                keys,
                values,
                self._query_ends,
                self._key_ends,
                self._most_queries,
                self._most_keys,
                block_table=self._tables,
                **common,
            )
        return out


def _third_version() -> str | None:
    for package in THIRD_PACKAGES:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise ConfigError(f"{name} cannot be imported: {error}", param="attention") from error
