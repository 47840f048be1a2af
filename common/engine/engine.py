"""An engine in this process: a core and its runner, and requests run to their end.

    from common.engine import Engine, SamplingParams

    engine = Engine.load("path/to/model")
    for output in engine.generate(["Once upon a time"], SamplingParams(max_tokens=64)):
        print(output.text)

A node steps its engine by itself (node/steps.py); this is for scripts, benchmarks and tests, and for
what a node does before it serves. Not thread-safe.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as AnySequence
from concurrent.futures import Future, wait
from pathlib import Path

from common.engine.core.engine_core import EngineCore
from common.engine.core.output import Completion, StepOutput
from common.engine.core.prompt_share import LEAST_TOKENS
from common.engine.core.sequence import Sequence
from common.engine.core.step import Step
from common.engine.interface import Runner, StepResult
from common.engine.runner.load_runner import load_runner
from common.engine.speculation import HostProposer
from common.engine.speculation.choice import make_proposer
from common.engine.text import decode, encode
from common.errors import InvalidRequest
from common.identity import ModelIdentity
from common.request import Request
from common.sampling import SamplingParams
from common.settings import loader as config_loader
from common.settings.config import EngineSettings

_runs = itertools.count()


class Engine(EngineCore):
    """A core that has its runner at hand."""

    def __init__(
        self,
        settings: EngineSettings,
        runner: Runner,
        *,
        proposer: HostProposer | None = None,
        on_free: Callable[[AnySequence[int]], None] | None = None,
    ) -> None:
        proposer = proposer or make_proposer(settings, runner.facts)
        super().__init__(runner.facts, settings, proposer=proposer, on_free=on_free)
        self.runner = runner
        self.steps_ahead = 0  # that are planned and submitted while one is computed: 0 or 1
        self._submitted: deque[tuple[Step, Future[StepResult]]] = deque()

    @classmethod
    def load(cls, model: str | Path = "", **settings: object) -> Engine:
        """An engine for a folder, a hub name, or the model that ships; settings by name. It computes
        in the thread that calls it, or gives a device its work there."""
        wanted = config_loader.from_values(EngineSettings, {"model": str(model), **settings})
        return cls(wanted, load_runner(wanted))

    def add_prompt(
        self,
        name: str,
        token_ids: AnySequence[int],
        params: SamplingParams,
        *,
        choices: AnySequence[int] = (0,),
        prompt_len: int | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> list[Sequence]:
        """Queue a request of this process's own. `prompt_len` below `len(token_ids)` replays tokens of
        an earlier attempt. Raises `InvalidRequest`."""
        length = len(token_ids) if prompt_len is None else prompt_len
        model = ModelIdentity.of(self.fingerprint)
        request = Request(
            name, model, tuple(token_ids), length, params, cache_salt=cache_salt, priority=priority
        )
        return self.add(name, request, choices=choices)

    def step(self) -> list[StepOutput]:
        """Run one step; [] when nothing can run now."""
        submitted = self._submitted
        while len(submitted) <= self.steps_ahead and (step := self.plan()) is not None:
            try:
                submitted.append((step, self.runner.submit(step.input)))
            except BaseException:
                self.fail(step)
                raise
        if not submitted:
            return []
        step, future = submitted.popleft()
        try:
            result = future.result()
        except BaseException:
            wait(later for _, later in submitted)
            submitted.clear()
            self.fail(step)
            raise
        return self.commit(step, result)

    @property
    def has_work(self) -> bool:
        return bool(self._submitted) or super().has_work

    def warm_up(self) -> None:
        """Compile and touch what a first request would wait for: one token, then two, then as many as prompts
        get in any step; and see what steps cost."""
        room = min(self.facts.max_model_len, self.pool.num_blocks * self.pool.block_size + 1)
        few = SamplingParams(max_tokens=min(2, room - 1), ignore_eos=True)
        self._warm_up(few)
        for _ in range(2):  # what is touched first takes longer
            self.costs.forget()
            self._warm_up(few, prompt=max(1, min(LEAST_TOKENS, room - few.max_tokens)))
        if self.proposer is not None:
            self._warm_up(
                SamplingParams(max_tokens=min(2048, room - 1), ignore_eos=True), self.proposer.rehearsals()
            )

    def _warm_up(
        self, params: SamplingParams, turns: Iterable[None] = itertools.repeat(None), *, prompt: int = 1
    ) -> None:
        """A step for each turn, as long as there is work; nothing of it is cached."""
        caches, self.pool.enable_prefix_cache = self.pool.enable_prefix_cache, False
        try:
            self.add_prompt("warm-up", [0] * prompt, params)
            self.step()
            for _ in turns:
                if not self.has_work:
                    break
                self.step()
        finally:
            self.abort("warm-up")
            self.pool.enable_prefix_cache = caches

    def generate(
        self,
        prompts: Iterable[str | AnySequence[int]],
        params: SamplingParams | AnySequence[SamplingParams],
        *,
        n: int = 1,
    ) -> list[Completion]:
        """Complete all prompts by continuous batching; `n` choices each, in order.

        For an engine without other requests. Whatever is raised, none of these is left behind.
        """
        assert not self.has_work, "requests were added already, and their output would be lost"
        folder = self.facts.folder
        all_ids = [encode(folder, p) if isinstance(p, str) else p for p in prompts]
        each = [params] * len(all_ids) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(all_ids):
            raise InvalidRequest(f"{len(each)} params for {len(all_ids)} prompts", param="params")
        run = f"generate-{next(_runs)}"
        names = [f"{run}-{index}" for index in range(len(all_ids))]
        collected: dict[tuple[str, int], list[StepOutput]] = {}
        try:
            for name, ids, wanted in zip(names, all_ids, each, strict=True):
                self.add_prompt(name, ids, wanted, choices=range(n))
            while self.has_work:
                for output in self.step():
                    if output.error is not None:
                        raise output.error
                    collected.setdefault((output.request_id, output.choice), []).append(output)
        finally:
            for name in names:  # those that did not end, where something was raised
                self.abort(name)
        return [
            self._completion(index, choice, collected[name, choice])
            for index, name in enumerate(names)
            for choice in range(n)
        ]

    def _completion(self, index: int, choice: int, outputs: list[StepOutput]) -> Completion:
        tokens = [token for output in outputs for token in output.token_ids]
        reason = outputs[-1].finish_reason
        assert reason is not None
        return Completion(
            index,
            choice,
            tuple(tokens),
            tuple(entry for output in outputs for entry in output.logprobs),
            outputs[0].prompt_logprobs,
            reason,
            decode(self.facts.folder, tokens),
        )
