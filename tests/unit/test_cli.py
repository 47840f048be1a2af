"""The command line: its settings, its errors, what it starts where, and what it prints."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from common import cli
from common.commands import cores, running
from common.commands.child import Child, ending
from common.commands.inspect import stages
from common.commands.redis_shell import command_line
from common.commands.serve import Compiling, curl_line
from common.commands.settings import ServeSettings, load_deployment
from common.commands.supervisor import Part
from common.errors import ConfigError
from common.logs import ROOT as ROOT_LOGGER
from common.logs import LineFormatter, get_logger
from common.settings.config import GatewaySettings, NodeSettings, RedisSettings, child_environment, describe
from common.store.request_record import ChoiceRecord
from common.store.request_state import State

ROOT = Path(__file__).parents[2]


# ── Dispatch and errors ──────────────────────────────────────────────────────────────────────────


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in cli.COMMANDS)


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_of_a_command_lists_its_settings(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: pdq {command} ")
    assert ("--redis-url" in said) == (command != "distill")  # which needs no running system


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (
            ["sevre"],
            2,
            "pdq: no command 'sevre'; there are serve, nodes, queue, requests, redis, distill, bench",
        ),
        (["nodes", "--wide"], 1, "pdq nodes: unrecognized arguments: --wide (see pdq nodes --help)"),
        (["requests", "--limit", "0"], 1, "pdq requests: --limit must be at least 1, not 0"),
        (
            ["bench", "--rate", "1", "--concurrency", "1"],
            1,
            "pdq bench: use --rate or --concurrency, not both",
        ),
        (
            ["serve", "--prefill", "0"],
            1,
            "pdq serve: 0 prefill and 1 decode nodes cannot serve: at least one of each, or --unified, "
            "is needed",
        ),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    arguments: list[str], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == code
    said = capsys.readouterr()
    assert said.err == line + "\n"
    assert not said.out


def test_without_a_command_the_help_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: pdq COMMAND" in capsys.readouterr().out


def test_no_command_imports_torch_or_what_it_starts() -> None:
    modules = sorted({module for module, _, _ in cli.COMMANDS.values()})
    code = (
        f"import sys, common.cli, {', '.join(modules)}\n"
        "heavy = {'torch', 'numba', 'gateway', 'common.engine', 'common.node', 'matplotlib'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# ── The settings of `pdq serve` ──────────────────────────────────────────────────────────────────


def test_every_setting_of_gateway_and_nodes_is_one_of_serve() -> None:
    ours = set(describe(ServeSettings()))
    theirs = set(describe(GatewaySettings())) | set(describe(NodeSettings()))
    assert theirs - ours == {"name", "role"}
    assert ours - theirs == {"prefill", "decode", "unified"}


def test_a_setting_that_both_have_reaches_both() -> None:
    deployment = load_deployment(
        [
            "some/model",
            "--served-model-name",
            "it",
            "--port",
            "1234",
            "--block-size",
            "32",
            "--redis-url",
            "redis://somewhere",
            "--grace-period-s",
            "7",
        ],
        {},
    )
    gateway, node = deployment.gateway, deployment.node
    assert gateway.model == node.engine.model == "some/model"
    assert gateway.served_model_name == node.engine.served_model_name == "it"
    assert gateway.redis == node.redis == RedisSettings(url="redis://somewhere")
    assert gateway.grace_period_s == node.grace_period_s == 7
    assert (gateway.port, node.engine.block_size) == (1234, 32)


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        ([], (1, 1, 0)),
        (["--prefill", "2", "--decode", "3"], (2, 3, 0)),
        (["--unified", "1"], (0, 0, 1)),
        (["--unified", "2", "--decode", "1"], (0, 1, 2)),
    ],
)
def test_the_nodes_there_will_be(flags: list[str], counts: tuple[int, int, int]) -> None:
    deployment = load_deployment(flags, {})
    assert (deployment.prefill, deployment.decode, deployment.unified) == counts


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--unified", "0", "--decode", "0"], "1 prefill and 0 decode"),
        (["--cores", "99999"], "core 99999 is not ours"),
        (["--bus-port", "5000"], "--bus-port"),
        (["--metrics-port", "5000"], "--metrics-port"),
        (["--name", "mine"], "--name"),
        (["--role", "decode"], "--role"),
        (["--port", "0", "model"], "model"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_deployment(flags, {})


def test_children_get_their_own_settings_and_no_secret_on_a_command_line() -> None:
    environ = {"PDQ_PREFILL": "2", "PDQ_REDIS_URL": "redis://:secret@here", "PATH": "/bin"}
    deployment = load_deployment([], environ)
    assert deployment.prefill == 2
    for settings in (deployment.gateway, deployment.node):
        child = child_environment(settings, environ)
        assert child["PDQ_REDIS_URL"] == "redis://:secret@here"
        assert child["PATH"] == "/bin"
        assert "PDQ_PREFILL" not in child


def test_all_nodes_divide_the_gpus_between_them() -> None:
    """However few there are: with one GPU and two nodes each takes half of its memory."""
    assert load_deployment([], {}).node.gpu_nodes == 2
    assert load_deployment(["--prefill=2", "--decode=5", "--unified=1"], {}).node.gpu_nodes == 8
    assert load_deployment(["--gpu-nodes=9"], {}).node.gpu_nodes == 9


def test_children_log_warnings_unless_told_otherwise() -> None:
    assert load_deployment([], {}).gateway.log.level == "warning"
    assert load_deployment(["--log-level", "info"], {}).node.log.level == "info"


# ── Cores ────────────────────────────────────────────────────────────────────────────────────────


@given(st.sets(st.integers(0, 255), min_size=1).map(sorted), st.integers(1, 40))
def test_shares_are_equal_disjoint_and_ours(own: list[int], num_nodes: int) -> None:
    shares = cores.divide(own, num_nodes)
    assert len(shares.nodes) == num_nodes
    assert len({len(share) for share in shares.nodes}) == 1
    given_out = [core for share in shares.nodes for core in share]
    assert set(given_out) <= set(own)
    assert shares.rest
    assert set(shares.rest) <= set(own)
    if len(own) >= num_nodes:
        assert len(given_out) == len(set(given_out))
        assert not shares.note
    else:
        assert {len(share) for share in shares.nodes} == {1}
        assert set(given_out) == set(own)
        assert f"{num_nodes} nodes take turns" in shares.note


def test_what_is_left_is_for_the_gateway() -> None:
    assert cores.divide(range(3), 2).rest == (2,)
    assert cores.divide(range(2), 2).rest == (0, 1)  # nothing is: it shares
    assert cores.divide(range(16), 2).rest == (14, 15)


@pytest.mark.parametrize(
    ("own", "text"), [((3,), "core 3"), ((0, 1, 2, 5), "cores 0-2,5"), ((1, 3), "cores 1,3")]
)
def test_cores_are_shown_as_runs(own: tuple[int, ...], text: str) -> None:
    assert cores.shown(own) == text


# ── The note of a running `pdq serve` ────────────────────────────────────────────────────────────


def test_a_running_serve_is_found_and_its_note_private(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    redis = RedisSettings(url="redis://:secret@here", prefix="mine")
    with running.announced("http://127.0.0.1:1", redis, environ) as path:
        assert path.stat().st_mode & 0o077 == 0
        assert path.parent.stat().st_mode & 0o077 == 0
        note = running.find(environ)
        assert note is not None
        assert (note.pid, note.url) == (os.getpid(), "http://127.0.0.1:1")
        assert running.redis_of(RedisSettings(timeout_s=1.0), environ) == RedisSettings(
            url="redis://:secret@here", prefix="mine", timeout_s=1.0
        )
        named = RedisSettings(url="redis://other")
        assert running.redis_of(named, environ) == named
    assert running.find(environ) is None
    with pytest.raises(ConfigError, match="no `pdq serve` of this user is running"):
        running.redis_of(RedisSettings(), environ)


@pytest.mark.parametrize("content", ["", "{}", '{"pid": 1}', "[1, 2]", '{"pid": "x", "started": 1}'])
def test_a_note_that_cannot_be_read_is_removed(tmp_path: Path, content: str) -> None:
    path = tmp_path / "pdq" / "serve-1.json"
    path.parent.mkdir()
    path.write_text(content)
    assert running.find({"XDG_RUNTIME_DIR": str(tmp_path)}) is None
    assert not path.exists()


def test_a_note_of_a_process_that_is_gone_is_removed(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    with running.announced("http://x", RedisSettings(url="redis://x"), environ) as path:
        content = path.read_text().replace('"started": ', '"started": 1')  # a later process
        path.write_text(content)
        assert running.find(environ) is None
        assert not path.exists()


# ── redis-cli ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("url", "place", "password"),
    [
        ("redis://127.0.0.1:7000/2", ["-h", "127.0.0.1", "-p", "7000", "-n", "2"], ""),
        ("redis://:p%2Fw@[::1]", ["-h", "::1", "-p", "6379"], "p/w"),
        ("rediss://me:pw@host/0", ["-h", "host", "-p", "6379", "-n", "0", "--tls", "--user", "me"], "pw"),
        ("unix://:pw@/run/r%20s.sock", ["-s", "/run/r s.sock"], "pw"),
    ],
)
def test_redis_cli_is_led_to_any_address_with_the_password_apart(
    url: str, place: list[str], password: str
) -> None:
    assert command_line(url) == (place, password)


# ── What is printed ──────────────────────────────────────────────────────────────────────────────


def test_the_curl_line_survives_any_model_name_and_shows_no_key() -> None:
    line = curl_line("http://127.0.0.1:1", "it's/a $model", guarded=True)
    assert line.endswith('-H "Authorization: Bearer $PDQ_API_KEY"')
    echo = line.replace("curl ", "printf '%s\\n' ", 1)
    said = subprocess.run(["sh", "-c", echo], capture_output=True, text=True, check=True).stdout
    assert '"model": "it\'s/a $model"' in said


def test_stages_show_what_does_not_add_up() -> None:
    choice = ChoiceRecord(
        0,
        State.FINISHED,
        1,
        "p",
        "d",
        5,
        0,
        "stop",
        "",
        "",
        {},
        {"queue": 0.003, "prefill": 0.02, "decode": 12.0},
    )
    assert stages(choice, 12_050) == "queue 3ms prefill 20ms decode 12.0s rest 27ms"
    assert stages(choice, None) == "queue 3ms prefill 20ms decode 12.0s"


def test_how_a_process_ended_in_words() -> None:
    assert ending(3) == "exit code 3"
    assert ending(-9) == "killed by SIGKILL"
    assert ending(-200) == "killed by signal 200"


# ── A first start ────────────────────────────────────────────────────────────────────────────────


def kernel_lines(*kernels: str) -> list[str]:
    """As a node writes them (common/engine/devices/cpu/kernel_cache.py)."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(LineFormatter("node"))
    logging.getLogger(ROOT_LOGGER).addHandler(handler)
    for kernel in kernels:
        get_logger("kernels").warning("kernels.compiling", kernel=kernel)
    logging.getLogger(ROOT_LOGGER).removeHandler(handler)
    return written.getvalue().splitlines()


