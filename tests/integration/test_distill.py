"""`pdq distill` makes a draft that serves at once and is of use; whatever goes wrong leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from common.distill import __main__ as distill_process
from common.distill import beginnings, distillation, folder, texts
from common.distill.acceptance import acceptance
from common.distill.display import Display
from common.distill.distillation import distill
from common.distill.stop import Stop
from common.distill.texts import Text, packed
from common.distill.training import divergence
from common.engine import Engine, SamplingParams
from common.engine.runner.loaded_model import LoadedModel
from common.errors import (
    CheckpointError,
    ConfigError,
    InsufficientMemory,
    PdqError,
    ResourceError,
    TrainingFailed,
    UnsupportedModel,
)
from common.settings.config import DistillSettings
from tests.support.checkpoints import STORIES

FEW = {"texts": 48, "text_length": 48, "steps": 60, "batch_tokens": 768, "threads": 1}
PROMPTS = ["Once upon a time", "One day, a little", "Lily and Tom went"]


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(output: Path, *, stop: Stop | None = None, **changed: Any) -> Path:
    settings = DistillSettings(**{"model": str(STORIES), "output": str(output), **FEW, **changed})
    return distill(settings, Display(Console(quiet=True)), stop or Stop())


def command(*words: str) -> list[str]:
    few = [f"--{name.replace('_', '-')}={value}" for name, value in FEW.items()]
    return [sys.executable, "-m", "common.cli", "distill", *words, *few]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A draft by the command, and what it printed."""
    output = tmp_path_factory.mktemp("distilled") / "draft"
    ended = subprocess.run(
        command(str(STORIES), f"--output={output}"), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return output, ended.stdout


def runner(model: Path) -> LoadedModel:
    loaded = Engine.load(model, max_num_seqs=2, enable_prefix_caching=False).runner
    assert isinstance(loaded, LoadedModel)
    return loaded


def written(temperature: float) -> list[Text]:
    """What the target writes after some prompts, by its engine."""
    engine = Engine.load(STORIES, enable_prefix_caching=False)
    prompts = [tuple(range(1, 4 + n)) for n in range(8)]
    return texts.write(engine, prompts, 8, 48, (temperature,), 5, lambda _: None)


# ── What is made ─────────────────────────────────────────────────────────────────────────────────


def test_the_draft_serves_at_once_and_changes_no_token(made: tuple[Path, str]) -> None:
    plain = Engine.load(STORIES)
    drafted = Engine.load(STORIES, speculative="draft", speculative_model=str(made[0]))
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_tokens=40, temperature=temperature, seed=3)
        expected = [reply.token_ids for reply in plain.generate(PROMPTS, params)]
        assert [reply.token_ids for reply in drafted.generate(PROMPTS, params)] == expected
    assert drafted.proposer is not None
    assert drafted.proposer.counts["draft"].drafted


def test_the_loss_falls_and_more_is_accepted_than_of_a_draft_that_learned_for_one_step(
    made: tuple[Path, str], tmp_path: Path
) -> None:
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in made[1].splitlines() if "loss " in line]
    untrained = run(tmp_path / "untrained", steps=1)
    first = json.loads((untrained / folder.MEASURED).read_text())["training"]["loss"]
    assert losses[-1] < first - 1.0
    told = json.loads((made[0] / folder.MEASURED).read_text())
    before = json.loads((untrained / folder.MEASURED).read_text())
    for learned, fresh in zip(told["acceptance"], before["acceptance"], strict=True):
        assert learned["equal"] > fresh["equal"]


def test_the_command_its_card_and_its_json_tell_the_measured_acceptance(made: tuple[Path, str]) -> None:
    output, said = made
    card = (output / folder.CARD).read_text()
    told = json.loads((output / folder.MEASURED).read_text())
    for row in told["acceptance"]:
        line = f"| {row['temperature']:g} | {row['equal']:.3f} | {row['tokens_per_step']:.2f} |"
        assert line in said
        assert line in card
        assert sorted(row["by_position"], reverse=True) == row["by_position"]
    assert [speed["same"] for speed in told["speed"]] == [True, True]
    assert "pdq distill stories260K --output draft" in card
    assert "--speculative-model" in said


