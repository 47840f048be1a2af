"""A runner in another process, to which steps go as bytes: what crosses the wall is plain data.

Each step is pickled here and read there by a reader that knows only the records of interface.py and what
they are made of: a sequence, a tensor or anything else that lives would be refused.
"""

from __future__ import annotations

import io
import multiprocessing
import pickle
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from common.engine.interface import EngineFacts, Filled, StepInput, StepResult
from common.settings.config import EngineSettings

PLAIN = {
    "builtins": {"frozenset"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "common.engine.interface": {
        "DraftFacts",
        "DraftInput",
        "DraftReport",
        "EngineFacts",
        "ScoredChunk",
        "SlotChanges",
        "SlotOpening",
        "StepInput",
        "StepResult",
    },
    "common.engine.sampling.records": {"Logprobs", "SampleOutput", "SampleRows", "TokenLogprob"},
    "common.kv_layout": {"Fingerprint", "KVLayout", "Segment"},
    "common.sampling": {"SamplingParams"},
}


class PlainReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in PLAIN.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no plain data")
        return super().find_class(module, name)


def read(data: bytes) -> Any:
    return PlainReader(io.BytesIO(data)).load()


def _serve(connection: Connection, settings: EngineSettings) -> None:
    from common.engine.runner.model_runner import ModelRunner

    runner = ModelRunner(settings)
    connection.send_bytes(pickle.dumps(runner.facts))
    while data := connection.recv_bytes():
        step, wants_filled = read(data)

        def filled(spoiled: frozenset[int]) -> None:
            connection.send_bytes(pickle.dumps(("filled", spoiled)))

        try:
            said = ("result", runner.run(step, filled if wants_filled else None))
        except Exception as error:
            said = ("error", repr(error))
        connection.send_bytes(pickle.dumps(said))


class ProcessRunner:
    """Implements `Runner`. `num_bytes` is what crossed."""

    def __init__(self, settings: EngineSettings) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, settings), daemon=True)
        self._process.start()
        theirs.close()
        self._facts: EngineFacts = read(self._connection.recv_bytes())
        self._thread = ThreadPoolExecutor(1)
        self.num_bytes = 0

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    def submit(self, step: StepInput, filled: Filled | None = None, /) -> Future[StepResult]:
        return self._thread.submit(self._run, pickle.dumps((step, filled is not None)), filled)

    def is_lost(self, error: BaseException, /) -> bool:
        return not self._process.is_alive()

    def close(self, within_s: float | None = None) -> None:
        self._thread.shutdown()
        self._connection.send_bytes(b"")
        self._process.join(10.0)
        self._connection.close()

    def _run(self, data: bytes, filled: Filled | None) -> StepResult:
        self.num_bytes += len(data)
        self._connection.send_bytes(data)
        while True:
            kind, value = read(self._connection.recv_bytes())
            if kind == "filled":
                assert filled is not None
                filled(value)
            elif kind == "error":
                raise RuntimeError(value)
            else:
                result: StepResult = value
                return result
