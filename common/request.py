"""What a client asked for, as one value: made by the gateway that holds the client, carried whole.

Dispatch takes it to a node, Offer to the next one; attempt and engine take it as it is. A new field is
added here, filled by the gateway, and read where it matters.
"""

from __future__ import annotations

import dataclasses

from common.identity import ModelIdentity
from common.kv_layout import Fingerprint, root_hash
from common.sampling import SamplingParams


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """`token_ids` are the prompt and tokens that the client has already, `prompt_len` the border between
    them."""

    id: str
    model: ModelIdentity
    token_ids: tuple[int, ...]
    prompt_len: int
    params: SamplingParams
    cache_salt: str = ""
    priority: int = 0  # lower goes first
    speculative: bool = True  # tokens may be drafted, where a node does so
    prediction: tuple[int, ...] = ()  # what the client expects the reply to be like
    gateway: str = ""  # incarnation of the gateway that holds the client
    gateway_endpoint: str = ""  # where its token socket is bound

    @property
    def num_delivered(self) -> int:
        return len(self.token_ids) - self.prompt_len

    def cache_root(self, fingerprint: Fingerprint) -> bytes:
        """The parent of its first block's hash on nodes of this fingerprint: requests share cached
        blocks only where it is equal."""
        return root_hash(fingerprint, self.cache_salt)
