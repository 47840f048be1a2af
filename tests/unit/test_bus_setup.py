"""What a process finds out before its bus can be reached: the shared key, and its own address."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.bus_setup import complete
from common.config import BusSettings, RedisSettings
from common.errors import ConfigError, ServiceUnavailable

REDIS = RedisSettings(url="redis://127.0.0.1:6379/0")


def test_the_first_one_makes_the_key_and_the_others_read_it(tmp_path: Path) -> None:
    settings = BusSettings(host="0.0.0.0", secret_key_file=str(tmp_path / "bus.key"))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: complete(settings, REDIS).secret_key, range(16)))
    assert len(set(found)) == 1
    assert len(found[0]) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["bus.key"]
    assert stat.S_IMODE((tmp_path / "bus.key").stat().st_mode) == 0o600


def test_a_file_that_holds_no_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bus.key"
    path.write_text("short")
    with pytest.raises(ConfigError, match=r"bus\.key holds no bus secret key.*remove the file"):
        complete(BusSettings(secret_key_file=str(path)), REDIS)


def test_a_place_where_no_key_can_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing/bus\.key"):
        complete(BusSettings(secret_key_file=str(tmp_path / "missing" / "bus.key")), REDIS)


def test_key_and_file_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use one"):
        BusSettings(secret_key="k" * 40, secret_key_file=str(tmp_path / "bus.key"))


def test_who_listens_everywhere_is_reached_the_way_it_reaches_redis(tmp_path: Path) -> None:
    settings = BusSettings(host="0.0.0.0", secret_key="k" * 40)
    assert complete(settings, REDIS).advertise_host == "127.0.0.1"
    assert complete(settings, RedisSettings(url="unix:///run/r")).advertise_host == "127.0.0.1"


def test_who_listens_at_one_address_is_reached_there() -> None:
    settings = BusSettings(host="127.0.0.1")
    assert complete(settings, REDIS) == settings


def test_a_redis_whose_name_nobody_knows_is_named() -> None:
    settings = BusSettings(host="0.0.0.0", secret_key="k" * 40)
    with pytest.raises(ServiceUnavailable, match=r"redis\.invalid"):
        complete(settings, RedisSettings(url="redis://redis.invalid:6379"))
