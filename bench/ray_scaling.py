"""Orbits per hour on 1, 2 and 4 GPUs of a machine, through Ray: python -m bench.ray_scaling [--gpus 1 2 4]

Random weights at SV3D's real shapes; orbits alone, in few steps, not written to files. Every actor has made
orbits before anything is timed: what is timed is a batch that is going. Without a GPU it is the embedded model on small
frames in parts of the machine, and nothing is recorded.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from sv3d_fast.batch_picture import Made
from sv3d_fast.batch_ray import LOCAL, Lane, connected, open_lanes, spread
from sv3d_fast.batch_source import Job
from sv3d_fast.batch_workers import MAKING
from sv3d_fast.mini.config import WEIGHTS as EMBEDDED_WEIGHTS
from sv3d_fast.settings import Settings

from .random_sv3d import write_random_sv3d
from .results import record

ISSUE = "production"
BARS = {2: ">= 1.9", 4: ">= 3.7"}


def make_orbits(ray: Any, lanes: Sequence[Lane], count: int, settings: Settings, picture: Path, folder: Path) -> float:
    """Seconds in which these lanes make `count` orbits each. Raises RuntimeError for one that failed."""
    jobs = [Job(picture, f"{index:03d}", replace(settings, seed=index)) for index in range(count * len(lanes))]
    slots = [*lanes] * MAKING
    began = time.monotonic()
    for made in spread(ray, slots, jobs, lambda lane, job: lane.maker.make.remote(job, folder)):
        if not isinstance(made, Made):
            raise RuntimeError(f"an orbit failed: {made.row['reason']}")
    return time.monotonic() - began


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.ray_scaling", description=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4], help="numbers of GPUs, those there are")
    parser.add_argument("--orbits", type=int, default=8, help="for each GPU")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as scratch, connected(LOCAL) as ray:
        work, began = Path(scratch), time.monotonic()
        picture = work / "picture.png"
        image = Image.new("RGBA", (576, 576))
        ImageDraw.Draw(image).ellipse((96, 144, 480, 432), fill=(180, 90, 40, 255))
        image.save(picture)
        if gpu:
            settings = Settings(model=str(write_random_sv3d(work / "model", torch.device("cuda"))), steps=args.steps)
            torch.cuda.empty_cache()
        else:
            settings = Settings(model=str(EMBEDDED_WEIGHTS), steps=args.steps, frame_size=64)
        print(f"weights: {time.monotonic() - began:.1f} s", flush=True)
        with open_lanes(ray, [settings], 1, gpu) as lanes:
            make_orbits(ray, lanes, MAKING, settings, picture, work / "warm")
            print(f"{len(lanes)} actors loaded and warm: {time.monotonic() - began:.1f} s", flush=True)
            seconds = {}
            for count in sorted({1, *args.gpus}):
                if count <= len(lanes):
                    folder = work / str(count)
                    seconds[count] = make_orbits(ray, lanes[:count], args.orbits, settings, picture, folder)
    what = f"orbits of {args.steps} steps, {args.orbits} on each GPU"
    print(f"{what}\n{'GPUs':>5}{'seconds':>9}{'orbits/hour':>13}{'over one':>10}")
    for count, taken in seconds.items():
        over = count * seconds[1] / taken
        print(f"{count:5}{taken:9.1f}{3600 * count * args.orbits / taken:13.0f}{over:10.2f}")
    for count, bar in BARS.items():
        if gpu and count in seconds:
            record(ISSUE, f"Ray, {what}: {count} GPUs over one", count * seconds[1] / seconds[count], "x", bar)


if __name__ == "__main__":
    main()
