"""What a process finds out before its bus can be reached: the shared key, and its own address."""

from __future__ import annotations

import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.errors import ConfigError, ServiceUnavailable
from common.settings.config import BusSettings, RedisSettings
from common.wire.bus_setup import complete

REDIS = RedisSettings(url="redis://127.0.0.1:6379/0")


def test_the_first_one_makes_the_key_and_the_others_read_it(tmp_path: Path) -> None:
    settings = BusSettings(host="0.0.0.0", secret_key_file=str(tmp_path / "bus.key"))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: complete(settings, REDIS, {}).secret_key, range(16)))
    assert len(set(found)) == 1
    assert len(found[0]) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["bus.key"]
    assert stat.S_IMODE((tmp_path / "bus.key").stat().st_mode) == 0o600


def test_a_file_that_holds_no_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bus.key"
    path.write_text("short")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"bus\.key holds no bus secret key.*remove the file"):
        complete(BusSettings(secret_key_file=str(path)), REDIS, {})


def test_a_place_where_no_key_can_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing/bus\.key"):
        complete(BusSettings(secret_key_file=str(tmp_path / "missing" / "bus.key")), REDIS, {})


@pytest.mark.parametrize("variable", ["XDG_STATE_HOME", "HOME"])
def test_what_one_user_starts_without_naming_a_key_shares_a_private_one(
    tmp_path: Path, variable: str
) -> None:
    environ = {variable: str(tmp_path)}
    first, second = (complete(BusSettings(), REDIS, environ).secret_key for _ in range(2))
    assert first == second
    folder = tmp_path if variable == "XDG_STATE_HOME" else tmp_path / ".local" / "state"
    assert stat.S_IMODE((folder / "pdq").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "pdq" / "bus.key").stat().st_mode) == 0o600


def test_a_named_key_comes_before_the_users_own(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path / "state")}
    named = BusSettings(secret_key_file=str(tmp_path / "bus.key"))
    key = complete(named, REDIS, environ).secret_key
    assert (tmp_path / "bus.key").read_text().strip() == key
    assert complete(BusSettings(secret_key="k" * 40), REDIS, environ).secret_key == "k" * 40
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o622])
def test_a_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "bus.key"
    path.write_text("k" * 40)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=re.escape(f"chmod 600 {path}")) as caught:
        complete(BusSettings(secret_key_file=str(path)), REDIS, {})
    assert "kkkk" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_no_key_is_kept_where_others_could_put_theirs(tmp_path: Path, mode: int) -> None:
    (tmp_path / "pdq").mkdir()
    (tmp_path / "pdq").chmod(mode)
    with pytest.raises(ConfigError, match="others can write"):
        complete(BusSettings(), REDIS, {"XDG_STATE_HOME": str(tmp_path)})
    assert not list((tmp_path / "pdq").iterdir())


def test_where_there_is_no_place_for_a_key_the_setting_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--bus-secret-key-file"):
        complete(BusSettings(), REDIS, {"XDG_STATE_HOME": str(tmp_path / "file")})


def test_an_address_of_redis_that_is_none_is_not_repeated() -> None:
    settings = BusSettings(host="0.0.0.0", secret_key="k" * 40)
    with pytest.raises(ConfigError) as caught:
        complete(settings, RedisSettings(url="redis://:hunter2/x@host"), {})
    assert "hunter2" not in str(caught.value)


def test_key_and_file_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use one"):
        BusSettings(secret_key="k" * 40, secret_key_file=str(tmp_path / "bus.key"))


def test_who_listens_everywhere_is_reached_the_way_it_reaches_redis(tmp_path: Path) -> None:
    settings = BusSettings(host="0.0.0.0", secret_key="k" * 40)
    assert complete(settings, REDIS, {}).advertise_host == "127.0.0.1"
    assert complete(settings, RedisSettings(url="unix:///run/r"), {}).advertise_host == "127.0.0.1"


def test_who_listens_at_one_address_is_reached_there() -> None:
    settings = BusSettings(host="127.0.0.1", secret_key="k" * 40)
    assert complete(settings, REDIS, {}) == settings


def test_a_redis_whose_name_nobody_knows_is_named() -> None:
    settings = BusSettings(host="0.0.0.0", secret_key="k" * 40)
    with pytest.raises(ServiceUnavailable, match=r"redis\.invalid"):
        complete(settings, RedisSettings(url="redis://redis.invalid:6379"), {})
