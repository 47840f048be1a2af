"""FlashInfer's two wrappers in plain torch, by their documentation: what is planned, then what is run.

Pages may be strided, but in the last dimension; keys and values must have the same strides. Whatever its
documentation forbids fails here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

planned: list[dict[str, Any]] = []


class _Wrapper:
    def __init__(self, workspace: Tensor, layout: str, **fields: Any) -> None:
        assert workspace.dtype == torch.uint8
        assert workspace.numel() == 128 << 20
        assert layout == "NHD"
        self.fields = fields
        self._plan: dict[str, Any] = {}

    def _keep(
        self,
        queries: Tensor,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        causal: bool,
    ) -> None:
        assert {t.dtype for t in (queries, indptr, indices, last_page_len)} == {torch.int32}
        assert len(queries) == len(indptr) == len(last_page_len) + 1
        assert int(indptr[-1]) == len(indices)
        assert int(last_page_len.min()) >= 1
        assert int(last_page_len.max()) <= page_size
        assert num_qo_heads % num_kv_heads == 0
        self._plan = {
            "wrapper": type(self).__name__,
            "queries": queries.tolist(),
            "indptr": indptr.tolist(),
            "indices": indices.tolist(),
            "last_page_len": last_page_len.tolist(),
            "heads": (num_qo_heads, num_kv_heads, head_dim),
            "page_size": page_size,
            "window_left": window_left,
            "dtype": q_data_type,
            "causal": causal,
        }
        assert kv_data_type == q_data_type
        planned.append(self._plan)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        plan, (keys, values) = self._plan, paged_kv_cache
        heads, kv_heads, head_dim = plan["heads"]
        assert q.is_contiguous()
        assert q.dtype == keys.dtype == values.dtype == plan["dtype"]
        assert q.shape == (plan["queries"][-1], heads, head_dim)
        assert keys.stride() == values.stride()
        assert keys.stride(-1) == 1
        assert keys.shape[1:] == (plan["page_size"], kv_heads, head_dim)
        out = torch.empty_like(q)
        for i, last in enumerate(plan["last_page_len"]):
            pages = plan["indices"][plan["indptr"][i] : plan["indptr"][i + 1]]
            length = (len(pages) - 1) * plan["page_size"] + last
            begin, end = plan["queries"][i : i + 2]
            k, v = (x[pages].flatten(0, 1)[:length].float() for x in (keys, values))
            k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), k) * head_dim**-0.5
            here = torch.arange(length - (end - begin), length).unsqueeze(1)
            there = torch.arange(length).unsqueeze(0)
            hidden = there > here if plan["causal"] else torch.zeros(end - begin, length, dtype=torch.bool)
            if plan["window_left"] >= 0:
                hidden |= there < here - plan["window_left"]
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[begin:end] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
        return out


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    """One query per request."""

    def plan(self, indptr: Tensor, *arguments: Any, **fields: Any) -> None:
        queries = torch.arange(len(indptr), dtype=torch.int32)
        self._keep(queries, indptr, *arguments, causal=False, **fields)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    """The last positions of each request."""

    def plan(self, qo_indptr: Tensor, *arguments: Any, causal: bool = False, **fields: Any) -> None:
        self._keep(qo_indptr, *arguments, causal=causal, **fields)