def test_a_part_that_compiles_kernels_is_making_progress() -> None:
    part = Part("decode-1", "common.node", (), {}, ())
    first, second = kernel_lines("multiply", "sample_rows")
    part.slow = True
    assert part.progress(first) == "multiply (kernel 1 of a first start)"
    assert part.progress(second) == "sample_rows (kernel 2 of a first start)"
    assert not part.slow
    assert part.progress_at > 0
    waiting = second.replace("compiling", "waiting")
    assert part.progress(waiting) == "sample_rows (in another process, for which it waits)"
    assert part.progress("2026 WARNING node kernels.not_cached trouble=full") == ""


async def last_words_of(folder: Path, program: str, takes: str) -> str:
    folder.joinpath("talks.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    cores_here = tuple(os.sched_getaffinity(0))
    child = await Child.start("talks", (), environment, cores_here, 0, lambda line: takes in line)
    await child.ended
    return child.last_words


def test_what_is_taken_of_a_childs_lines_is_not_shown(tmp_path: Path) -> None:
    program = "import sys\nprint('one\\ntwo', file=sys.stderr)"
    assert asyncio.run(last_words_of(tmp_path, program, "two")) == "one"
    assert asyncio.run(last_words_of(tmp_path, program, "none")) == "two"


def test_on_a_terminal_the_first_kernel_has_a_line_and_the_others_share_one_that_changes() -> None:
    written = io.StringIO()
    compiling = Compiling(Console(file=written, force_terminal=True, width=80))
    assert compiling.is_news("decode-1", "compiling", "multiply")
    assert not compiling.is_news("prefill-1", "compiling", "sample_rows")
    assert compiling.is_news("decode-1", "ready", "")
    assert compiling.is_news("prefill-1", "ready", "")
    compiling.end()
    assert "prefill-1: sample_rows" in written.getvalue()


def test_elsewhere_each_kernel_has_a_line() -> None:
    compiling = Compiling(Console(file=io.StringIO()))
    assert all(compiling.is_news("decode-1", "compiling", kernel) for kernel in ("one", "two"))
