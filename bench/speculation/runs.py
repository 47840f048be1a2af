"""One run of an engine, ours or another's: prompts in, tokens per second and how drafts did out."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from bench.speculation.kinds import Kind
from common.child_process import die_with_parent
from common.engine import Engine, SamplingParams

WORKER = Path(__file__).parent.parent / "peers" / "speculation.py"


@dataclasses.dataclass(frozen=True)
class Work:
    """What every engine is asked in a turn."""

    prompts: Sequence[Sequence[int]]
    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool
    allowed_token_ids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of it. `tokens` are those after each prompt was computed, in `seconds`; `all_seconds` with
    the prompts. What an engine does not tell is None."""

    tokens: int
    seconds: float
    all_seconds: float
    output: str  # stands for all tokens
    tokens_per_step: float | None = None  # of a sequence
    drafts: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    accepted_at: tuple[int, ...] = ()


class Measured(Protocol):
    """An engine with one proposer."""

    def run(self, work: Work) -> Run: ...


class Ours:
    """Implements `Measured`, in seconds of `clock`."""

    def __init__(self, kind: Kind, proposer: str, clock: Callable[[], float], **settings: object) -> None:
        self._clock = clock
        if proposer != "off":
            settings["speculative"] = proposer
        if "draft" in proposer:
            settings["speculative_model"] = str(kind.draft)
        self.engine = Engine.load(kind.model, enable_prefix_caching=False, **settings)
        self.engine.warm_up()
        self._runs = 0

    def run(self, work: Work) -> Run:
        engine = self.engine
        self._runs += 1
        params = SamplingParams(
            max_tokens=work.max_tokens,
            temperature=work.temperature,
            ignore_eos=work.ignore_eos,
            allowed_token_ids=work.allowed_token_ids,
        )
        replies: dict[str, list[int]] = {}
        for index, prompt in enumerate(work.prompts):
            name = f"{self._runs}-{index}"
            engine.add_prompt(name, list(prompt), dataclasses.replace(params, seed=work.seed + index))
            replies[name] = []
        waiting = set(replies)
        before = self._counted()
        tokens, chunks = 0, 0
        start = prompts_done = self._clock()
        while engine.has_work:
            outputs = engine.step()
            for output in outputs:
                if output.error is not None:
                    raise output.error
                replies[output.request_id].extend(output.token_ids)
                if not waiting:
                    tokens += len(output.token_ids)
                    chunks += bool(output.token_ids)
            if waiting:
                waiting -= {output.request_id for output in outputs if output.token_ids}
                prompts_done = self._clock()
        end = self._clock()
        counted = self._counted() - before
        return Run(
            tokens,
            end - prompts_done,
            end - start,
            json.dumps(list(replies.values())),
            tokens / chunks if chunks else None,
            counted["drafts"],
            counted["drafted"],
            counted["accepted"],
            tuple(counted[f"at {place}"] for place in range(8)),
        )

    def _counted(self) -> Counter[str]:
        found = Counter[str]()
        for counts in self.engine.proposer.counts.values() if self.engine.proposer else ():
            found.update(drafts=counts.drafts, drafted=counts.drafted, accepted=counts.accepted)
            found.update({f"at {place}": count for place, count in enumerate(counts.accepted_at)})
        return found


class Peer:
    """Implements `Measured` by a process in the other engine's environment (bench/peers/speculation.py)."""

    def __init__(
        self, python: Path, system: str, kind: Kind, proposer: str, environment: dict[str, str]
    ) -> None:
        command = [
            str(python),
            "-P",
            str(WORKER),
            system,
            str(kind.model),
            proposer,
        ]  # -P: vllm.py lies beside
        if "draft" in proposer:
            command.append(str(kind.draft))
        self._name = f"{system}, {proposer}"
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            preexec_fn=die_with_parent(os.getpid()),
        )
        self._answer()  # it is ready

    def run(self, work: Work) -> Run:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(dataclasses.asdict(work)) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return Run(**{**answer, "output": json.dumps(answer["output"])})

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # the libraries print there, too
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"{self._name} ended")
