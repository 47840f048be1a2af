"""The engine: a model, its paged KV and its scheduler, in one process.

from common.engine import Engine, SamplingParams
"""

from common.engine.engine import Engine
from common.engine.output import Completion, StepOutput, TokenLogprob
from common.sampling import FinishReason, SamplingParams

__all__ = ["Completion", "Engine", "FinishReason", "SamplingParams", "StepOutput", "TokenLogprob"]
