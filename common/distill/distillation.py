"""A distillation from its settings to a folder: the order of its parts, and what is left of a stop.

    target's engine ─▶ beginnings ─▶ texts ─▶ lessons      then the target's memory is given back
    lessons ─▶ training ─▶ weights ─▶ folder ─▶ acceptance and speed, by real engines

Memory: the target while it writes and scores; lessons, at most `KEPT` likely tokens (6 bytes each) for each
token of text; the draft with two optimizers; logits of at most `AT_ONCE` numbers, a few times over.
"""

from __future__ import annotations

import dataclasses
import random
import shlex
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from torch import Tensor

from common.distill import beginnings, card, folder, start, texts
from common.distill.acceptance import TIMED_TOKENS, Acceptance, Speed, acceptance, speeds
from common.distill.beginnings import Beginnings
from common.distill.display import Display
from common.distill.network import Shape
from common.distill.stop import Stop
from common.distill.texts import Lesson, Text
from common.distill.training import Moment, Training, train
from common.engine.engine import Engine
from common.engine.runner.loaded_model import LoadedModel
from common.errors import ConfigError, InsufficientMemory
from common.model_files import model_name, resolve_model
from common.model_folder.description import ModelDescription, describe_model, read_config
from common.model_folder.model_config import ModelConfig, parse_model_config
from common.settings.config import DistillSettings, describe

LONGEST_ROW = 2048  # positions that are trained, at most
LONG_TEXTS = 8  # one text in so many is also seen in rows of that length
MEASURED_TEXTS = 64  # at each temperature
MEASURED_TEMPERATURES = (0.0, 0.8)
TIMED_PROMPTS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class _Target:
    name: str
    folder: Path
    config: ModelConfig
    description: ModelDescription


@dataclasses.dataclass(frozen=True, slots=True)
class _Lessons:
    """All that is needed of the target's writing."""

    short: Lesson
    long: Lesson | None
    beginnings: Beginnings
    held_out: Mapping[float, list[Text]]  # by temperature
    tokens: int
    device: torch.device


def distill(settings: DistillSettings, display: Display, stop: Stop) -> Path:
    """The folder that was made. Raises `PdqError`; then nothing was."""
    target = _target(settings)
    output = Path(settings.output or f"{Path(target.name).name}-draft").expanduser().absolute()
    folder.check_output(output)
    shape = start.shape_for(target.config, settings.layers, settings.hidden_size)
    _check_smaller(shape, target)
    torch.manual_seed(settings.seed)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    sizes = f"{shape.num_parameters:,} parameters, for {target.name}: {target.config.num_parameters:,}"
    display.say(f"{output.name}: {sizes}")
    lessons = _lessons(settings, target, display)
    weights, last = _weights(settings, target, shape, lessons, display, stop)
    with folder.made_beside(output) as unfinished:
        folder.write_draft(unfinished, target.folder, target.description.config, shape, weights)
        display.say("measuring")
        accepted, fast = _measured(settings, target, unfinished, lessons)
        about = card.About(
            name=output.name,
            target=target.name,
            command=shlex.join(["pdq", "distill", *card.shown_flags(describe(settings))]),
            shape=shape,
            text_tokens=lessons.tokens,
            training=last,
            acceptance=accepted,
            speed=fast,
        )
        (unfinished / folder.CARD).write_text(card.card(about), encoding="utf-8")
        folder.write_json(unfinished / folder.MEASURED, card.as_json(about))
    display.say(card.tables(about))
    serve = ["pdq", "serve", settings.model or str(target.folder), "--speculative", "draft"]
    display.say(f"\n{output}\n{shlex.join([*serve, '--speculative-model', str(output)])}")
    return output


def _target(settings: DistillSettings) -> _Target:
    place = resolve_model(settings.model, settings.revision, weights=True)
    config = read_config(place, required=True)
    return _Target(
        model_name(settings.model, place),
        place,
        parse_model_config(config),
        describe_model(place, config, with_sampling_defaults=False),
    )


def _check_smaller(shape: Shape, target: _Target) -> None:
    if shape.num_parameters >= target.config.num_parameters:
        raise ConfigError(
            f"a draft with {shape.num_parameters:,} parameters is no smaller than {target.name} with "
            f"{target.config.num_parameters:,}; lower --layers or --hidden-size",
            param="hidden_size",
        )


def _engine_settings(settings: DistillSettings) -> dict[str, object]:
    chosen: dict[str, object] = {
        "dtype": settings.dtype,
        "device": settings.device,
        "enable_prefix_caching": False,
    }
    return chosen | ({"threads": settings.threads} if settings.threads is not None else {})


def _engine(settings: DistillSettings, model: Path, **further: object) -> tuple[Engine, LoadedModel]:
    engine = Engine.load(model, **_engine_settings(settings), **further)
    assert isinstance(engine.runner, LoadedModel)
    return engine, engine.runner


