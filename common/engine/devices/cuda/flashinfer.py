"""FlashInfer, for `--attention flashinfer`: its two wrappers for paged keys and values.

The only importer of the library. Rows that are alone in their tile, as decoding ones are, go to the decode
wrapper; all others (chunks of prompts, drafts that are verified) to the prefill wrapper, causal, as the last
positions of their sequences. Each kind of layer has wrappers of its own, since a plan holds heads and window;
all share one workspace, for they run one after the other. Keys and values are the pool's strided views: both
of one layer have the same strides, which the library's csrc/batch_decode.cu asks of them; strides of pages it
takes since its pull request 513.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.engine.devices.cuda.library_attention import PagedRequests, library_version, window_left
from common.engine.devices.device import HeadShape
from common.errors import ConfigError, UnsupportedModel

LEAST = (0, 7)  # whose source this was written from
WORKSPACE_BYTES = 128 << 20  # as its documentation recommends
HEAD_DIMS = (64, 128, 256)
GROUPS_WITHOUT_TENSOR_CORES = 3  # query heads to a key's head: with more, tensor cores are faster


class FlashInferAttention:
    """Implements `LibraryAttention`."""

    def __init__(self, device: torch.device, block_size: int) -> None:
        """Raises `ConfigError` where the library is missing or too old."""
        self.name = f"flashinfer-{library_version('flashinfer', 'flashinfer-python', LEAST)}"
        try:
            import flashinfer
        except (ImportError, OSError) as error:
            raise ConfigError(f"flashinfer cannot be imported: {error}", param="attention") from error
        self._library: Any = flashinfer
        self._device, self._block_size = device, block_size
        self._workspace: Tensor | None = None
        self._wrappers: dict[HeadShape, tuple[Any, Any]] = {}
        self._alone = 0  # rows that the decode wrapper computes, the first ones
        self._others = 0  # requests of the prefill wrapper

    def check(self, shape: HeadShape, dtype: torch.dtype) -> None:
        if shape.head_dim not in HEAD_DIMS:
            raise UnsupportedModel(
                f"flashinfer computes heads of {', '.join(map(str, HEAD_DIMS))}, and this model's have "
                f"{shape.head_dim}; leave attention to our own kernels",
                param="attention",
            )
        if dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"flashinfer computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}",
                param="attention",
            )

    def plan(self, requests: PagedRequests, shapes: list[HeadShape], dtype: torch.dtype) -> None:
        counts = requests.query_ends[1:] - requests.query_ends[:-1]
        many = (counts > 1).nonzero()[0]
        self._alone = int(many[0]) if len(many) else requests.num_requests
        self._others = requests.num_requests - self._alone
        alone = requests.of(0, self._alone)
        others = requests.of(self._alone, requests.num_requests)
        for shape in shapes:
            decode, prefill = self._wrappers_for(shape)
            for part, wrapper, causal in ((alone, decode, {}), (others, prefill, {"causal": True})):
                if not part.num_requests:
                    continue
                queries = () if wrapper is decode else (torch.from_numpy(part.query_ends),)
                wrapper.plan(
                    *queries,
                    torch.from_numpy(part.page_ends),
                    torch.from_numpy(part.pages).to(self._device),
                    torch.from_numpy(part.last_page_lengths(self._block_size)),
                    shape.num_heads,
                    shape.num_kv_heads,
                    shape.head_dim,
                    self._block_size,
                    window_left=window_left(shape),
                    q_data_type=dtype,
                    kv_data_type=dtype,
                    **causal,
                )

    def run(self, query: Tensor, keys: Tensor, values: Tensor, shape: HeadShape) -> Tensor:
        decode, prefill = self._wrappers[shape]
        if not self._others:
            return _run(decode, query, keys, values)
        if not self._alone:
            return _run(prefill, query, keys, values)
        first = _run(decode, query[: self._alone], keys, values)
        return torch.cat((first, _run(prefill, query[self._alone :], keys, values)))

    def _wrappers_for(self, shape: HeadShape) -> tuple[Any, Any]:
        if self._workspace is None:
            self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        if shape not in self._wrappers:
            large = shape.num_heads // shape.num_kv_heads > GROUPS_WITHOUT_TENSOR_CORES
            self._wrappers[shape] = (
                self._library.BatchDecodeWithPagedKVCacheWrapper(
                    self._workspace, "NHD", use_tensor_cores=large
                ),
                self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD"),
            )
        return self._wrappers[shape]


def _run(wrapper: Any, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    out: Tensor = wrapper.run(query.contiguous(), (keys, values))
    return out
