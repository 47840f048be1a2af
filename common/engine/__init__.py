"""The engine: a model, its paged KV and its scheduler, in one process.

from common.engine import Engine, SamplingParams
"""

from common.engine.core.output import Completion, StepOutput
from common.engine.engine import Engine
from common.engine.sampling.records import TokenLogprob
from common.sampling import FinishReason, SamplingParams

__all__ = ["Completion", "Engine", "FinishReason", "SamplingParams", "StepOutput", "TokenLogprob"]
