"""Bodies that are slow, huge, deep or hostile: worked on in processes, one client's own trouble."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import unicodedata
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from common import processor_share
from common.errors import ContextLengthExceeded, InvalidRequest, Overloaded, ServiceUnavailable
from common.model_folder.description import describe_model
from gateway.chat_template import ChatTemplate
from gateway.intake.limits import IntakeLimits
from gateway.intake.pool import SHORT_BODY, SMALL_BODY, Intake
from gateway.intake.prepare import Prepared, Question, prepare
from gateway.patterns import LINEAR
from gateway.served_models import ServedModel, ServedModels
from gateway.tokenizer import Tokenizer, most_characters
from tests.support.fake_cluster import MODEL, FakeCluster, until
from tests.support.gateway_server import MODELS, LazyForker, load_tokenizer, serving

COMPLETIONS, CHAT = Question("completions"), Question("chat")
TOKENIZE, DETOKENIZE = Question("tokenize"), Question("detokenize")


def models(name: str = "stories260K") -> ServedModels:
    return ServedModels([ServedModel(MODEL, load_tokenizer(name))])


@contextlib.contextmanager
def template(source: str) -> Any:
    """The qwen2 tokenizer with another chat template."""
    tokenizer = load_tokenizer("tokenizers/qwen2")
    before = tokenizer._chat_template
    tokenizer._chat_template = ChatTemplate(source, {})
    try:
        yield models("tokenizers/qwen2")
    finally:
        tokenizer._chat_template = before


@contextlib.asynccontextmanager
async def intake(
    served: ServedModels | None = None, processes: int = 2, *, has_spare_time: bool = False, **limits: float
) -> AsyncIterator[Intake]:
    """`limits` are those of `IntakeLimits` that are others than a gateway's."""
    made = served or models()
    forker = LazyForker(made, IntakeLimits(**limits), has_spare_time=has_spare_time)
    running = Intake(made, forker, processes)
    with contextlib.closing(running):
        yield running


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def padded(size: int, **fields: object) -> bytes:
    """The same body in `size` bytes."""
    data = body(**fields)
    return data + b" " * (size - len(data))


def chat(text: str = "hi", **fields: object) -> bytes:
    return body(messages=[{"role": "user", "content": text}], **fields)


# ── The same wherever it is done ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("question", "fields"),
    [
        (COMPLETIONS, {"prompt": "Once upon a time", "echo": True, "temperature": 0.5, "n": 3}),
        (COMPLETIONS, {"prompt": ["Once", "upon"], "stop": ["x"], "mood": 1, "seed": None}),
        (COMPLETIONS, {"prompt": [[1, 2, 3], [4]], "logit_bias": {"5": 1}, "echo": True}),
        (TOKENIZE, {"prompt": "Once upon a time", "return_token_strs": True}),
        (DETOKENIZE, {"tokens": [403, 407, 261]}),
    ],
)
async def test_a_process_makes_the_same_of_a_body(question: Question, fields: Any) -> None:
    wanted = prepare(models(), question, body(**fields))
    async with intake() as running:
        for size in (SMALL_BODY, SMALL_BODY + 1, SHORT_BODY + 1):
            got = await running.prepare("a", question, padded(size, **fields))
            assert got == wanted


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"prompt": 5}, InvalidRequest, "prompt"),
        ({"prompt": "a" * 600_000}, ContextLengthExceeded, "prompt"),
        ({"prompt": [1] * 600}, ContextLengthExceeded, "prompt"),
        ({"prompt": "a", "n": 99}, InvalidRequest, "n"),
        ({"prompt": "a", "model": "other"}, InvalidRequest, "model"),
    ],
)
async def test_errors_come_back_as_they_are(fields: Any, kind: type[Exception], param: str) -> None:
    async with intake() as running:
        with pytest.raises(kind) as found:
            await running.prepare("a", COMPLETIONS, padded(SHORT_BODY + 1, **fields))
        with pytest.raises(kind) as in_place:
            prepare(models(), COMPLETIONS, body(**fields))
    assert str(found.value) == str(in_place.value)
    assert found.value.param == in_place.value.param == param  # type: ignore[attr-defined]


async def test_a_chat_template_never_runs_on_the_event_loop() -> None:
    async with intake(models("tokenizers/qwen2")) as running:
        for question, data in ((CHAT, chat()), (TOKENIZE, chat())):
            await running.prepare("a", question, data)
        assert running._short._idle


def with_pattern(folder: Path, pattern: str) -> ServedModels:
    """The gpt2 tokenizer with a pattern of its own before the bytes."""
    shutil.copytree(MODELS / "tokenizers/gpt2", folder, dirs_exist_ok=True)
    data = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = [split, data["pre_tokenizer"]]
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return ServedModels([ServedModel(MODEL, Tokenizer(describe_model(folder)))])


