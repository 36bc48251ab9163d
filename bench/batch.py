"""A batch of pictures to GLB beside `run` on each of them: pictures per hour, and how busy the GPU is.

    python -m bench.batch [--pictures 16] [--runs 2] [--steps 50] [--workers N]

Random weights at SV3D's real shapes, in processes of their own as users start them; orbits take their full time and
are then replaced by turntables of simple shapes (see `bench.stand_in`), since those of random weights show nothing.
One short run goes first, so that compiled kernels and the weights are in their caches for both. `run` is timed on a few
pictures only, or on none. Without a GPU it is the embedded model on small frames, and nothing is recorded.
"""

import argparse
import csv
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from sv3d_fast.batch import RESULTS, read_results
from sv3d_fast.batch_picture import DONE
from sv3d_fast.camera import Orbit
from sv3d_fast.mini.config import WEIGHTS as EMBEDDED_WEIGHTS

from .fit import shaded_orbit, shapes
from .random_sv3d import write_random_sv3d
from .results import record

ISSUE = "production"
LIMIT = 400.0  # seconds for a process
EVERY = 0.1  # seconds between two looks at the GPU
AGREE = 1.0  # dB between a picture's figures from `run` and from the batch
PSNR = "PSNR of the splats against the frames (dB)"
ORBITS, LIST = "orbits.pt", "list.csv"
SMALL_SIDE = 64
SMALL = [f"--frame-size={SMALL_SIDE}", "--mc-resolution=32", "--target-faces=300", "--texture-resolution=64"]


