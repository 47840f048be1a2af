"""The load client: what it sends, how it reads answers, and what its numbers mean."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.commands.bench.client import Answer, Client, Exchange, read
from common.commands.bench.report import Outcome, distribution, percentile, summarize
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
from common.errors import ConfigError

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


def an_event(text: str = "", reason: str | None = None, **more: Any) -> bytes:
    choices = [{"index": 0, "text": text, "finish_reason": reason}] if "choices" not in more else []
    return b"data: " + json.dumps({"choices": choices, **more}).encode() + b"\n\n"


USAGE = an_event(
    choices=[],
    usage={"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}},
)
DONE = b"data: [DONE]\n\n"
STREAM = [an_event("a"), an_event("b"), an_event("", "length"), USAGE, DONE]


def chunked(*events: bytes) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events)
    return HEAD + b"transfer-encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def in_pieces(data: bytes, *cuts: int) -> Exchange:
    """Arrived in pieces at 1, 2, 3, …"""
    edges = [0, *cuts, len(data)]
    pieces = [(float(i + 1), data[a:b]) for i, (a, b) in enumerate(itertools.pairwise(edges))]
    return Exchange(0.0, 9.0, pieces)


# ── Reading answers ──────────────────────────────────────────────────────────────────────────────


def test_an_event_counts_when_its_last_byte_has_come() -> None:
    data = chunked(*STREAM)
    second = data.index(STREAM[1]) + 10
    answer = read(in_pieces(data, second))
    assert answer == Answer((1.0, 2.0, 2.0), 7, 3, 4, "length", "", "")


@given(st.data())
def test_how_the_bytes_were_cut_changes_no_content(data: st.DataObject) -> None:
    for raw in (chunked(*STREAM), HEAD + b"\r\n" + b"".join(STREAM)):
        cuts = sorted(data.draw(st.lists(st.integers(1, len(raw) - 1), max_size=6, unique=True)))
        answer = read(in_pieces(raw, *cuts))
        assert len(answer.token_times) == 3
        assert list(answer.token_times) == sorted(answer.token_times)
        assert (answer.output_tokens, answer.error) == (3, "")


@pytest.mark.parametrize("kept", [0, 5, len(HEAD), len(chunked(*STREAM)) // 2])
def test_an_answer_that_breaks_off_is_no_success(kept: int) -> None:
    exchange = in_pieces(chunked(*STREAM)[:kept])
    assert read(exchange).error == "connection_lost"
    exchange.failure = "timeout"
    assert read(exchange).error == "timeout"


def test_an_error_status_is_counted_by_its_code() -> None:
    body = b'{"error": {"message": "too many", "code": "overloaded"}}'
    head = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: %d\r\n\r\n" % len(body)
    assert read(in_pieces(head + body)) == Answer((), 0, 0, 0, "", "overloaded", "too many")
    for page in (b"<html>", b"{}", b"[1]", b""):
        assert read(in_pieces(b"HTTP/1.1 502 Bad Gateway\r\n\r\n" + page)).error == "http_502"


def test_an_error_inside_a_stream_is_an_error() -> None:
    error = b'data: {"error": {"message": "gone", "code": "link_lost"}}\n\n'
    answer = read(in_pieces(chunked(STREAM[0], error, DONE)))
    assert (answer.error, answer.message) == ("link_lost", "gone")


def test_an_event_that_is_no_json_is_an_error() -> None:
    assert read(in_pieces(chunked(b"data: {oops\n\n", DONE))).error == "malformed_event"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        Client(url, "", 1.0)


# ── The load ─────────────────────────────────────────────────────────────────────────────────────


def test_arrivals_are_poisson_and_repeat() -> None:
    moments = arrivals(20_000, 50.0, random.Random(1))
    assert moments == arrivals(20_000, 50.0, random.Random(1))
    assert moments[0] == 0.0
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.03)  # as of an exponential
    assert arrivals(3, None, random.Random(1)) == [0.0, 0.0, 0.0]


def test_random_prompts_are_fresh_and_as_long_as_wanted() -> None:
    lengths = [(40, 5), (17, 3), (40, 5)]
    source = Source(ids=range(100, 400))
    jobs = make_jobs(source, lengths, [0.0, 0.5, 1.0], 0, random.Random(2))
    assert [len(job.prompt) for job in jobs] == [40, 17, 40]
    assert [(job.output_len, job.due_s) for job in jobs] == [(5, 0.0), (3, 0.5), (5, 1.0)]
    assert len({tuple(job.prompt[:16]) for job in jobs}) == 3
    assert jobs == make_jobs(source, lengths, [0.0, 0.5, 1.0], 0, random.Random(2))


def test_the_shared_prefix_is_shared_and_the_rest_is_fresh() -> None:
    lengths = [(40, 5), (48, 5), (20, 5)]
    jobs = make_jobs(Source(ids=range(400)), lengths, [0.0] * 3, 32, random.Random(2))
    first, second, short = (job.prompt for job in jobs)
    assert first[:32] == second[:32]
    assert first[32:40] != second[32:40]
    assert short == first[:20]


def test_text_prompts_have_about_the_tokens_wanted() -> None:
    source = Source(words=WORDS, tokens_per_word=1.5)
    (job,) = make_jobs(source, [(300, 5)], [0.0], 0, random.Random(2))
    assert isinstance(job.prompt, str)
    assert len(job.prompt.split()) == 200


def test_text_from_a_file_is_a_passage_of_it() -> None:
    words = [f"w{n}" for n in range(1000)]
    (job,) = make_jobs(Source(words=words), [(20, 5)], [0.0], 0, random.Random(2))
    assert isinstance(job.prompt, str)
    assert job.prompt in " ".join(words)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("azure.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nx,374,44\ny,396,109\n"),
        (
            "mooncake.jsonl",
            '{"timestamp": 0, "input_length": 374, "output_length": 44}\n'
            '{"timestamp": 9, "input_length": 396, "output_length": 109}\n',
        ),
        ("splitwise.csv", "model,prompt_size,token_size\na,374,44\na,396,109\n"),
    ],
)
def test_known_traces_are_read(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert read_trace(path) == [(374, 44), (396, 109)]


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "ContextTokens,GeneratedTokens\nx,y\n"])
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"trace\.csv"):
        read_trace(path)


def test_lengths_are_drawn_without_repetition_and_scaled() -> None:
    trace = [(10 * n, n) for n in range(1, 11)]
    assert sorted(draw_lengths(trace, 10, 1.0, random.Random(1))) == trace
    assert len(draw_lengths(trace, 25, 1.0, random.Random(1))) == 25
    assert set(draw_lengths(trace, 10, 0.01, random.Random(1))) == {(1, 1)}


def test_lengths_beyond_the_context_are_cut_and_counted() -> None:
    assert fit([(90, 10), (95, 10), (5, 500)], 100) == ([(90, 10), (90, 10), (1, 99)], 2)
    assert fit([(90, 10)], None) == ([(90, 10)], 0)


# ── Numbers ──────────────────────────────────────────────────────────────────────────────────────


def an_outcome(
    times: tuple[float, ...] = (1.0, 1.5, 3.0),
    *,
    arrived: float = 0.5,
    sent: float = 0.75,
    ended: float = 3.25,
    tokens: int = 5,
    error: str = "",
) -> Outcome:
    answer = Answer(times, 10, tokens, 2, "length", error, "")
    return Outcome(Job(0, arrived, [1], 1, 1), arrived, sent, ended, answer, times)


def test_latencies_count_from_the_arrival_not_from_the_sending() -> None:
    outcome = an_outcome()
    assert outcome.ttft_s == 0.5
    assert outcome.e2e_s == 2.75
    assert outcome.late_s == 0.25
    assert outcome.itls_s == [0.5, 1.5]
    assert outcome.tpot_s == 0.5  # 2 seconds for the 4 tokens after the first
    assert an_outcome(tokens=1).tpot_s is None


def test_moments_of_an_exchange_are_put_on_the_clock_of_the_run() -> None:
    exchange = Exchange(sent_at=101.0, ended_at=104.0)
    answer = Answer((102.0, 103.0), 1, 2, 0, "stop", "", "")
    outcome = Outcome.of(Job(0, 0.5, [1], 1, 1), 100.5, exchange, answer, 100.0)
    assert (outcome.arrived_at, outcome.sent_at, outcome.ended_at) == (0.5, 1.0, 4.0)
    assert outcome.event_times == (2.0, 3.0)


def test_failures_are_counted_by_code_and_left_out_of_latencies() -> None:
    outcomes = [an_outcome(), an_outcome(error="overloaded"), an_outcome(())]
    summary = summarize(outcomes, None, None)
    assert (summary["succeeded"], summary["failed"]) == (1, 2)
    assert summary["errors"] == {"overloaded": 1, "no_output": 1}
    assert summary["ttft_s"]["count"] == 1
    assert summary["output_tokens_per_s"] == pytest.approx(5 / 3.25)
    assert summary["prompt_tokens_per_s"] == pytest.approx(10 / 3.25)
    assert summary["goodput"] is None


def test_goodput_is_what_kept_every_target() -> None:
    outcomes = [an_outcome(), an_outcome(arrived=0.0), an_outcome(error="timeout")]
    both = summarize(outcomes, 0.6, 0.5)["goodput"]
    assert both["share"] == pytest.approx(1 / 3)
    assert both["requests_per_s"] == pytest.approx(1 / 3.25)
    assert summarize(outcomes, 1.0, None)["goodput"]["share"] == pytest.approx(2 / 3)
    assert summarize(outcomes, 1.0, 0.4)["goodput"]["share"] == 0.0


@given(st.lists(st.floats(0, 1e6), min_size=2), st.integers(1, 99))
def test_percentiles_are_the_usual_ones(values: list[float], percent: int) -> None:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert percentile(sorted(values), percent) == pytest.approx(cuts[percent - 1])


def test_a_distribution_of_nothing_says_so() -> None:
    assert distribution([]) == {"count": 0, "mean": None, "p50": None, "p90": None, "p99": None, "max": None}
