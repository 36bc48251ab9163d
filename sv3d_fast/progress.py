"""Progress on stderr, drawn from events: bars on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Generator, Sequence
from typing import Any

from tqdm import tqdm

from .events import Event, Progress, StageFinished, StageResumed, StageStarted, Warned

GIGABYTE = 2**30
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
LINE_EVERY = 15.0  # seconds between two lines of a stage where there is no terminal


def watch(running: Generator[Event, None, Any], *, quiet: bool = False, interrupts: Sequence = ()) -> Any:
    """Runs a stage or pipeline to its end and shows it on stderr; returns its value.

    A stage whose inner stages report under other names gets a bar for each. Warnings are shown even when quiet.
    interrupts: raises KeyboardInterrupt before the next step once there is something in it.
    """
    shown = _Bars() if sys.stderr.isatty() else _Lines()
    try:
        while True:
            if interrupts:
                raise KeyboardInterrupt
            try:
                event = next(running)
            except StopIteration as stop:
                return stop.value
            if isinstance(event, Warned):
                _print(f"sv3d-fast: warning: {' '.join(event.message.split())}")
            elif quiet:
                continue
            elif isinstance(event, Progress):
                shown.step(event)
            elif isinstance(event, StageStarted):
                shown.close()
            elif isinstance(event, StageFinished):
                shown.close()
                took = f"{event.seconds:.1f} s, peak {event.peak_memory / GIGABYTE:.2f} GiB"
                _print(f"{event.stage:<8} done in {took}")
            elif isinstance(event, StageResumed):
                _print(f"{event.stage:<8} taken from the earlier run")
    finally:
        shown.close()
        running.close()


def _print(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # above the bar, if there is one


class _Bars:
    """One bar per stage. Time counts from the first step that is reported: what went before, loading for instance,
    says nothing about how long the other steps take."""

    def __init__(self):
        self.stage, self.bar = None, None

    def step(self, event: Progress) -> None:
        if self.bar is None or self.stage != event.stage:
            self.close()
            self.stage = event.stage
            self.bar = tqdm(
                total=event.total, initial=event.done, desc=f"{event.stage:<8}", file=sys.stderr, bar_format=BAR,
                dynamic_ncols=True,
            )  # fmt: skip
        self.bar.total = event.total
        if event.figures:
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in event.figures.items()}, refresh=False)
        self.bar.update(event.done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.stage, self.bar = None, None


class _Lines:
    """At most one line per stage and LINE_EVERY seconds: for files and logs."""

    def __init__(self):
        self.stage, self.first, self.began, self.last = None, 0, 0.0, 0.0

    def step(self, event: Progress) -> None:
        now = time.monotonic()
        if self.stage != event.stage:
            self.stage, self.first, self.began, self.last = event.stage, event.done, now, now
        elif now - self.last >= LINE_EVERY and event.done > self.first:
            left = (now - self.began) / (event.done - self.first) * (event.total - event.done)
            _print(f"{event.stage:<8} {event.done}/{event.total}, {tqdm.format_interval(left)} left")
            self.last = now

    def close(self) -> None:
        self.stage = None
