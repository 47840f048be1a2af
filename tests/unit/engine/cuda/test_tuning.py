"""The fastest launches, by a timer that is told how long each takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from common.engine.devices.cuda.products import GpuProducts
from common.engine.devices.cuda.settling import QUICK
from common.engine.devices.cuda.tuning import Tuning

KEY = "bfloat16 of some shape, 16 rows"


@dataclasses.dataclass
class Named:
    name: str

    def __call__(self, weight: object, x: object, out: object) -> None:
        """Nothing is computed."""


NARROW, WIDE, BROKEN = Named("narrow"), Named("wide"), Named("broken")


class FakeTimer:
    """Seconds of each way; what it was asked for, in order. A way without seconds fails."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.seconds, self.asked, self.running = seconds, list[str](), ""

    def __call__(self, launch: Callable[[], None]) -> float:
        launch()
        self.asked.append(self.running)
        if self.running not in self.seconds:
            raise RuntimeError("out of resource")
        return self.seconds[self.running]

    def run(self, way: Named) -> None:
        self.running = way.name


def ranked(timer: FakeTimer, file: Path | None, *ways: Named) -> list[str]:
    tuning = Tuning(timer, file)
    found = [way.name for way in tuning.ranked(KEY, ways, timer.run)]  # type: ignore[arg-type]
    tuning.save()
    return found


def test_the_fastest_comes_first_and_one_that_fails_does_not() -> None:
    timer = FakeTimer({"narrow": 2e-5, "wide": 1e-5})
    assert ranked(timer, None, BROKEN, NARROW, WIDE) == ["wide", "broken", "narrow"]


def test_one_way_alone_is_not_timed() -> None:
    timer = FakeTimer({})
    assert ranked(timer, None, NARROW) == ["narrow"]
    assert timer.asked == []


def test_what_was_measured_once_is_read_by_the_next_process(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "launches.json"
    ranked(FakeTimer({"narrow": 2e-5, "wide": 1e-5}), file, NARROW, WIDE)
    timer = FakeTimer({})
    assert ranked(timer, file, NARROW, WIDE) == ["wide", "narrow"]
    assert timer.asked == []


def test_a_launch_that_is_no_longer_there_is_measured_anew(tmp_path: Path) -> None:
    file = tmp_path / "launches.json"
    ranked(FakeTimer({"narrow": 2e-5, "wide": 1e-5}), file, NARROW, WIDE)
    timer = FakeTimer({"narrow": 1e-5, "broken": 2e-5})
    assert ranked(timer, file, BROKEN, NARROW) == ["narrow", "broken"]
    assert timer.asked == ["broken", "narrow"]


@pytest.mark.parametrize("place", [0, 20, 40, -1])
@pytest.mark.parametrize("is_cut", [False, True], ids=["changed", "cut"])
def test_a_damaged_file_is_measured_anew(
    tmp_path: Path, place: int, is_cut: bool, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "launches.json"
    ranked(FakeTimer({"narrow": 2e-5, "wide": 1e-5}), file, NARROW, WIDE)
    content = bytearray(file.read_bytes())
    content[place] ^= 0xFF
    file.write_bytes(content[:place] if is_cut else content)
    timer = FakeTimer({"narrow": 1e-5, "wide": 2e-5})
    assert ranked(timer, file, NARROW, WIDE) == ["narrow", "wide"]
    assert "products.tuning_unreadable" in caplog.text
    assert ranked(FakeTimer({}), file, NARROW, WIDE) == ["narrow", "wide"]


def test_processes_that_measure_at_once_lose_nothing_that_was_written_before(tmp_path: Path) -> None:
    file = tmp_path / "launches.json"
    one, other = (Tuning(FakeTimer({}), file) for _ in range(2))
    for tuning, key, best in ((one, "a", WIDE), (other, "b", NARROW)):
        timer = FakeTimer({"narrow": 2e-5, "wide": 1e-5} if best is WIDE else {"narrow": 1e-5, "wide": 2e-5})
        tuning._timer = timer
        tuning.ranked(key, [NARROW, WIDE], timer.run)  # type: ignore[arg-type]
    one.save()
    other.save()
    third = Tuning(FakeTimer({}), file)
    for key, best in (("a", WIDE), ("b", NARROW)):
        assert third.ranked(key, [NARROW, WIDE], lambda way: None)[0] is best  # type: ignore[comparison-overlap]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    file = tmp_path / "file" / "launches.json"
    assert ranked(FakeTimer({"narrow": 2e-5, "wide": 1e-5}), file, NARROW, WIDE) == ["wide", "narrow"]
    assert "products.not_kept" in caplog.text


def test_no_memory_for_a_launch_is_not_taken_for_slowness() -> None:
    def timer(launch: Callable[[], None]) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Tuning(timer, None).ranked(KEY, [NARROW, WIDE], lambda way: None)  # type: ignore[list-item]


@pytest.mark.usefixtures("exact_products")
def test_measurements_choose_launches_and_leave_the_digest_alone(tmp_path: Path) -> None:
    weight = torch.randn(40, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    digests, names = set(), []
    for sign in (1, -1):
        seconds = iter(range(100))

        def timer(launch: Callable[[], None], seconds: object = seconds, sign: int = sign) -> float:
            return sign * next(seconds)  # type: ignore[call-overload, no-any-return]

        products = GpuProducts(
            torch.bfloat16, torch.device("cpu"), multiprocessors=4, proof=QUICK, tuning=Tuning(timer, None)
        )
        linear = products.linear(weight, None)
        digests.add(products.settle())
        names.append([way.name for way in linear._plan.ways])
    assert len(digests) == 1
    assert names[0] != names[1]
