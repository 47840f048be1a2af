"""Settings: precedence, names, types, and that every mistake is one clear line."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from common.api_keys import read_keys
from common.commands.settings import COMMANDS
from common.errors import ConfigError
from common.settings import loader as config_loader
from common.settings.config import (
    SERVICES,
    EngineSettings,
    GatewaySettings,
    NodeSettings,
    child_environment,
    describe,
    load,
)
from common.settings.loader import setting
from common.settings.values import parse_bytes


def toml(folder: Path, text: str) -> str:
    path = folder / "pdq.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(tmp_path: Path) -> None:
    path = toml(tmp_path, "[engine]\nmax_num_seqs = 3\nblock_size = 32\nmax_model_len = 100\n")
    environ = {"PDQ_CONFIG": path, "PDQ_MAX_NUM_SEQS": "5", "PDQ_BLOCK_SIZE": "8"}
    settings = load(NodeSettings, ["--max-num-seqs", "7"], environ)
    assert settings.engine.max_num_seqs == 7
    assert settings.engine.block_size == 8
    assert settings.engine.max_model_len == 100
    assert settings.engine.max_num_batched_tokens is None


def test_the_config_flag_beats_the_config_variable(tmp_path: Path) -> None:
    path = toml(tmp_path, "port = 9000")
    settings = load(GatewaySettings, ["--config", path], {"PDQ_CONFIG": "/no/such/file"})
    assert settings.port == 9000


def test_nested_trees_have_their_prefix_and_the_engine_has_none() -> None:
    argv = ["--redis-url=redis://h", "--dtype", "float32", "--bus-port", "7"]
    settings = load(NodeSettings, argv, {})
    assert settings.redis.url == "redis://h"
    assert settings.engine.dtype == "float32"
    assert settings.bus.port == 7


@pytest.mark.parametrize(
    ("argv", "environ", "said"),
    [
        (["--no-such-flag", "1"], {}, "--no-such-flag"),
        (["--max-num", "1"], {}, "--max-num"),  # an abbreviation is not a name
        (["stray"], {}, "stray"),
        ([], {"PDQ_MAX_NUM_SEQ": "1"}, "PDQ_MAX_NUM_SEQ"),
        (["--max-num-seqs", "many"], {}, "--max-num-seqs must be an integer or none, not 'many'"),
        (["--max-num-seqs", "0"], {}, "--max-num-seqs must be at least 1"),
        (["--max-num-seqs"], {}, "expected one argument"),
        ([], {"PDQ_BLOCK_SIZE": "1.5"}, "PDQ_BLOCK_SIZE must be an integer"),
        (["--dtype", "int3"], {}, "one of auto, bfloat16"),
        (
            ["--transports", "shm,pigeon"],
            {},
            "--transports must be a list, each one of cuda_ipc, shm, nixl, nccl, tcp",
        ),
        (["--bus-beat-interval-s", "nan"], {}, "must be a number"),
        (["--kv-cache-memory-bytes", "2 parsecs"], {}, "--kv-cache-memory-bytes"),
        ([], {"PDQ_ENABLE_PREFIX_CACHING": "maybe"}, "true or false"),
        (["--num-kv-blocks=1", "--kv-cache-memory-bytes=1"], {}, "both give the pool's size"),
        (["--device", "cuda:"], {}, "--device must be one of auto, cpu, cuda, cuda:N, not 'cuda:'"),
        (["--device", "cuda:-1"], {}, "one of auto, cpu, cuda, cuda:N"),
        (["--device", "cpu:0"], {}, "one of auto, cpu, cuda, cuda:N"),
        ([], {"PDQ_DEVICE": "cuda:0x1"}, "PDQ_DEVICE must be one of auto, cpu, cuda, cuda:N"),
        (["--gpu-memory-utilization", "0"], {}, "must be more than 0, not 0"),
        (["--gpu-memory-utilization", "1.01"], {}, "must be at most 1, not 1.01"),
        (["--gpu-memory-utilization", "90%"], {}, "--gpu-memory-utilization must be a number"),
        (["--tensor-parallel-size", "2"], {}, "tensor_parallel_size is reserved"),
        (["--num-speculative-tokens", "4"], {}, "speculative is off"),
        ([], {"PDQ_NUM_SPECULATIVE_TOKENS": "4"}, "speculative is off"),
        (["--speculative", "guess"], {}, "--speculative must be one of off, ngram"),
        (
            ["--speculative=ngram", "--num-speculative-tokens=65"],
            {},
            "--num-speculative-tokens must be at most 64, not 65",
        ),
        (["--speculative=ngram", "--num-speculative-tokens=0"], {}, "must be at least 1"),
        (
            ["--speculative=ngram", "--num-speculative-tokens=20", "--max-num-batched-tokens=20"],
            {},
            "num_speculative_tokens (20) and the token that follows them do not fit into a step of "
            "max_num_batched_tokens (20)",
        ),
        (["--bus-host", "0.0.0.0"], {}, "only loopback"),
        ([], {"PDQ_BUS_SECRET_KEY": "short"}, "40 characters"),
        ([], {"PDQ_CORES": ","}, "PDQ_CORES must be a list"),
        (["--config", "/no/such/file"], {}, "/no/such/file"),
    ],
)
def test_a_mistake_is_a_config_error_that_names_it(
    argv: list[str], environ: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load(NodeSettings, argv, environ)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("colour = 1", "colour is not a setting"),
        ("[engine]\ncolour = 1", "engine.colour is not a setting"),
        ("engine = 1", "engine is not a setting"),
        ("[engine]\nmax_num_seqs = true", "engine.max_num_seqs must be an integer"),
        ("[engine]\nmax_num_seqs = '1'", "engine.max_num_seqs must be an integer"),
        ("[engine]\nmax_num_seqs = 0", "at least 1"),
        ("[engine]\ndevice = 'gpu'", "engine.device must be one of auto, cpu, cuda, cuda:N, not 'gpu'"),
        ("[engine]\ndevice = 0", "engine.device must be one of auto, cpu, cuda, cuda:N, not 0"),
        ("name = 3", "name must be text"),
        ("name = ", "cannot read settings"),
    ],
)
def test_a_mistake_in_the_file_names_file_and_place(tmp_path: Path, text: str, said: str) -> None:
    path = toml(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        load(NodeSettings, ["--config", path], {})
    assert path in str(caught.value)


def test_variables_of_another_service_are_no_mistake() -> None:
    assert load(NodeSettings, [], {"PDQ_MAX_N": "3", "HOME": "/"}).role == "unified"


def test_an_empty_variable_counts_as_absent() -> None:
    assert load(NodeSettings, [], {"PDQ_BLOCK_SIZE": ""}).engine.block_size == 16


# ── Secrets ──────────────────────────────────────────────────────────────────────────────────────


EVERYTHING: list[type[Any]] = [*SERVICES, *COMMANDS]
REDIS_WITH_PASSWORD = [
    "redis://:tops3cret@h",
    "redis://u:tops3cret@h/0",
    "redis://h?password=tops3cret",
    "rediss://:tops3cret/slash@h:1",
    "unix://u:tops3cret@/run/r.sock",
    "redis://[tops3cret",
]


def test_secrets_appear_neither_in_descriptions_nor_in_errors() -> None:
    settings = load(GatewaySettings, [], {"PDQ_API_KEYS": "tops3cret"})
    assert settings.api_keys == ("tops3cret",)
    assert "tops3cret" not in str(describe(settings))
    with pytest.raises(ConfigError) as caught:
        config_loader.load(_WithSecret, [], {"PDQ_PIN": "tops3cret"})
    assert "tops3cret" not in str(caught.value)


@pytest.mark.parametrize("service", EVERYTHING, ids=lambda service: service.__name__)
def test_a_secret_on_the_command_line_is_refused_and_not_repeated(service: type[Any]) -> None:
    """Whoever lists processes would see it."""
    for leaf in config_loader._leaves(service):
        values = REDIS_WITH_PASSWORD if leaf.path == ("redis", "url") else ["tops3cret"]
        for value in values if leaf.secret else ():
            for flags in ([f"{o}={value}" for o in leaf.options], [leaf.flag, value]):
                with pytest.raises(ConfigError, match=leaf.variable) as caught:
                    config_loader.load(service, flags, {})
                assert "tops3cret" not in str(caught.value)


def test_vllms_flag_for_a_key_says_where_keys_go() -> None:
    with pytest.raises(ConfigError, match="set PDQ_API_KEYS"):
        load(GatewaySettings, ["--api-key", "tops3cret"], {})


@pytest.mark.parametrize("flags", [["--api-kye=tops3cret"], ["--api-kye", "tops3cret"]])
def test_what_stands_beside_an_unknown_flag_is_not_repeated(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match="--api-kye") as caught:
        load(GatewaySettings, flags, {})
    assert "tops3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["redis://h:1/0", "rediss://h", "unix:///run/a@b/redis.sock"])
def test_an_address_without_a_password_may_be_a_flag(url: str) -> None:
    assert load(NodeSettings, ["--redis-url", url], {}).redis.url == url


def test_a_settings_file_with_a_secret_is_for_its_user_only(tmp_path: Path) -> None:
    path = toml(tmp_path, "api_keys = ['tops3cret']")
    Path(path).chmod(0o644)
    with pytest.raises(ConfigError, match=re.escape(f"chmod 600 {path}")) as caught:
        load(GatewaySettings, ["--config", path], {})
    assert "tops3cret" not in str(caught.value)
    Path(path).chmod(0o600)
    assert load(GatewaySettings, ["--config", path], {}).api_keys == ("tops3cret",)


@pytest.mark.parametrize("key", ["", " ", "a b", "a,b", "tab\t", "schlüssel", "\udcff", "new\nline"])
def test_a_key_that_no_client_could_show_is_refused_unseen(key: str) -> None:
    with pytest.raises(ConfigError, match="key 2 of PDQ_API_KEYS") as caught:
        GatewaySettings(api_keys=("tops3cret", key))
    assert "tops3cret" not in str(caught.value)
    assert not key.strip() or key not in str(caught.value)


def test_keys_in_a_file_stand_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbf# ours\r\n\r\n  sk-one \r\nsk-two # Ada's\n#sk-three\n")
    path.chmod(0o600)
    assert read_keys(path) == ("sk-one", "sk-two")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no API key"),
        (b"# none yet\n\n", "holds no API key"),
        (b"sk-one tops3cret", "line 1 of .* more than a key"),
        (b"sk-one\nsk,tops3cret", "line 2 of .* printable ASCII"),
        (b"\xff\xfetops3cret", "not UTF-8"),
        (b"tops3cret\n" * 10_000, "larger than"),
        (None, "cannot be read"),
    ],
)
def test_a_file_of_keys_that_cannot_be_meant_is_named(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    with pytest.raises(ConfigError, match=said) as caught:
        read_keys(path)
    assert str(path) in str(caught.value)
    assert "tops3cret" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_file_of_keys_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys"
    path.write_text("sk-one")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=re.escape(f"chmod 600 {path}")):
        read_keys(path)


# ── Where strangers could come from ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "0", "192.0.2.1", "fe80::1", "example.org", "::ffff:192.0.2.1"]
)
def test_a_gateway_without_keys_does_not_listen_beyond_loopback(host: str) -> None:
    with pytest.raises(ConfigError, match=r"without API keys.*PDQ_API_KEYS.*--api-key-file"):
        GatewaySettings(host=host)
    assert GatewaySettings(host=host, api_keys=("sk-one",)).is_guarded
    assert GatewaySettings(host=host, api_key_file="keys").is_guarded
    assert not GatewaySettings(host=host, allow_unauthenticated=True).is_guarded


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_gateway_on_loopback_needs_no_key(host: str) -> None:
    assert GatewaySettings(host=host).is_private


def test_a_container_is_where_its_host_publishes_it() -> None:
    assert GatewaySettings(host="0.0.0.0", published_host="127.0.0.1").is_private
    with pytest.raises(ConfigError, match=r"not '0\.0\.0\.0'"):
        GatewaySettings(host="127.0.0.1", published_host="0.0.0.0")


@dataclasses.dataclass(frozen=True)
class _WithSecret:
    pin: int = setting(0, "a number", secret=True)


@dataclasses.dataclass(frozen=True)
class _Needed:
    """A service with one setting that has no default."""

    size: int = setting(help="how large", flag="how-large")


def test_a_setting_without_default_is_needed_and_its_flag_may_have_another_name() -> None:
    with pytest.raises(ConfigError, match=r"--how-large \(or PDQ_HOW_LARGE\) is needed"):
        config_loader.load(_Needed, [], {})
    assert config_loader.load(_Needed, ["--how-large=4"], {}).size == 4


def test_lists_come_with_commas_or_by_repetition_and_none_empties_them() -> None:
    assert load(NodeSettings, ["--cores", "1,2", "--cores", "3"], {}).engine.cores == (1, 2, 3)
    assert load(NodeSettings, ["--transports", "none"], {}).transports == ()
    assert load(NodeSettings, ["--max-model-len", "none"], {}).engine.max_model_len is None


def test_a_gpu_is_set_by_the_names_that_vllm_has() -> None:
    argv = ["--device=cuda:12", "--gpu-memory-utilization=1", "--enforce-eager", "--tensor-parallel-size=1"]
    engine = load(NodeSettings, argv, {"PDQ_SHARE_GPU": "1"}).engine
    assert (engine.device, engine.gpu_memory_utilization, engine.enforce_eager) == ("cuda:12", 1.0, True)
    assert engine.share_gpu
    assert EngineSettings().gpu_memory_utilization == 0.9


def test_switches_have_a_negative_form() -> None:
    assert not load(NodeSettings, ["--no-enable-prefix-caching"], {}).engine.enable_prefix_caching
    assert load(NodeSettings, ["--kv-digests"], {"PDQ_KV_DIGESTS": "0"}).engine.kv_digests


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("1k", 1000), ("1.5GiB", 3 * 2**29), ("2g", 2 * 10**9)]
)
def test_sizes_may_carry_a_unit(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_sizes_in_the_file_may_carry_a_unit_too(tmp_path: Path) -> None:
    path = toml(tmp_path, "[engine]\nkv_cache_memory_bytes = '2KiB'\n")
    assert load(NodeSettings, ["--config", path], {}).engine.kv_cache_memory_bytes == 2048


def test_a_child_process_loads_exactly_the_same_settings() -> None:
    argv = ["--role=prefill", "--cores=1", "--transports=none", "--no-kv-digests", "--name=a b"]
    argv += ["--bus-beat-interval-s=0.25", "--max-model-len=9"]
    settings = load(NodeSettings, argv, {"PDQ_REDIS_URL": "redis://:secret@h"})
    environ = child_environment(settings, {"PATH": "/bin", "PDQ_PORT": "1", "PDQ_BLOCK_SIZE": "4"})
    assert load(NodeSettings, [], environ) == settings
    assert environ["PATH"] == "/bin"
    assert "PDQ_PORT" not in environ


SECRET = ("api-keys", "bus-secret-key")  # those that no flag gives


@pytest.mark.parametrize("service", SERVICES)
def test_help_has_one_line_for_every_setting(service: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(service, ["--help"], {})
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for flag in describe(service()):
        variable = "PDQ_" + flag.replace("-", "_").upper()
        (line,) = [line for line in lines if line.endswith(f"[{variable}]")]
        assert line.split()[0].rstrip(",") == (variable if flag in SECRET else f"--{flag}")
        assert "default: " in line
    for leaf in config_loader._leaves(service):
        assert leaf.field.metadata["help"], f"{leaf.flag} has no help text"


@pytest.mark.parametrize("service", SERVICES)
def test_no_two_settings_of_a_service_share_a_name(service: type) -> None:
    flags = [leaf.flag for leaf in config_loader._leaves(service)]
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"speculative_model": "x"}, "speculative_model", "off"),
        ({"speculative": "ngram", "speculative_model": "x"}, "speculative_model", "ngram"),
        ({"speculative": "ngram", "speculative_by_text": True}, "speculative_by_text", "ngram"),
        ({"speculative": "draft", "model": "big"}, "speculative_model", "big"),
    ],
)
def test_settings_of_a_draft_model_that_conflict_are_named(
    fields: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        EngineSettings(**fields)
    assert raised.value.param == param
    assert says in raised.value.message
