"""TripoSR at its real shapes on random weights, on a GPU: `python -m bench.triposr [--record]`.

Times are medians on the GPU's clock, the caller's work included. A random density is no object, so meshes are those of
a thin table: its density is added to a thousandth of the network's, which is evaluated in full for it. Coarse-to-fine
extraction is compared with the dense one on shapes with thin parts.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sv3d_fast.full_size import randomised
from sv3d_fast.kernels.marching_cubes import marching_cubes
from sv3d_fast.triposr import TripoSR
from sv3d_fast.triposr.config import TripoSRConfig
from sv3d_fast.triposr.extract import COARSE, sample_grid, surface
from sv3d_fast.triposr.field import Field

from .engine import milliseconds
from .results import record
from .thin_shapes import DENSITIES, LEVEL, SHAPES, on_grid

ISSUE = "triposr"
RESOLUTION, LARGE, BATCH = 256, 512, 8
SHARE = 1e-3  # of the network's density in what meshes are made of
HALF_A_VOXEL = 0.5


def dense_decode(field: Field) -> float:
    """Milliseconds for the raw density at RESOLUTION ** 3 points, tables included."""
    places = torch.arange(RESOLUTION**3, dtype=torch.int32, device=field.device)
    return milliseconds(lambda: field.on_grid(RESOLUTION)(places))


def mesh_of(model: TripoSR, code: Tensor, table: Tensor, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vertices, faces and colours, as `TripoSR.extract_mesh` makes them; table: (resolution ** 3,) added densities."""
    field = model.renderer.field(model.decoder, code)
    network = field.on_grid(resolution)
    vertices, faces = surface(lambda places: table[places] + SHARE * network(places), resolution, LEVEL, field.device)
    vertices = vertices * (2 * field.radius / (resolution - 1)) - field.radius
    return vertices, faces, (field.query(vertices)[1] * 255).round().to(torch.uint8)


def table_density(resolution: int, device: torch.device) -> Tensor:
    """(resolution ** 3,) raw densities of the thin table."""
    evaluate = on_grid(lambda p: DENSITIES["linear"](SHAPES["table"](p)), resolution, device)
    places = torch.arange(resolution**3, device=device)
    return torch.cat([evaluate(part) for part in places.split(1 << 22)])


def equal_fields(device: torch.device) -> tuple[int, int]:
    """On how many fields, of how many, coarse-to-fine gives the dense mesh: the same faces, vertices within half a
    voxel."""
    equal, fields = 0, [(s, d) for s in SHAPES.values() for d in DENSITIES.values()]
    for shape, density in fields:
        evaluate = on_grid(lambda p, s=shape, d=density: d(s(p)), RESOLUTION, device)
        found = []
        for stride in (1, -(-(RESOLUTION - 1) // COARSE)):
            values = sample_grid(evaluate, RESOLUTION, LEVEL, stride, device)
            found.append(marching_cubes(values.neg_(), -LEVEL))
        (vertices, faces), (some, triangles) = found
        equal += torch.equal(faces, triangles) and bool((vertices - some).abs().max() <= HALF_A_VOXEL)
    return equal, len(fields)


def wall(call: Callable[[], object], runs: int = 7) -> float:
    """Median milliseconds until the result is on the GPU."""
    times = []
    for _ in range(runs + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def peak(call: Callable[[], object]) -> float:
    """Peak GB of GPU memory that the process holds during a call, everything loaded included."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved() / 1e9


@torch.no_grad()
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.triposr", description=__doc__)
    parser.add_argument("--record", action="store_true", help="append the bars to bench/results")
    args = parser.parse_args()
    figures: list[tuple[str, float, str, str]] = []

    def note(figure: str, value: float, unit: str, bar: str) -> None:
        figures.append((figure, value, unit, bar))
        print(f"{figure}: {value:.4g} {unit} (bar {bar})", flush=True)

    device = torch.device("cuda")
    torch.manual_seed(0)
    with torch.device("meta"):
        model = TripoSR(TripoSRConfig())
    model = randomised(model, device, torch.float16)
    pictures = torch.rand(BATCH, 512, 512, 3, device=device)
    table = table_density(RESOLUTION, device)

    began = time.perf_counter()
    codes = model(pictures[:1])
    mesh_of(model, codes[0], table, RESOLUTION)
    torch.cuda.synchronize()
    print(f"first mesh, with its compilation and capture: {time.perf_counter() - began:.1f} s")
    error = (codes.float() - model.plain(pictures[:1].permute(0, 3, 1, 2).half()).float()).norm() / codes.float().norm()
    print(f"fused against plain, both in half precision: {float(error):.2e}")
    print(f"peak while loaded: {peak(lambda: None):.2f} GB")

    def whole() -> tuple[Tensor, Tensor, Tensor]:
        return mesh_of(model, model(pictures[:1])[0], table, RESOLUTION)

    print(f"faces {len(whole()[1])}, network {wall(lambda: model(pictures[:1])):.2f} ms, "
          f"extraction {wall(lambda: mesh_of(model, codes[0], table, RESOLUTION)):.2f} ms")  # fmt: skip
    note("image tensor -> mesh, 256³, batch 1", wall(whole), "ms", "<= 60")
    note("peak memory at 256³", peak(whole), "GB", "<= 3")
    large = table_density(LARGE, device)
    note("peak memory at 512³", peak(lambda: mesh_of(model, codes[0], large, LARGE)), "GB", "<= 4")
    print(f"extraction at 512³: {wall(lambda: mesh_of(model, codes[0], large, LARGE)):.2f} ms")
    note("dense 256³ decode, fused", dense_decode(model.renderer.field(model.decoder, codes[0])), "ms", "<= 8")
    equal, fields = equal_fields(device)
    note("fields with thin parts where coarse-to-fine = dense", equal, f"of {fields}", f">= {fields}")

    def batch() -> None:
        for code in model(pictures):
            mesh_of(model, code, table, RESOLUTION)

    note("throughput, batch 8", 1e3 * BATCH / wall(batch, 5), "meshes/s", ">= 30")
    if args.record:
        for figure, value, unit, bar in figures:
            record(ISSUE, figure, value, unit, bar)


if __name__ == "__main__":
    main()
