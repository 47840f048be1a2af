"""Which proposer an engine has."""

from __future__ import annotations

from common.engine.interface import EngineFacts
from common.engine.speculation.base import HostProposer
from common.engine.speculation.drafting import Drafting, DraftSource
from common.engine.speculation.lengths import RoundCosts
from common.engine.speculation.model import ModelSource
from common.engine.speculation.ngram import NGramSource
from common.settings.config import EngineSettings


def make_proposer(settings: EngineSettings, facts: EngineFacts) -> HostProposer | None:
    """`facts` are those of the runner, which has the draft model."""
    sources: list[DraftSource] = []
    if "ngram" in settings.speculative.split("+"):
        sources.append(NGramSource())
    if facts.draft is not None:
        sources.append(ModelSource(facts.draft.max_model_len))
    if not sources:
        return None
    rounds = RoundCosts(facts.draft.relative_size if facts.draft is not None else 0.0)
    return Drafting(sources, settings.most_drafted, rounds=rounds)