@pytest.mark.parametrize("question", [COMPLETIONS, TOKENIZE])
async def test_a_pattern_of_the_models_own_never_runs_on_the_event_loop(
    question: Question, tmp_path: Path
) -> None:
    """This one takes seconds for a few kilobytes, below the library's limit in each piece."""
    hostile = with_pattern(tmp_path, "(?:a|aa)+b|.")
    data = body(prompt=("a" * 28 + "!") * 270)
    assert len(data) < SMALL_BODY
    async with intake(hostile, processor_s=0.2) as running:
        with pytest.raises(InvalidRequest, match="too much time"):
            await running.prepare("a", question, data)
        await running.prepare("a", question, body(prompt="x"))


@pytest.mark.parametrize("pattern", sorted(LINEAR))
def test_a_published_pattern_never_comes_near_the_librarys_limit_of_retries(pattern: str) -> None:
    """Which is counted for each match; the texts are of the kinds that make patterns backtrack."""
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    for piece in ("a", " ", "\n", " \n", "'", "1", "A", "a1 ", "!\r", "\u0301"):
        assert split.pre_tokenize_str(piece * 60_000)


# ── Hostile bodies ───────────────────────────────────────────────────────────────────────────────


DEEP = b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@pytest.mark.parametrize(
    ("question", "data"),
    [
        (COMPLETIONS, DEEP),
        (COMPLETIONS, body(prompt="a", logit_bias={str(n): 1 for n in range(200_000)})),
        (COMPLETIONS, body(prompt="a", stop_token_ids=list(range(500_000)))),
        (COMPLETIONS, body(prompt="a", stop=["x"] * 500_000)),
        (COMPLETIONS, body(prompt="a", stop="x" * 1_000_000)),
        (COMPLETIONS, body(prompt="a", stream_options={f"k{n}": 1 for n in range(200_000)})),
        (COMPLETIONS, b'{"prompt": [' + b"9" * 4_000_000 + b"]}"),
        (COMPLETIONS, b'{"prompt": "a", "n": ' + b"9" * 4_000 + b"}"),
        (COMPLETIONS, body(prompt=["a"] * 500_000)),
        (DETOKENIZE, body(tokens=["a"] * 700_000)),
        (DETOKENIZE, body(tokens=[500] * 700_000 + [10**9])),
        (TOKENIZE, body(messages=[1] * 1_000_000)),
    ],
)
async def test_a_hostile_body_is_a_bad_request(question: Question, data: bytes) -> None:
    async with intake() as running:
        with pytest.raises(InvalidRequest):
            await running.prepare("a", question, data)


async def test_a_body_that_takes_too_long_is_a_bad_request_and_the_next_one_is_served() -> None:
    bomb = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    with template(bomb) as hostile:
        async with intake(hostile, processor_s=0.2) as running:
            with pytest.raises(InvalidRequest, match="too much time"):
                await running.prepare("a", CHAT, chat())
            await running.prepare("a", COMPLETIONS, padded(SHORT_BODY, prompt="x"))


@pytest.mark.parametrize(
    "bomb",
    [
        "{{ 'a' * 3000000000 }}",
        "{{ messages[0].content * 100000 * 100000 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% set ns = namespace(x='a' * 1000) %}{% for i in range(99999) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{{ '%9999999999d' % 1 }}",
    ],
)
async def test_a_template_that_wants_all_memory_gets_a_bad_request(bomb: str) -> None:
    with template("{% if messages %}" + bomb + "{% endif %}") as hostile:
        async with intake(hostile, processor_s=1.0, memory_bytes=2**27) as running:
            with pytest.raises(InvalidRequest):
                await running.prepare("a", CHAT, chat())


# ── Processes ────────────────────────────────────────────────────────────────────────────────────


def workers(running: Intake) -> list[psutil.Process]:
    children: list[psutil.Process] = psutil.Process(running._forker.pid).children()
    return children


async def test_a_worker_that_dies_is_replaced() -> None:
    async with intake() as running:
        await running.prepare("a", COMPLETIONS, padded(SHORT_BODY + 1, prompt="x"))
        (worker,) = workers(running)
        worker.kill()
        await until(lambda: running._long._idle[0][0].has_ended)
        await running.prepare("a", COMPLETIONS, padded(SHORT_BODY + 1, prompt="x"))
        assert worker not in workers(running)


async def test_the_process_that_forks_is_replaced_too() -> None:
    async with intake() as running:
        await running.prepare("a", COMPLETIONS, padded(SHORT_BODY + 1, prompt="x"))
        known = workers(running)
        os.kill(running._forker.pid, signal.SIGKILL)
        await until(lambda: not any(worker.is_running() for worker in known))
        await running.prepare("a", COMPLETIONS, padded(SHORT_BODY + 1, prompt="x"))