def turntables(count: int, size: int) -> list[torch.Tensor]:
    """Frames of static orbits of simple shapes, each shape seen first from several sides."""
    videos = [shaded_orbit(mesh, Orbit.static(10.0), size).frames for mesh in shapes().values()]
    return [videos[index % len(videos)].roll(-2 * (index // len(videos)), 0) for index in range(count)]


def write_pictures(folder: Path, count: int, size: int) -> None:
    """Pictures, a list of them for a batch, each with its number as seed, and the orbits that they get in the end."""
    orbits = turntables(count, size)
    torch.save(orbits, folder / ORBITS)
    with (folder / LIST).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("picture", "seed"))
        for index, frames in enumerate(orbits):
            Image.fromarray(frames[-1].numpy()).save(folder / f"{_name(index)}.png")
            writer.writerow((f"{_name(index)}.png", index))


def _name(index: int) -> str:
    return f"p{index:02d}"


class Watch:
    """Looks at a GPU in a thread: how busy it is, in percent, and bytes in use, at moments of time.monotonic()."""

    def __init__(self):
        import pynvml

        pynvml.nvmlInit()
        # by name: NVML counts GPUs that this process may not see
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode())
        self.looks: list[tuple[float, float, int]] = []
        self._stop = threading.Event()

        def look() -> None:
            while not self._stop.wait(EVERY):
                busy = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
                self.looks.append((time.monotonic(), busy, pynvml.nvmlDeviceGetMemoryInfo(handle).used))

        self._thread = threading.Thread(target=look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Looks no more."""
        self._stop.set()
        self._thread.join()

    def between(self, first: float, last: float) -> tuple[float, int]:
        """Mean of how busy it was between two moments, and the most bytes above those at the start."""
        chosen = [look for look in self.looks if first <= look[0] <= last]
        return statistics.mean(look[1] for look in chosen), max(look[2] for look in chosen) - self.looks[0][2]


def timed(work: Path, arguments: Sequence[str], results: Path | None = None) -> tuple[float, list[float]]:
    """Seconds that a command takes, and at which moments of time.monotonic() lines of `results` came.

    Raises RuntimeError if it fails or takes longer than LIMIT.
    """
    command = [sys.executable, "-m", "bench.stand_in", str(work / ORBITS), *arguments]
    began, moments = time.monotonic(), []  # type: ignore[var-annotated]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        while process.poll() is None:
            if time.monotonic() - began > LIMIT:
                raise RuntimeError(f"{arguments[0]}: expected an end within {LIMIT:.0f} s")
            if results and results.exists():
                moments += [time.monotonic()] * (results.read_text().count("\n") - len(moments))
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise RuntimeError(f"{arguments[0]}: exit status {process.returncode}")
    return time.monotonic() - began, moments


def stages(folder: Path) -> dict[str, float]:
    """Median seconds of each stage of the pictures below a folder; those of the orbit without waiting its turn."""
    found: dict[str, list[float]] = {}
    for path in sorted(folder.glob("*/manifest.json")):
        for name, entry in json.loads(path.read_text())["stages"].items():
            found.setdefault(name, []).append(entry["seconds"] - entry.get("waited_seconds", 0))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def check(work: Path, pictures: int, *, against_run: bool) -> None:
    """That the batch did all pictures and, where asked, the first as `run` did. Raises RuntimeError."""
    rows = read_results(work / "batch" / RESULTS)
    if len(rows) != pictures or any(row["state"] != DONE for row in rows.values()):
        raise RuntimeError(f"expected {pictures} pictures done, got {list(rows.values())}")
    if not against_run:
        return
    by_run = json.loads((work / "run" / _name(0) / "manifest.json").read_text())["figures"][PSNR]
    if abs(rows[_name(0)]["figures"][PSNR] - by_run) > AGREE:
        raise RuntimeError(f"{PSNR}: {rows[_name(0)]['figures'][PSNR]} in the batch, {by_run} by run")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.batch", description=__doc__)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--runs", type=int, default=2, help="pictures that `run` is timed on; 0: the batch alone")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--workers", type=int, help="the batch's own default without it")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        began = time.monotonic()
        write_pictures(work, args.pictures, 576 if gpu else SMALL_SIDE)
        model = write_random_sv3d(work / "model", torch.device("cuda")) if gpu else EMBEDDED_WEIGHTS
        torch.cuda.empty_cache()
        print(f"pictures and weights: {time.monotonic() - began:.1f} s", flush=True)
        common = ["--model", str(model), "--quiet", *([] if gpu else SMALL)]

        def run(index: int, folder: str, steps: int) -> float:
            given = [str(work / f"{_name(index)}.png"), "-o", str(work / folder / _name(index))]
            return timed(work, ["run", *given, f"--seed={index}", f"--steps={steps}", *common])[0]

        if args.runs:
            print(f"a short run for warmth: {run(0, 'warm', 1):.1f} s", flush=True)
        runs = [run(index, "run", args.steps) for index in range(args.runs)]
        watch = Watch() if gpu else None
        given = [str(work / LIST), "-o", str(work / "batch"), f"--steps={args.steps}"]
        given += [] if args.workers is None else [f"--workers={args.workers}"]
        seconds, moments = timed(work, ["batch", *given, *common], work / "batch" / RESULTS)
        if watch:
            watch.stop()
        check(work, args.pictures, against_run=bool(runs))

        columns = {name: stages(work / name) for name in ("run", "batch") if (work / name).exists()}
        print(f"{'median seconds':16}" + "".join(f"{name:>8}" for name in columns))
        disk = sum(path.stat().st_size for path in (work / "batch").rglob("*") if path.is_file()) / args.pictures
        for name in columns["batch"]:
            print(f"{name:16}" + "".join(f"{column[name]:8.2f}" for column in columns.values()))
    per_hour, steady = 3600 * args.pictures / seconds, 3600 * (len(moments) - 1) / (moments[-1] - moments[0])
    what = f"batch of {args.pictures} pictures to GLB, {args.steps} steps"
    if runs:
        by_run = 3600 / statistics.mean(runs)
        print(f"run: {', '.join(f'{s:.1f}' for s in runs)} s, {by_run:.0f} pictures/hour")
        print(f"batch over run: {per_hour / by_run:.2f}")
        if gpu:
            record(ISSUE, f"{what}: pictures/hour over run's, on {len(runs)}", per_hour / by_run, "x", ">= 1.5")
    print(f"batch: {args.pictures} pictures in {seconds:.1f} s, {per_hour:.0f} pictures/hour, {steady:.0f} once going")
    resident = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"disk for a picture: {disk / 1e6:.1f} MB; memory of the largest process: {resident / 2**30:.1f} GiB")
    if watch:
        busy, memory = watch.between(moments[0], moments[-1])
        print(f"GPU memory in use at most: {memory / 2**30:.1f} GiB")
        record(ISSUE, f"{what}: GPU busy between the first and the last picture, NVML", busy, "%", ">= 90")


if __name__ == "__main__":
    main()
