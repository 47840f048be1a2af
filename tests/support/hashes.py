"""The hashes of a prompt's blocks, all at once."""

from __future__ import annotations

from collections.abc import Sequence

from common.kv_layout import HashChain


def chain_hashes(root: bytes, token_ids: Sequence[int], block_size: int, prompt_len: int) -> list[bytes]:
    chain = HashChain(root, token_ids, block_size, prompt_len)
    chain.advance(len(token_ids))
    return chain.hashes
