"""The comparison with peers: its loads and limits as they are counted, its targets, tables, and turns."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.engine import BODY
from bench.limits import Limits
from bench.peers import compare_loads, install, plots, rates, servers, session
from bench.peers.bounds import Body
from bench.peers.loads import Sizes, calm_and_burst, tpot_s
from bench.peers.rates import Mix, Target
from common.commands.bench.client import Answer, Exchange
from common.model_folder.model_config import parse_model_config

LIMITS = Limits(matmul_flops=1e12, read_bytes=4e10)
TARGET = Target("", first_token_s=2.0, gap_s=0.2)


# ── Limits ───────────────────────────────────────────────────────────────────────────────────────


def test_the_limits_count_the_weights_that_the_engine_has() -> None:
    body = Body.read(BODY / "config.json")
    config = parse_model_config(json.loads((BODY / "config.json").read_text()))
    assert body.layer_parameters + body.head_parameters == config.num_linear_parameters
    assert body.kv_bytes_per_token == 24 * 1024


def test_a_prompt_pays_for_the_head_once_and_for_half_of_the_square_of_attention() -> None:
    body = Body(layer_parameters=1000, head_parameters=500, num_layers=2, query_width=8, kv_bytes_per_token=4)
    pairs = 100 * 100 / 2  # of positions, in each layer: a score and a sum, multiply and add
    assert body.prompt_s(100, LIMITS) == (2 * 1000 * 100 + 2 * 500 + 2 * pairs * 4 * 8) / 1e12


def test_a_step_is_bound_by_what_takes_longer() -> None:
    body = Body(1_000_000, 0, 1, 8, kv_bytes_per_token=100)
    assert body.step_s(1, 0, LIMITS) == 2_000_000 / 4e10
    assert body.step_s(1, 50, LIMITS) == 2_005_000 / 4e10
    assert body.step_s(1000, 0, LIMITS) == 2e9 / 1e12


def test_the_limit_of_a_batch_is_all_prompts_and_then_all_steps() -> None:
    body = Body(1_000_000, 1000, 2, 8, 100)
    seconds = 16 * body.prompt_s(256, LIMITS) + 63 * body.step_s(16, 256 + 32, LIMITS)
    assert body.batch_tokens_per_s(16, 256, 64, LIMITS) == pytest.approx(16 * 64 / seconds)


def test_a_limit_is_the_larger_of_two_measurements() -> None:
    larger = compare_loads.larger(Limits(1.0, 5.0), Limits(2.0, 4.0))
    assert larger == Limits(2.0, 5.0)


# ── Loads ────────────────────────────────────────────────────────────────────────────────────────


def test_a_stall_that_a_burst_makes_is_the_bursts_from_either_end() -> None:
    one = [0.0, 1.0, 2.0, 9.0, 10.0, 30.0, 31.0]
    calm, burst = calm_and_burst([one, [2.5, 2.75]], calm_from=1.0, burst_from=3.0, ended_at=20.0)
    assert calm == [0.25, 1.0, 1.0]  # before and after the bursts, not before the calm
    assert burst == [1.0, 7.0, 20.0]


def test_time_per_token_counts_tokens_and_not_events() -> None:
    answer = Answer((1.0, 2.0, 5.0), 8, 5, 0, "length", "", "")
    assert tpot_s(answer) == 1.0


# ── Rates ────────────────────────────────────────────────────────────────────────────────────────


def test_every_system_gets_the_same_arrivals() -> None:
    trace = [(400, 80), (4000, 800)]
    once, again = (rates.schedule(2.0, Mix(), trace, seed=1) for _ in range(2))
    assert once == again
    assert once != rates.schedule(2.0, Mix(), trace, seed=2)


def test_chats_come_at_the_rate_with_lengths_of_the_trace_scaled_and_cut() -> None:
    mix = Mix(seconds=1000.0, scale=0.25, longest=(512, 64))
    chats = [arrival for arrival in rates.schedule(2.0, mix, [(400, 80), (4000, 2)], seed=0) if arrival.chat]
    assert 1800 < len(chats) < 2200
    assert all(0 < arrival.due_s < mix.seconds for arrival in chats)
    assert {(arrival.prompt, arrival.output) for arrival in chats} == {(100, 20), (512, 2)}


def test_bursts_come_at_their_moments_whatever_the_rate() -> None:
    mix = Mix(seconds=40.0, first_burst_s=5.0, burst_every_s=15.0)
    for rate in (0.1, 3.0):
        planned = rates.schedule(rate, mix, [(400, 80)], seed=0)
        assert [arrival.due_s for arrival in planned if not arrival.chat] == [5.0, 20.0, 35.0]
        assert planned == sorted(planned, key=lambda arrival: arrival.due_s)


def a_request(
    ttft_s: float = 1.0, gaps_s: Sequence[float] = (0.1,), failed: str = "", chat: bool = True
) -> rates.Row:
    return {"chat": chat, "failed": failed, "ttft_s": ttft_s, "gaps_s": list(gaps_s)}


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (a_request(2.0, [0.2]), True),
        (a_request(2.1, [0.1]), False),
        (a_request(1.0, [0.1, 0.3]), False),  # one stall is enough
        (a_request(1.0, []), True),
        (a_request(1.0, [0.1], failed="timeout"), False),
    ],
)
def test_a_request_in_time_keeps_both_parts_of_the_target(row: rates.Row, kept: bool) -> None:
    assert rates.in_time(row, TARGET) is kept


def test_a_reply_that_was_cut_off_keeps_what_had_come_and_is_not_in_time() -> None:
    event = b'data: {"choices": [{"text": "a"}]}\n\n'
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    some = rates.outcome(True, Exchange(10.0, pieces=[(11.5, head + event), (12.0, event)]), end=60.0)
    assert some == a_request(1.5, [0.5], failed="connection_lost")
    nothing = rates.outcome(False, Exchange(10.0), end=60.0)
    assert nothing == a_request(50.0, [], failed="connection_lost", chat=False)


def test_goodput_counts_bursts_and_latency_only_chats() -> None:
    mix = Mix(seconds=10.0)
    rows = [a_request(1.0, [0.1]), a_request(3.0, [0.3]), a_request(5.0, [0.1], chat=False)]
    found = rates.summary(rows, mix)
    assert (found["ttft_p50_s"], found["gap_p50_s"], found["gap_p99_s"]) == pytest.approx((2.0, 0.2, 0.298))
    steady, prompt = rates.TARGETS
    assert found[f"goodput {steady.name}"] == 0.2  # the chat without a stall, and the burst
    assert found[f"goodput {prompt.name}"] == 0.1
    assert (found["offered"], found["failed"]) == (0.3, 0)


def points(*values: tuple[str, float, float]) -> list[rates.Row]:
    return [{"system": name, "rate": rate, "figures": {"x": value}} for name, rate, value in values]


def test_a_point_of_a_curve_is_the_median_of_its_rounds() -> None:
    found = rates.medians(points(("a", 0.5, 3.0), ("a", 0.5, 1.0), ("a", 0.25, 7.0), ("a", 0.5, 2.0)))
    assert found == {"a": {0.25: {"x": 7.0}, 0.5: {"x": 2.0}}}
    assert list(found["a"]) == [0.25, 0.5]


def test_the_same_curves_draw_the_same_pictures(tmp_path: Path) -> None:
    figures = rates.summary([a_request(), a_request(2.0)], Mix())
    curves = {"pdq": {0.25: figures, 0.5: figures}, "vLLM": {0.25: figures}}
    drawn = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        drawn.append([path.read_bytes() for path in plots.draw(curves, tmp_path / name, "a machine")])
    assert drawn[0] == drawn[1]
    assert all(b"<svg" in picture for picture in drawn[0])


def test_every_system_has_a_color() -> None:
    assert plots.COLORS.keys() == set(servers.SHOWN.values())


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("more_is_better", "shown"), [(True, "0.50 (vLLM)"), (False, "0.50 (transformers)")])
def test_the_best_peer_is_the_best_of_that_figure(more_is_better: bool, shown: str) -> None:
    medians = {"pdq": 2.0, "pdq 1P1D": 99.0, "vLLM": 4.0, "transformers": 1.0}
    found = compare_loads.ratio(medians, "pdq", compare_loads.BEST, more_is_better=more_is_better)
    assert found == shown


def test_above_one_the_first_is_ahead_whichever_way_is_better() -> None:
    medians = {"pdq": 2.0, "vLLM": 1.0}
    assert compare_loads.ratio(medians, "pdq", "vLLM", more_is_better=True) == "2.00"
    assert compare_loads.ratio(medians, "pdq", "vLLM", more_is_better=False) == "0.50"
    assert compare_loads.ratio(medians, "pdq", "pdq 1P1D", more_is_better=True) == "–"


def a_row(system: str, load: str, **figures: float) -> dict[str, Any]:
    limits = {"matmul_flops": LIMITS.matmul_flops, "read_bytes": LIMITS.read_bytes}
    return {"system": system, "load": load, "run": 0, "limits": limits, "figures": figures}


def test_the_report_has_every_row_also_the_failed_ones() -> None:
    body = Body.read(BODY / "config.json")
    least = body.stream_tokens_per_s(*Sizes().stream, LIMITS)
    run = {"command": "loads", "commit": "abc", "machine": "a machine", "versions": {"ours": {"torch": "2"}}}
    rows = [
        a_row("pdq", "stream", tokens_per_s=least / 2, ttft_s=0.1),
        a_row("pdq", "stream", tokens_per_s=least / 4, ttft_s=0.1),
        a_row("vLLM", "stream", tokens_per_s=least / 8, ttft_s=0.2),
        {"system": "vLLM", "load": "batch", "run": 0, "failed": "timeout"},
    ]
    text = compare_loads.report({"runs": [run], "rows": rows}, body)
    shares = text.split("share of the machine's limit")[1].splitlines()[2]
    assert shares.split()[-3:] == ["0.38", "(0.25–0.50)", "0.12"]
    ratios = text.split("times better")[1]
    assert next(row for row in ratios.splitlines() if "one stream" in row).split()[-1] == "3.00"
    assert "failed: vLLM, batch: timeout" in text


# ── Who takes part ───────────────────────────────────────────────────────────────────────────────


def chosen(*flags: str) -> list[str]:
    parser = argparse.ArgumentParser()
    session.add_arguments(parser)
    return session.chosen_systems(parser.parse_args(flags), parser)


def test_all_that_a_named_peer_can_run_takes_part_beside_ours(tmp_path: Path) -> None:
    (python := tmp_path / "python").touch()
    assert chosen() == ["pdq", "pdq-1p1d"]
    assert chosen(f"vllm={python}") == ["pdq", "pdq-1p1d", "vllm", "vllm-1p1d", "vllm-1p1d-reniced"]
    assert chosen(f"vllm={python}", "--systems", "vllm-1p1d", "pdq") == ["pdq", "vllm-1p1d"]


@pytest.mark.parametrize("flags", [("--systems", "vllm"), ("sglang=/bin/sh",), ("vllm",), ("vllm=/nowhere",)])
def test_a_peer_that_cannot_be_run_is_refused_before_anything_starts(flags: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        chosen(*flags)


def test_in_turns_everybody_is_the_first_once() -> None:
    orders = [session.turns(["a", "b", "c"], number) for number in range(3)]
    assert sorted(order[0] for order in orders) == ["a", "b", "c"]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)


def test_rows_of_several_runs_add_up_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for number in range(2):
        results = session.earlier(path)
        results["rows"].append({"number": number})
        session.save(results, path)
    assert session.earlier(path) == {"runs": [], "rows": [{"number": 0}, {"number": 1}]}


# ── Installation ─────────────────────────────────────────────────────────────────────────────────


def test_an_alias_is_a_distribution_of_that_version(tmp_path: Path) -> None:
    install.write_alias(tmp_path, "vllm", "0.32.0+cpu")
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert (found.metadata["Name"], found.version) == ("vllm", "0.32.0+cpu")


def test_whatever_a_recipe_installs_is_pinned() -> None:
    packages = itertools.chain.from_iterable(step for of in install.RECIPES.values() for step in of.steps)
    assert all("==" in package for package in packages if not package.startswith("--"))
