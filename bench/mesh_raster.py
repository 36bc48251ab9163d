"""Time of the mesh rasteriser on this machine's device: `python -m bench.mesh_raster [--record]`.

A textured sphere seen by an orbit of 21 views; the bar is 256 pixels, 10k faces: 5 ms on an H100, 250 ms on two cores.
`--record` appends that case to bench/results.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import trimesh

from sv3d_fast.camera import Orbit
from sv3d_fast.kernels.mesh_raster import mesh_raster, mesh_render, mesh_render_batch

from .results import record

RUNS = 20


def milliseconds(call: Callable[[], object], device: str) -> tuple[float, float]:
    """Median of a call's whole time, and of what it costs the caller before it returns."""
    whole, caller = [], []
    for _ in range(RUNS + 3):
        start = time.perf_counter()
        call()
        caller.append(time.perf_counter() - start)
        if device == "cuda":
            torch.cuda.synchronize()
        whole.append(time.perf_counter() - start)
    return 1e3 * statistics.median(whole[3:]), 1e3 * statistics.median(caller[3:])


def sphere(faces: int, device: str) -> tuple[torch.Tensor, ...]:
    """Vertices, faces, texture coordinates and a texture of a sphere with about `faces` triangles."""
    side = round((faces / 4) ** 0.5)
    mesh = trimesh.creation.uv_sphere(0.5, count=[side, side])
    vertices, indices = torch.tensor(mesh.vertices).float(), torch.tensor(mesh.faces).int()
    uvs = (vertices[:, :2] + 0.5)[indices.long()]
    texture = torch.randint(0, 256, (256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return tuple(t.to(device) for t in (vertices, indices, uvs, texture))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append the bar to bench/results")
    recording = parser.parse_args().record
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}\n{'':46}{'ms':>10}{'ms of the caller':>20}")
    orbit = Orbit.sine()
    views = orbit.world_to_camera().to(device)
    lights = torch.tensor([[0.6, 0.0, 0.8, 0.7], [0.0, -1.0, 0.0, 0.2]], device=device)
    ambient, white = torch.full((8,), 0.3, device=device), torch.ones(8, 3, device=device)

    def report(what: str, call: Callable[[], object]) -> float:
        whole, caller = milliseconds(call, device)
        print(f"{what:46}{whole:10.3f}{caller:20.3f}", flush=True)
        return whole

    for faces in (100, 1000, 10_000, 100_000):
        vertices, indices, uvs, texture = sphere(faces, device)
        for size in (128, 256):
            Ks = orbit.intrinsics(size).to(device)
            case = f"{len(indices)} faces, 21 views, {size} pixels"
            took = report(f"mesh_raster  {case}", lambda: mesh_raster(vertices, indices, views, Ks, size, size))  # noqa: B023
            if recording and (faces, size) == (10_000, 256):
                bar = "<= 5" if device == "cuda" else "<= 250"
                record("mini", "mesh_raster, 21 views of 10k faces at 256^2", took, "ms", bar)
            report(
                f"mesh_render  {case}",
                lambda: mesh_render(vertices, indices, uvs, texture, None, views, Ks, size, lights, 0.3, white[0]),  # noqa: B023
            )
    vertices, indices, uvs, texture = sphere(10_000, device)
    Ks = orbit.intrinsics(128).to(device)
    many = (
        vertices.repeat(8, 1), indices.repeat(8, 1), torch.arange(9, device=device) * len(vertices),
        torch.arange(9, device=device) * len(indices), uvs.repeat(8, 1, 1), texture.repeat(8, 1, 1, 1), None,
        views.repeat(8, 1, 1, 1), Ks.repeat(8, 1, 1, 1), 128, lights.repeat(8, 1, 1), ambient, white,
    )  # fmt: skip
    report(f"mesh_render_batch  8 x {len(indices)} faces, 128 pixels", lambda: mesh_render_batch(*many))


if __name__ == "__main__":
    main()
