"""In-process use: prompts in, completions out, by continuous batching. See `Engine.generate`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from collections.abc import Sequence as AnySequence
from typing import TYPE_CHECKING

from common.engine.output import Completion, StepOutput
from common.engine.text import decode, encode
from common.errors import InvalidRequest
from common.sampling import SamplingParams

if TYPE_CHECKING:
    from common.engine.engine import Engine

_runs = itertools.count()


def generate(
    engine: Engine,
    prompts: Iterable[str | AnySequence[int]],
    params: SamplingParams | AnySequence[SamplingParams],
    n: int,
) -> list[Completion]:
    """Run `engine` until all prompts have their `n` choices; in the order of the prompts."""
    assert not engine.has_work, "requests were added already, and their output would be lost"
    all_ids = [
        encode(engine.folder, prompt) if isinstance(prompt, str) else prompt for prompt in prompts
    ]
    each = [params] * len(all_ids) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(all_ids):
        raise InvalidRequest(f"{len(each)} params for {len(all_ids)} prompts", param="params")
    run = f"generate-{next(_runs)}"
    names = [f"{run}-{index}" for index in range(len(all_ids))]
    collected: dict[tuple[str, int], list[StepOutput]] = {}
    try:
        for name, ids, wanted in zip(names, all_ids, each, strict=True):
            engine.add(name, ids, wanted, choices=range(n))
        while engine.has_work:
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                collected.setdefault((output.request_id, output.choice), []).append(output)
    finally:
        for name in names:  # those that did not end, where something was raised
            engine.abort(name)
    return [
        _completion(engine, index, choice, ids, collected[names[index], choice])
        for index, ids in enumerate(all_ids)
        for choice in range(n)
    ]


def _completion(
    engine: Engine, index: int, choice: int, ids: AnySequence[int], outputs: list[StepOutput]
) -> Completion:
    tokens = [token for output in outputs for token in output.token_ids]
    reason = outputs[-1].finish_reason
    assert reason is not None
    return Completion(
        index, choice, tuple(ids), tuple(tokens),
        tuple(entry for output in outputs for entry in output.logprobs),
        outputs[0].prompt_logprobs, reason, decode(engine.folder, tokens),
    )  # fmt: skip
