"""Progress lines: counts, rate, time to go, failures; on a clock of the test's own."""

from __future__ import annotations

import io

import pytest

from slides import progress
from slides.progress import Meter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_line_holds_rate_time_to_go_and_failures(clock: Clock) -> None:
    out = io.StringIO()
    meter = Meter(4, every=10, out=out)
    meter.patch(100, 0)
    clock.now += 5
    meter.patch(0, 50)  # 10 a second; one slide of four is begun
    assert out.getvalue() == ""  # not yet due
    assert meter.line() == "0 of 4 slides, 50 patches, 10/s, 35 s to go"
    clock.now += 5
    meter.patch(0, 50)
    meter.slide("ok")
    assert out.getvalue() == "0 of 4 slides, 100 patches, 10/s, 30 s to go\n"
    meter.slide("failed")
    assert meter.line().endswith(", 1 failed")
    meter.slide("empty")
    meter.slide("busy")
    meter.say(last=True)
    assert out.getvalue().splitlines()[-1] == "4 of 4 slides, 100 patches, 10/s, 1 failed"


def test_a_terminal_has_one_line_that_is_written_over(clock: Clock) -> None:
    out = Terminal()
    meter = Meter(1, out=out)
    for _ in range(3):
        clock.now += 1
        meter.patch(1, 1)
    meter.say(last=True)
    assert out.getvalue().count("\r") == 4 and out.getvalue().count("\n") == 1 and out.getvalue().endswith("\n")


def test_nothing_done_gives_no_division_by_zero(clock: Clock) -> None:
    assert Meter(0, out=io.StringIO()).line() == "0 of 0 slides, 0 patches, 0/s"
    meter = Meter(3, out=io.StringIO())
    meter.patch(5, 0)
    assert meter.line() == "0 of 3 slides, 0 patches, 0/s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3600, "1 h 00 min"), (90_060, "25 h 01 min")]
)
def test_spans(seconds: float, text: str) -> None:
    assert progress._span(seconds) == text
