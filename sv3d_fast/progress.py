"""Progress bars of the command line, drawn from events."""

import sys
from collections.abc import Generator
from typing import Any

from tqdm import tqdm

from .events import Event, Progress, StageFinished, StageResumed, StageStarted, Warned

GIGABYTE = 2**30
BAR = "{l_bar}{bar:30}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def watch(running: Generator[Event, None, Any], *, quiet: bool = False) -> Any:
    """Runs a stage or pipeline to its end, one bar per stage on stderr; returns its value.

    A stage whose inner stages report under other names gets a bar for each. Warnings are shown even when quiet.
    """
    bar: tqdm | None = None
    stage = None
    try:
        while True:
            try:
                event = next(running)
            except StopIteration as stop:
                return stop.value
            if isinstance(event, Warned):
                tqdm.write(f"sv3d-fast: warning: {event.message}", file=sys.stderr)
            elif quiet:
                continue
            elif isinstance(event, Progress):
                if bar is None or stage != event.stage:
                    if bar is not None:
                        bar.close()
                    stage = event.stage
                    bar = tqdm(total=event.total, desc=f"{stage:<8}", file=sys.stderr, bar_format=BAR, leave=True)
                bar.total = event.total
                if event.figures:
                    bar.set_postfix({k: f"{v:.3g}" for k, v in event.figures.items()}, refresh=False)
                bar.update(event.done - bar.n)
            elif isinstance(event, StageFinished):
                if bar is not None:
                    bar.close()
                    bar, stage = None, None
                took = f"{event.seconds:.1f} s, peak {event.peak_memory / GIGABYTE:.2f} GiB"
                tqdm.write(f"{event.stage:<8} done in {took}", file=sys.stderr)
            elif isinstance(event, StageResumed):
                tqdm.write(f"{event.stage:<8} taken from the earlier run", file=sys.stderr)
            elif isinstance(event, StageStarted):
                stage = None
    finally:
        if bar is not None:
            bar.close()
        running.close()
