"""How busy a fit keeps a GPU: `python -m bench.fit_gaps --data build/data/reconstruction.pack [--record]`.

Gaps: of a window of steps, the share of its time in which no kernel runs. The time is measured without a tracer, which
slows launches, the kernels' by a tracer in a second run of the same steps. Then the time of one object among 1, 2 and
4 that are fitted at once.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sv3d_fast import events
from sv3d_fast.scene.fit import fit, fitting
from sv3d_fast.scene.fit_batch import fit_batch
from sv3d_fast.video import OrbitVideo

from .ground_truth import read_models
from .reconstruction import ISSUE, ORBIT, PACK
from .results import record

WINDOWS = {"half size": (55, 95), "full size": (255, 295)}  # of a GPU's 400 steps, between two straightenings
MODELS = ("rock1", "chair2", "crate", "bread")


@contextmanager
def traced(spans: list[tuple[float, float]]) -> Iterator[None]:
    """Appends begin and end, in microseconds, of every kernel and copy that ran inside."""
    with profile(activities=[ProfilerActivity.CUDA]) as tracer:
        yield
    found = [e.time_range for e in tracer.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans += [(span.start, span.end) for span in found]


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def window(video: OrbitVideo, first: int, last: int, *, trace: bool) -> float:
    """Milliseconds a step: of the clock or, traced, of those in which a kernel runs."""
    spans: list[tuple[float, float]] = []
    steps = fitting(video)
    _advance(steps, first)
    torch.cuda.synchronize()
    began = time.perf_counter()
    if trace:
        with traced(spans):
            _advance(steps, last - first)
            torch.cuda.synchronize()
    else:
        _advance(steps, last - first)
        torch.cuda.synchronize()
    clock = time.perf_counter() - began
    steps.close()
    return (covered(spans) / 1e3 if trace else 1e3 * clock) / (last - first)


def _advance(steps, count: int) -> None:
    while count:
        count -= isinstance(next(steps), events.Progress)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.fit_gaps", description=__doc__)
    parser.add_argument("--data", type=Path, default=PACK)
    parser.add_argument("--record", action="store_true", help="write the figures to results")
    args = parser.parse_args()
    videos = [model.orbit(ORBIT, 576) for model in read_models(args.data, MODELS, torch.device("cuda"))]
    fit(videos[0], steps=20)
    shares = []
    for name, (first, last) in WINDOWS.items():
        clock, kernels = (window(videos[1], first, last, trace=trace) for trace in (False, True))
        shares.append(100 * (1 - kernels / clock))
        print(f"{name}: {clock:.2f} ms a step, kernels {kernels:.2f} ms, gaps {shares[-1]:.1f} %", flush=True)
    for count in (1, 2, 4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        fit_batch(videos[:count])
        torch.cuda.synchronize()
        print(f"{count} at once: {(time.perf_counter() - began) / count:.2f} s an object", flush=True)
    if args.record:
        record(ISSUE, "launch gaps of a fit's step, worse of both sizes", max(shares), "%", "<= 15")


if __name__ == "__main__":
    main()