async def test_long_bodies_are_worked_on_in_time_that_nobody_else_wants() -> None:
    """A chat of some lines is not: it may not wait for a node that computes all the time."""
    async with intake(models("tokenizers/qwen2"), has_spare_time=True) as running:
        await running.prepare("a", COMPLETIONS, padded(SHORT_BODY + 1, prompt="x"))
        (long,) = workers(running)
        await running.prepare("a", CHAT, chat())
        (short,) = (worker for worker in workers(running) if worker != long)
        assert os.sched_getscheduler(long.pid) == os.SCHED_IDLE
        assert os.sched_getscheduler(short.pid) == os.SCHED_OTHER
        assert short.nice() == min(os.nice(0) + processor_share.NICE, 19)
        assert (os.getsid(long.pid), os.getsid(short.pid)) == (long.pid, short.pid)
        assert share(long.pid) in (processor_share.NICEST, None)
        assert share(short.pid) in (processor_share.NICE, None)


def share(pid: int) -> int | None:
    """The niceness of a session; None where the system does not share by sessions."""
    try:
        return int(Path(f"/proc/{pid}/autogroup").read_text().split()[-1])
    except OSError:
        return None


async def test_a_worker_that_gives_no_answer_is_killed_and_its_client_may_come_back() -> None:
    async with intake(spare_wall_s=1.0) as running:
        await running.prepare("a", COMPLETIONS, padded(SHORT_BODY + 1, prompt="x"))
        (worker,) = workers(running)
        worker.suspend()
        with pytest.raises(Overloaded, match="no processor"):
            await running.prepare("a", COMPLETIONS, padded(SHORT_BODY + 1, prompt="x"))
        await until(lambda: not worker.is_running())


async def test_a_worker_that_has_grown_is_replaced() -> None:
    async with intake(growth_bytes=-1) as running:  # any is too much
        for _ in range(3):
            data = body(prompt=[1] * 500_000)
            with pytest.raises(ContextLengthExceeded):
                await running.prepare("a", COMPLETIONS, data)
        await until(lambda: not workers(running))


async def test_an_idle_worker_ends() -> None:
    async with intake(idle_s=0.01) as running:
        await running.prepare("a", COMPLETIONS, padded(SHORT_BODY + 1, prompt="x"))
        await until(lambda: not workers(running))


async def test_no_process_outlives_its_gateway() -> None:
    async with intake() as running:
        await running.prepare("a", COMPLETIONS, padded(SHORT_BODY + 1, prompt="x"))
        mine = [psutil.Process(running._forker.pid), *workers(running)]
    await until(lambda: not any(p.is_running() for p in mine))


# ── Fairness ─────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def stopped(running: Intake, count: int = 1) -> AsyncIterator[None]:
    """All long workers are stopped meanwhile."""
    await asyncio.gather(
        *(running.prepare(f"warm{n}", COMPLETIONS, padded(SHORT_BODY + 1, prompt="x")) for n in range(count))
    )
    known = workers(running)
    for worker in known:
        worker.suspend()
    yield
    for worker in known:
        worker.resume()


async def test_bodies_that_wait_when_a_gateway_ends_are_refused_and_start_no_worker() -> None:
    async with intake() as running, stopped(running):
        data = padded(SHORT_BODY + 1, prompt="x")
        asked = [asyncio.create_task(running.prepare("a", COMPLETIONS, data)) for _ in range(3)]
        await until(lambda: any(running._long._waiting.values()))
        running.close()
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ServiceUnavailable] * 3
        assert not running._long._tasks


async def test_a_gateway_that_ends_starts_no_process_for_a_body_that_comes_now() -> None:
    data = padded(SHORT_BODY + 1, prompt="x")
    async with intake() as running:
        await running.prepare("a", COMPLETIONS, data)
        running.close()
        with pytest.raises(ServiceUnavailable, match="this gateway ends"):
            await running.prepare("a", COMPLETIONS, data)
        assert not running._forker.pid


async def test_clients_take_turns() -> None:
    order: list[str] = []

    async def ask(running: Intake, client: str) -> None:
        await running.prepare(client, COMPLETIONS, padded(SHORT_BODY + 1, prompt="x"))
        order.append(client)

    async with intake(processes=1) as running:
        async with stopped(running):
            asked = [asyncio.create_task(ask(running, "greedy")) for _ in range(8)]
            await until(lambda: len(running._long._waiting.get("greedy", ())) == 7)
            asked.append(asyncio.create_task(ask(running, "other")))
            await until(lambda: "other" in running._long._waiting)
        await asyncio.gather(*asked)
    assert order.index("other") <= 2


