"""Which proposer an engine has."""

from __future__ import annotations

from common.engine.speculation.base import HostProposer
from common.engine.speculation.drafting import Drafting
from common.engine.speculation.ngram import NGramSource
from common.settings.config import EngineSettings


def make_proposer(settings: EngineSettings) -> HostProposer | None:
    if settings.speculative == "off":
        return None
    return Drafting(NGramSource(), settings.most_drafted)
