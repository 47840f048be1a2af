"""`pdq bench`: load for a server, and what it did with it.

Owns: the order of a run: prepare everything, warm up, measure, and only then read the answers, so
that the client takes little from the cores it measures. In the open loop nothing waits for
anything: a request is sent when its time has come, however many are open.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from common.commands import running
from common.commands.bench import plot
from common.commands.bench.client import Client, Exchange, read
from common.commands.bench.report import Outcome, rows, show, summarize
from common.commands.bench.workload import (
    WORDS,
    Job,
    Source,
    arrivals,
    draw_lengths,
    fit,
    make_jobs,
    read_trace,
)
from common.commands.processes import Meter, local_processes
from common.commands.settings import BenchSettings, load
from common.errors import ConfigError, PdqError, ResourceError, ServiceUnavailable
from common.settings.config import describe

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_RATE = 2.0
LEAD_S = 0.05  # between the last preparation and the first arrival
TEXT_MARGIN = 20  # 1/20 of the context is left free, because text is only about as long as wanted
SAMPLE_WORDS = 2000  # of the text, to learn how many tokens a word is
SAMPLE_RUNS = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """The server, as it describes itself."""

    url: str
    model: str
    max_model_len: int | None


def main(argv: Sequence[str]) -> int:
    settings = load(BenchSettings, argv, os.environ, "pdq bench")
    if settings.plot:
        plot.check(settings.plot)
    if settings.json and not Path(settings.json).absolute().parent.is_dir():
        raise ConfigError(f"--json: there is no folder {Path(settings.json).parent}", param="json")
    return asyncio.run(_run(settings, Console(highlight=False, markup=False, soft_wrap=True)))


async def _run(settings: BenchSettings, out: Console) -> int:
    target, jobs, num_cut = await _prepare(settings)
    warmups, jobs = jobs[: settings.warmup], jobs[settings.warmup :]
    client = Client(target.url, settings.api_key, settings.timeout)
    rate = settings.rate or (None if settings.concurrency else DEFAULT_RATE)
    how = f"{settings.concurrency} at a time" if rate is None else f"{rate:g} per second"
    cut = f"; {num_cut} cut to the context of {target.max_model_len}" if num_cut else ""
    out.print(f"{target.model} at {target.url}: {len(jobs)} requests, {how}{cut}")

    encode = _encoder(settings, target, client)
    await _closed_loop(client, warmups, [encode(job) for job in warmups], settings.concurrency or 1)
    requests = [encode(job) for job in jobs]
    found, unknown = await _processes(settings)
    gc.collect()
    gc.freeze()
    meter, cpu, began = Meter(found), time.process_time(), time.monotonic()
    if rate is None:
        measured = await _closed_loop(client, jobs, requests, settings.concurrency or 1)
    else:
        measured = await _open_loop(client, jobs, requests)
    gc.unfreeze()
    client_cores = (time.process_time() - cpu) / max(1e-9, time.monotonic() - began)
    uses = meter.read()

    start = min((arrived for arrived, _ in measured), default=0.0)
    outcomes = [
        Outcome.of(job, arrived, exchange, read(exchange), start)
        for job, (arrived, exchange) in zip(jobs, measured, strict=True)
    ]
    summary = summarize(outcomes, settings.ttft_slo, settings.tpot_slo)
    show(out, summary, uses, client_cores)
    for code, message in _first_messages(outcomes).items():
        out.print(f"{code}: {message}")
    if unknown:
        out.print(f"memory of the processes: not known, {unknown}")
    if settings.json:
        report = {
            "settings": describe(settings),
            "command": ["pdq", "bench", *sys.argv[2:]],
            "machine": {"processor": _processor(), "cores": os.cpu_count()},
            "target": dataclasses.asdict(target),
            "num_cut": num_cut,
            "client_cores_used": client_cores,
            "summary": summary,
            "processes": [dataclasses.asdict(use) for use in uses],
            "requests": rows(outcomes),
        }
        _write_json(settings.json, report)
    if settings.plot:
        title = f"{target.model}, {len(jobs)} requests, {how}"
        plot.plot(settings.plot, title, outcomes)
    return 0 if summary["succeeded"] else 1


# ── The two loops ────────────────────────────────────────────────────────────────────────────────


async def _open_loop(
    client: Client, jobs: Sequence[Job], requests: Sequence[bytes]
) -> list[tuple[float, Exchange]]:
    """Each request at its moment; (arrival, exchange) in order."""
    start = time.monotonic() + LEAD_S
    tasks = []
    for job, request in zip(jobs, requests, strict=True):
        wait = start + job.due_s - time.monotonic()
        await asyncio.sleep(max(0.0, wait))
        tasks.append(asyncio.create_task(client.exchange(request)))
    exchanges = await asyncio.gather(*tasks)
    return [(start + job.due_s, e) for job, e in zip(jobs, exchanges, strict=True)]


async def _closed_loop(
    client: Client, jobs: Sequence[Job], requests: Sequence[bytes], concurrency: int
) -> list[tuple[float, Exchange]]:
    """So many at a time; a request arrives when it is sent."""
    measured: dict[int, Exchange] = {}
    waiting = iter(range(len(jobs)))

    async def one_after_another() -> None:
        for place in waiting:
            measured[place] = await client.exchange(requests[place])

    await asyncio.gather(*(one_after_another() for _ in range(min(concurrency, len(jobs)))))
    return [(measured[place].sent_at, measured[place]) for place in range(len(jobs))]


# ── Preparation ──────────────────────────────────────────────────────────────────────────────────


async def _prepare(settings: BenchSettings) -> tuple[Target, list[Job], int]:
    """The server, all jobs (those that warm up first, of no rate), and how many lengths were cut."""
    note = None if settings.url else running.find(os.environ)
    url = settings.url or (note.url if note else DEFAULT_URL)
    url = url.rstrip("/").removesuffix("/v1")
    trace = read_trace(Path(settings.trace)) if settings.trace else []
    headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    try:
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30.0) as http:
            target = await _target(http, url, settings.served_model_name)
            source = await _source(http, target, settings)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise ServiceUnavailable(f"no OpenAI-compatible server answers at {url}: {error}") from error
    # A generator for each, so that another rate or dataset leaves the rest as it was.
    rngs = {part: random.Random(f"{settings.seed} {part}") for part in ("time", "length", "text")}
    count = settings.warmup + settings.requests
    if trace:
        lengths = draw_lengths(trace, count, settings.trace_scale, rngs["length"])
    else:
        lengths = [(settings.prompt_len, settings.output_len)] * count
    longest = target.max_model_len
    if longest is not None and settings.dataset == "text":
        longest -= longest // TEXT_MARGIN
    lengths, num_cut = fit(lengths, longest)
    rate = settings.rate or (None if settings.concurrency else DEFAULT_RATE)
    moments = [0.0] * settings.warmup + arrivals(settings.requests, rate, rngs["time"])
    return (target, make_jobs(source, lengths, moments, settings.shared_prefix, rngs["text"]), num_cut)


async def _target(http: httpx.AsyncClient, url: str, wanted: str) -> Target:
    reply = await http.get("/v1/models")
    reply.raise_for_status()
    served = {str(model["id"]): model for model in reply.json()["data"]}
    name = wanted or next(iter(served), "")
    if name not in served:
        raise ConfigError(
            f"{url} serves {', '.join(served) or 'no model'}, not {name!r}", param="served_model_name"
        )
    longest = served[name].get("max_model_len")
    return Target(url, name, int(longest) if longest else None)


async def _source(http: httpx.AsyncClient, target: Target, settings: BenchSettings) -> Source:
    if settings.dataset == "random" and settings.vocab_size is not None:
        return Source(ids=range(settings.vocab_size))
    words = _words(settings.text_file)
    sample = _sample(words)
    body = {"model": target.model, "prompt": " ".join(sample), "add_special_tokens": False}
    reply = await http.post("/tokenize", json=body)
    if reply.status_code != 200:
        raise ConfigError(
            f"{target.url}/tokenize answers {reply.status_code}; give --vocab-size for random ids",
            param="vocab_size",
        )
    ids: list[int] = reply.json()["tokens"]
    if settings.dataset == "random":
        return Source(ids=sorted(set(ids)))
    return Source(words=words, tokens_per_word=len(ids) / len(sample))


def _sample(words: Sequence[str]) -> Sequence[str]:
    """Runs from all over the text: its parts differ in how many tokens a word is."""
    if len(words) <= SAMPLE_WORDS:
        return words
    step, run = len(words) // SAMPLE_RUNS, SAMPLE_WORDS // SAMPLE_RUNS
    return [word for r in range(SAMPLE_RUNS) for word in words[r * step : r * step + run]]


def _words(path: str) -> Sequence[str]:
    if not path:
        return WORDS
    try:
        words = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", param="text_file") from error
    if not words:
        raise ConfigError(f"{path} is empty", param="text_file")
    return words


def _encoder(settings: BenchSettings, target: Target, client: Client) -> Callable[[Job], bytes]:
    def encode(job: Job) -> bytes:
        return client.encode(
            {
                "model": target.model,
                "prompt": job.prompt,
                "max_tokens": job.output_len,
                "temperature": settings.temperature,
                "seed": (settings.seed << 20) + job.index,
                "stream": True,
                "stream_options": {"include_usage": True},
                **({"ignore_eos": True} if settings.ignore_eos else {}),
            }
        )

    return encode


async def _processes(settings: BenchSettings) -> tuple[dict[int, tuple[str, str]], str]:
    """The deployment's processes here, or why they are not known."""
    try:
        redis = running.redis_of(settings.redis, os.environ)
        return await local_processes(redis, os.environ), ""
    except PdqError as error:
        return {}, str(error)


def _first_messages(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Error code → what the server said the first time."""
    said = {o.error: o.answer.message for o in reversed(outcomes) if o.error and o.answer.message}
    return dict(reversed(said.items()))


# ── Output ───────────────────────────────────────────────────────────────────────────────────────


def _write_json(path: str, report: dict[str, Any]) -> None:
    try:
        Path(path).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error}", param="json") from error


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
