"""The vertical slice's bars: a photo to a mesh on a CPU, the splat rasteriser against torch, the import.

python -m bench.slice [--runs 3]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from sv3d_fast.camera import Orbit
from sv3d_fast.kernels.splat_raster import splat_raster

from .results import record
from .splat_raster import milliseconds, splats

ISSUE = "slice"
PHOTO = Path(__file__).parent.parent / "examples" / "armchair.png"
GAUSSIANS, SIZE = 5_000, 256


def measured_run(folder: Path) -> tuple[float, float]:
    """Wall seconds and peak resident GiB of one `sv3d-fast run` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "sv3d_fast.cli",
        "run",
        str(PHOTO),
        "-o",
        str(folder),
        "--device",
        "cpu",
        "--quiet",
    ]
    began = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}")
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


def rasteriser_speedup() -> float:
    """Forward + backward of the torch tile rasteriser over csrc's, same splats, same process."""
    leaves = splats(GAUSSIANS, "ball", "cpu")
    orbit = Orbit.static(10).select([0])
    cameras = orbit.world_to_camera(), orbit.intrinsics(SIZE)
    total = {}
    for implementation, repeats in (("csrc", 20), ("reference", 3)):

        def forward(implementation=implementation):
            return splat_raster(*leaves, *cameras, SIZE, SIZE, implementation=implementation)

        total[implementation] = sum(milliseconds(forward, leaves, repeats))
    print(f"csrc {total['csrc']:.1f} ms, torch tiles {total['reference']:.1f} ms")
    return total["reference"] / total["csrc"]


def import_seconds() -> float:
    """Median time of `import sv3d_fast` in a fresh interpreter, the interpreter's own start left out."""
    code = "import time; t = time.perf_counter(); import sv3d_fast; print(time.perf_counter() - t)"
    texts = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(7)]
    return statistics.median(float(t.stdout) for t in texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = [measured_run(Path(scratch) / str(i)) for i in range(args.runs)]
    seconds, memory = (statistics.median(column) for column in zip(*runs, strict=True))
    record(ISSUE, "sv3d-fast run, embedded model, wall time", seconds, "s", "<= 240")
    record(ISSUE, "sv3d-fast run, embedded model, peak memory", memory, "GiB", "<= 4")
    torch.set_num_threads(os.cpu_count() or 1)
    record(ISSUE, "CPU splat rasteriser over torch tiles, 5,000 at 256²", rasteriser_speedup(), "x", ">= 5")
    record(ISSUE, "import sv3d_fast", import_seconds(), "s", "<= 0.3")


if __name__ == "__main__":
    main()