async def test_one_client_leaves_a_worker_for_the_others() -> None:
    async with intake(processes=2) as running:
        async with stopped(running, 2):
            data = padded(SHORT_BODY + 1, prompt="x")
            asked = [asyncio.create_task(running.prepare("greedy", COMPLETIONS, data)) for _ in range(5)]
            await until(lambda: running._long._running["greedy"] == 1)
            asked.append(asyncio.create_task(running.prepare("other", COMPLETIONS, data)))
            await until(lambda: running._long._running["other"] == 1)
            assert running._long._running["greedy"] == 1
        await asyncio.gather(*asked)


async def test_when_too_much_waits_whoever_has_most_of_it_is_told_so() -> None:
    data = padded(SHORT_BODY + 1, prompt="x")
    async with intake(processes=1, waiting=4) as running:
        async with stopped(running):
            greedy = [asyncio.create_task(running.prepare("greedy", COMPLETIONS, data)) for _ in range(5)]
            await until(lambda: len(running._long._waiting.get("greedy", ())) == 4)
            other = asyncio.create_task(running.prepare("other", COMPLETIONS, data))
            await until(lambda: any(task.done() for task in greedy))
        outcomes = await asyncio.gather(*greedy, return_exceptions=True)
        assert sum(isinstance(outcome, Overloaded) for outcome in outcomes) == 1
        assert isinstance(await other, Prepared)


async def test_short_bodies_do_not_wait_for_long_ones() -> None:
    async with intake(models("tokenizers/qwen2"), processes=1) as running:
        async with stopped(running):
            long = asyncio.create_task(running.prepare("a", COMPLETIONS, padded(SHORT_BODY + 1, prompt="x")))
            assert await running.prepare("a", CHAT, chat())
            assert not long.done()
        await long


async def test_a_client_that_goes_while_its_body_waits_gives_up_its_place() -> None:
    data = padded(SHORT_BODY + 1, prompt="x")
    async with intake(processes=1) as running:
        async with stopped(running):
            first, second = (asyncio.create_task(running.prepare("a", COMPLETIONS, data)) for _ in range(2))
            await until(lambda: "a" in running._long._waiting)
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
        await first
        await until(lambda: not running._long._waiting and not running._long._running)


# ── What a text has at least ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["stories260K", "tokenizers/qwen2", "tokenizers/gpt2"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "a" * 5000,
        " " * 5000,
        "\n" * 3000,
        "é" * 2000,
        "e\u0301" * 2000,
        "\u1112\u1161\u11ab" * 999,
        "the quick brown fox " * 100,
        "<|im_end|>" * 300,
        "👩‍👧" * 500,
        "----" * 2000,
        "\0" * 100,
    ],
)
def test_a_text_has_at_least_so_many_tokens(name: str, text: str) -> None:
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode_now(text, add_special_tokens=False)
    assert tokenizer.least_tokens(text) <= len(ids)


def test_a_normalizer_may_make_one_character_of_four() -> None:
    pipeline = {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel"},
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {"a": 0}},
    }
    text = "\u03b1\u0313\u0300\u0345"
    assert len(unicodedata.normalize("NFC", text)) == 1
    assert most_characters(pipeline) == len(text)


@pytest.mark.parametrize("name", ["stories260K", "tokenizers/qwen2", "tokenizers/gpt2"])
def test_a_text_that_is_long_enough_is_known_to_be_too_long(name: str) -> None:
    assert load_tokenizer(name).least_tokens("a" * 4_000_000) > 2_000


# ── Over HTTP ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("size", [0, SHORT_BODY + 1])
async def test_every_choice_echoes_its_prompt(stream: bool, size: int) -> None:
    cluster = FakeCluster(lambda dispatch, choice: [403, 407, 2])
    cluster.add("u1")
    prompts = ["Once upon a time", '"é\n\u2028']
    fields = {"model": "stories", "echo": True, "n": 2, "stream": stream, "prompt": prompts}
    async with serving(cluster) as served, httpx.AsyncClient(base_url=served.url, timeout=30) as http:
        answer = await http.post(
            "/v1/completions", content=padded(size, **fields), headers={"content-type": "application/json"}
        )
    assert answer.status_code == 200, answer.text
    texts = [""] * 4
    lines = answer.text.split("\n") if stream else [f"data: {answer.text}"]
    for line in lines:
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                texts[choice["index"]] += choice["text"]
    ends = {text.removeprefix(prompts[index // 2]) for index, text in enumerate(texts)}
    assert all(text.startswith(prompts[index // 2]) for index, text in enumerate(texts))
    assert len(ends) == 1
