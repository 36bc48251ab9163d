"""Progress on stderr: bars on a terminal, few lines elsewhere, warnings always."""

import io
import re

import pytest

from sv3d_fast import progress
from sv3d_fast.events import FileWritten, Progress, StageFinished, StageResumed, StageStarted, Warned


class Terminal(io.StringIO):
    def isatty(self):
        return True


def a_run():
    yield StageStarted("splats")
    for done in range(1, 101):
        yield Progress("fit", done, 100, {"loss": 1 / done})
    yield Warned("fit", "two\nlines")
    yield FileWritten("splats.ply")
    yield StageFinished("splats", None, 2.5, 3 << 29)
    yield StageResumed("mesh", None)
    return "value"


def shown(monkeypatch, stream, quiet=False):
    monkeypatch.setattr("sys.stderr", stream)
    assert progress.watch(a_run(), quiet=quiet) == "value"
    return stream.getvalue()


def test_elsewhere_than_on_a_terminal_there_are_lines_alone(monkeypatch):
    text = shown(monkeypatch, io.StringIO())
    assert text.splitlines() == [
        "sv3d-fast: warning: two lines",
        "splats   done in 2.5 s, peak 1.50 GiB",
        "mesh     taken from the earlier run",
    ]
    assert "\r" not in text


def test_long_stages_tell_how_long_they_will_take(monkeypatch):
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines = [line for line in shown(monkeypatch, io.StringIO()).splitlines() if line.startswith("fit")]
    assert lines[0] == "fit      9/100, 03:02 left"  # 8 steps took 16 s; 91 are left
    assert len(lines) == 12  # every 16 seconds of 200


def test_a_bar_on_a_terminal_reaches_its_end(monkeypatch):
    text = shown(monkeypatch, Terminal())
    assert re.search(r"fit +: 100%\|.*100/100 \[", text.split("\r")[-1] if "100/100" in text.split("\r")[-1] else text)
    assert "loss=0.01" in text
    assert "sv3d-fast: warning: two lines\n" in text
    assert text.count("\r") < 30  # redrawn now and then, not for each step


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_shows_warnings_alone(monkeypatch, stream):
    assert shown(monkeypatch, stream(), quiet=True).strip("\r\n") == "sv3d-fast: warning: two lines"


def test_an_error_closes_the_run(monkeypatch):
    closed = []

    def fails():
        try:
            yield Progress("fit", 1, 2)
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    monkeypatch.setattr("sys.stderr", Terminal())
    with pytest.raises(KeyboardInterrupt):
        progress.watch(fails())
    assert closed == [True]


def test_an_interrupt_that_a_library_swallowed_still_stops_the_run(monkeypatch):
    interrupts = []

    def swallows():
        interrupts.append(2)
        yield Progress("fit", 1, 2)
        pytest.fail("the run went on")

    monkeypatch.setattr("sys.stderr", io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        progress.watch(swallows(), interrupts=interrupts)