def _check_memory(settings: DistillSettings, length: int, target: ModelConfig) -> None:
    """Refuse at once what would be killed for its memory after the target has written everything."""
    kept = min(texts.KEPT, target.vocab_size)
    needed = settings.texts * length * kept * texts.BYTES_KEPT
    free = psutil.virtual_memory().available
    if needed > free:
        raise InsufficientMemory(
            f"{settings.texts} texts of {length} tokens take {needed >> 20} MiB to learn from, and "
            f"{free >> 20} MiB of memory are free; lower --texts or --text-length",
            param="texts",
        )


def _lessons(settings: DistillSettings, target: _Target, display: Display) -> _Lessons:
    context = target.config.rope.positions
    length = min(settings.text_length, context)
    longest = min(context, max(LONGEST_ROW, length))
    _check_memory(settings, length, target.config)
    engine, runner = _engine(settings, target.folder, max_model_len=longest)
    if settings.prompts:
        path = Path(settings.prompts).expanduser()
        known = beginnings.from_file(path, target.folder, target.config.vocab_size)
    else:
        known = beginnings.by_target(engine, target.description, settings.texts, settings.seed)
    with display.stage("the target writes", settings.texts) as stage:
        written = texts.write(
            engine, known.shown, settings.texts, length, settings.temperatures, settings.seed, stage.show
        )
    held_out = {
        temperature: texts.write(
            engine, known.held_out, MEASURED_TEXTS, length, (temperature,), settings.seed + 1, lambda _: None
        )
        for temperature in MEASURED_TEMPERATURES
    }
    rows, long_rows = _rows(settings.seed, written, length, longest)
    with display.stage("the target reads", len(rows) + len(long_rows)) as stage:
        short = texts.score(runner, rows, length, stage.show)
        long = None
        if long_rows:
            long = texts.score(runner, long_rows, longest, lambda done: stage.show(len(rows) + done))
    tokens = sum(len(text.ids) for text in written)
    return _Lessons(short, long, known, held_out, tokens, runner.device.torch_device)


def _rows(
    seed: int, written: list[Text], length: int, longest: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Texts in short rows; and those that do not fit, with some that do, in long ones."""
    fitting = [text.ids for text in written if len(text.ids) <= length]
    others = [text.ids for text in written if len(text.ids) > length]
    if longest >= 2 * length:
        others += random.Random(f"{seed}/rows").sample(fitting, len(fitting) // LONG_TEXTS)
    rows, long_rows = texts.packed(fitting, length), texts.packed(others, longest)
    return (rows, long_rows) if rows else (texts.packed(others, length), long_rows)


def _weights(
    settings: DistillSettings, target: _Target, shape: Shape, lessons: _Lessons, display: Display, stop: Stop
) -> tuple[dict[str, Tensor], Moment]:
    longest = max(lesson.ids.shape[1] for lesson in (lessons.short, lessons.long) if lesson is not None)
    draft = start.fresh(shape, target.config, target.folder, longest).to(lessons.device)
    how = Training(settings.steps, settings.minutes, settings.batch_tokens, settings.seed)
    moments = [Moment(0, 0.0, float("nan"), 0.0, 0)]
    with display.stage("the draft learns", settings.steps) as stage:

        def watch(moment: Moment) -> None:
            moments[:] = [moment]
            rate = moment.tokens / moment.seconds
            stage.show(
                round(moment.progress * settings.steps), f"loss {moment.loss:.3f}, {rate:,.0f} tokens/s"
            )

        with stop.ends_early():
            weights = train(draft, lessons.short, lessons.long, how, watch, lambda: stop.is_wanted)
    if not moments[0].step:
        raise ConfigError("the training was stopped before its first step", param="steps")
    return {name: weight.cpu() for name, weight in weights.items()}, moments[0]


def _measured(
    settings: DistillSettings, target: _Target, draft: Path, lessons: _Lessons
) -> tuple[list[Acceptance], list[Speed]]:
    reach = target.config.rope.positions
    longest = max(len(text.ids) for some in lessons.held_out.values() for text in some)
    _, alone = _engine(settings, draft, max_model_len=max(2, min(longest, reach)), max_num_seqs=2)
    accepted = [acceptance(alone, some, t) for t, some in lessons.held_out.items()]
    del alone
    prompts = [b[: reach - TIMED_TOKENS] for b in lessons.beginnings.held_out[:TIMED_PROMPTS]]
    if reach <= TIMED_TOKENS:
        return accepted, []
    length = TIMED_TOKENS + max(map(len, prompts))
    further = {"max_model_len": length, "max_num_seqs": 4, **_engine_settings(settings)}
    return accepted, speeds(target.folder, draft, prompts, MEASURED_TEMPERATURES, **further)