def test_the_same_seed_gives_the_same_draft_and_another_one_another(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "_measured", lambda *_: ([], []))  # which takes longest
    again, other = run(tmp_path / "again"), run(tmp_path / "other", seed=1)
    weights = [(made_ / "model.safetensors").read_bytes() for made_ in (made[0], again, other)]
    assert weights[0] == weights[1] != weights[2]


def test_a_training_may_be_given_minutes_and_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_measured", lambda *_: ([], []))
    output = run(tmp_path / "draft", steps=10**9, minutes=0.01, layers=1, hidden_size=32, seed=2)
    config = json.loads((output / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (1, 32)


def test_prompts_of_a_file_are_what_texts_begin_with(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": [1, 400, 401]}\n\n{"text": "Once upon"}\n{"prompt": "One day"}\n')
    found = beginnings.from_file(lines, STORIES, 512)
    assert found.shown[0] == (1, 400, 401)
    assert len(found.shown) + len(found.held_out) == 3
    plain = tmp_path / "prompts.txt"
    plain.write_text("Once upon\nOne day\n")
    assert {*beginnings.from_file(plain, STORIES, 512).shown} < {*found.shown, *found.held_out}


# ── Acceptance ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_that_is_its_own_target_is_always_right(temperature: float) -> None:
    """So positions, seeds and noise are those of serving."""
    measured = acceptance(runner(STORIES), written(temperature), temperature)
    assert measured.tokens > 100
    assert measured.equal > 0.99  # a prompt's arithmetic may tip a tie of what was generated
    assert measured.tokens_per_step > 7


def test_texts_are_packed_whole_and_rows_are_never_longer() -> None:
    some = [tuple(range(n)) for n in (3, 9, 5, 2, 4, 1, 10)]
    rows = packed(some, 10)
    assert max(map(len, rows)) <= 10
    assert len(rows) == 4
    assert sum(map(len, rows)) == sum(map(len, some))


@pytest.mark.parametrize("kept", [3, 8])
def test_the_loss_is_the_divergence_of_likely_tokens_and_of_all_others_as_one(kept: int) -> None:
    target, draft = (
        torch.randn(5, 8, generator=torch.Generator().manual_seed(0)),
        torch.arange(40.0).view(5, 8),
    )
    likely = target.log_softmax(-1).topk(kept)
    p, q = (x.softmax(-1).gather(1, likely.indices) for x in (target, draft / 10))
    if kept < 8:
        p, q = (torch.cat((x, 1 - x.sum(-1, keepdim=True)), dim=-1) for x in (p, q))
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(
        divergence(draft / 10, likely.indices, likely.values), expected, rtol=1e-4, atol=1e-5
    )


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────


def left_in(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def damaged(place: Path, **fields: Any) -> Path:
    place.mkdir()
    for path in STORIES.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | fields))
    return place


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"model": "./nowhere"}, ConfigError, "./nowhere does not exist"),
        ({"hidden_size": 40}, ConfigError, "multiple of 32"),
        ({"hidden_size": 512}, ConfigError, "no smaller than stories260K"),
        ({"prompts": "nowhere.txt"}, ConfigError, "no file nowhere.txt"),
        ({"device": "cuda"}, ConfigError, "no CUDA device"),
        ({"texts": 2**24, "text_length": 2**16}, InsufficientMemory, "lower --texts"),
    ],
)
def test_what_cannot_be_distilled_says_why_and_leaves_nothing(
    changed: dict[str, Any], error: type[PdqError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        run(tmp_path / "draft", **changed)
    assert not left_in(tmp_path)


def test_a_target_that_is_not_served_is_refused_as_serving_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="bert"):
        run(tmp_path / "draft", model=str(damaged(tmp_path / "other", model_type="bert")))
    broken = damaged(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="corrupt"):
        run(tmp_path / "draft", model=str(broken))
    assert left_in(tmp_path) == ["broken", "other"]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        run(tmp_path / "draft")
    with pytest.raises(ConfigError, match="is a file"):
        run(tmp_path / "draft" / "thesis.txt")
    assert left_in(tmp_path / "draft") == ["thesis.txt"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "line 1 of .* is not JSON"),
        ('{"prompt": 3}', "line 1 of .* has no prompt"),
        ('["prompt"]', "line 1 of .* has no prompt"),
        ('{"prompt": [512]}', "line 1 of .* beyond the vocabulary"),
        ('{"prompt": [true]}', "line 1 of .* has no prompt"),
        ('{"prompt": "once"}\n{"prompt": "once"}', "1 different beginnings"),
        ("", "0 different beginnings"),
        ("\udcff", "cannot read"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_named(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ConfigError, match=says):
        beginnings.from_file(path, STORIES, 512)


def test_a_full_disk_is_an_error_that_names_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(distillation, "_measured", lambda *_: ([], []))
    monkeypatch.setattr(folder, "write_json", full)
    with pytest.raises(ResourceError, match="No space left"):
        run(tmp_path / "draft", steps=1)
    assert not left_in(tmp_path)


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = distillation.start.fresh

    def broken(*arguments: Any) -> Any:
        draft = fresh(*arguments)
        with torch.no_grad():
            draft.model.norm.weight[0] = float("nan")
        return draft

    monkeypatch.setattr(distillation.start, "fresh", broken)
    with pytest.raises(TrainingFailed, match="loss is nan"):
        run(tmp_path / "draft")
    assert not left_in(tmp_path)


# ── Interruption ─────────────────────────────────────────────────────────────────────────────────


def test_a_stop_in_training_keeps_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_measured", lambda *_: ([], []))
    stop, train = Stop(), distillation.train

    def stopped_after_two(*arguments: Any) -> Any:
        *others, watch, is_stopped = arguments

        def look(moment: Any) -> None:
            watch(moment)
            if moment.step == 2:
                stop.ask()

        return train(*others, look, is_stopped)

    monkeypatch.setattr(distillation, "train", stopped_after_two)
    output = run(tmp_path / "draft", stop=stop)
    assert json.loads((output / folder.MEASURED).read_text())["training"]["step"] == 2


def test_a_second_stop_in_training_and_any_other_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop()
    with stop.ends_early():
        stop.ask()
        with pytest.raises(KeyboardInterrupt):
            stop.ask()
    stop = Stop()
    monkeypatch.setattr(distillation, "_measured", lambda *_: stop.ask())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "draft", steps=1, stop=stop)
    assert not left_in(tmp_path)


def test_ctrl_c_before_the_training_ends_the_command_at_once(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(str(STORIES), f"--output={tmp_path / 'draft'}", "--texts=100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("draft: ")  # it has begun
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert (process.returncode, said) == (130, "pdq distill: interrupted\n")
    assert not left_in(tmp_path)


@pytest.fixture
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
def test_the_process_takes_a_ctrl_c_in_training_as_a_stop_and_a_sigterm_as_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def signalled(_settings: object, _display: object, stop: Stop) -> None:
        with stop.ends_early():
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.is_wanted
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(distillation, "distill", signalled)
    assert distill_process.main([]) == 130
    assert capsys.readouterr().err == "pdq distill: interrupted\n"


def test_an_error_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill_process.main(["--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "d")]) == 1
    assert capsys.readouterr().err.startswith("pdq distill: model folder ")


def test_a_temperature_that_no_request_could_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="temperatures"):
        DistillSettings(temperatures=(-1.0,))
