"""Which model a request is for: what a gateway and a node compare before either trusts the other.

Owns: the three things that must agree for a node's tokens to be an answer to a gateway's prompt. KV
needs more than that to agree (`Fingerprint` in kv_layout.py).
"""

from __future__ import annotations

import dataclasses

from common.kv_layout import Fingerprint, Mismatch


@dataclasses.dataclass(frozen=True, slots=True)
class ModelIdentity:
    """A model as a gateway knows it.

    `name` is what clients ask for. `revision` says which weights: the commit of a model from the
    hub, else a digest of the folder; it is "" at a gateway whose folder holds no weights.
    `tokenizer` is a digest of everything that gives a token id its meaning.
    """

    name: str
    revision: str
    tokenizer: str

    @classmethod
    def of(cls, node: Fingerprint) -> ModelIdentity:
        """What a node with this fingerprint runs."""
        return cls(node.model, node.revision, node.tokenizer)

    def mismatch(self, node: Fingerprint) -> Mismatch | None:
        """The first part in which a node with this fingerprint runs another model, with both
        values; None if its tokens answer a prompt of this model. An unknown revision fits any."""
        pairs = (
            ("model", self.name, node.model),
            ("tokenizer", self.tokenizer, node.tokenizer),
            ("revision", self.revision or node.revision, node.revision),
        )
        return next((Mismatch(*pair) for pair in pairs if pair[1] != pair[2]), None)
