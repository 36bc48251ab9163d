"""Times of the scene's kernels on a GPU: `python -m bench.scene_kernels [--record]`.

Depth fusion of 21 views of 576 pixels, marching cubes of a bumpy sphere, structural similarity with its gradient. Each
is compared with the CPU first. GB/s counts what has to be moved at least: inputs read once, outputs written once.
`--record` appends the bars: fusion at 256^3 within 3 ms, marching cubes at 256^3 within 2 ms.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from sv3d_fast.camera import Orbit
from sv3d_fast.kernels.marching_cubes import marching_cubes
from sv3d_fast.kernels.ssim import ssim
from sv3d_fast.kernels.tsdf import tsdf_fuse

from .results import record

SIZE, HALF_EXTENT, RUNS = 576, 0.6, 20


def milliseconds(call: Callable[[], object]) -> float:
    """Median time from one end of the call to the next on the GPU's clock, the caller's work included."""
    times = []
    for _ in range(RUNS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def report(what: str, call: Callable[[], object], moved: int) -> float:
    took = milliseconds(call)
    print(f"{what:48}{took:10.3f} ms{moved / took / 1e6:10.0f} GB/s", flush=True)
    return took


def fusion_inputs(size: int) -> tuple[torch.Tensor, ...]:
    """Smooth depth maps of an orbit with nothing at their borders, weights, and the cameras."""
    orbit = Orbit.sine()
    pixel = (torch.arange(size) + 0.5) / size - 0.5
    v, u = torch.meshgrid(pixel, pixel, indexing="ij")
    depth = 1.6 + 2 * (u.square() + v.square()) + 0.02 * torch.cos(20 * u)
    depth = torch.where(u.square() + v.square() < 0.16, depth, torch.inf)
    depths = torch.stack([depth + 0.002 * view for view in range(len(orbit))])
    weights = torch.where(depths.isfinite(), 0.9, 0.1)
    return depths, weights, orbit.world_to_camera(), orbit.intrinsics(size)


def bumpy_sphere(resolution: int, device: str) -> torch.Tensor:
    axis = torch.linspace(-1, 1, resolution, device=device)
    x, y, z = axis[:, None, None], axis[None, :, None], axis[None, None, :]
    field = (x.square() + y.square() + z.square()).sqrt_()
    return field.sub_(0.7).add_(0.04 * torch.sin(17 * x) * torch.sin(19 * y) * torch.sin(23 * z))


def bench_fusion(recording: bool) -> None:
    small = (*fusion_inputs(97), 61, HALF_EXTENT, 0.08)
    expected = tsdf_fuse(*small, implementation="csrc")
    got = tsdf_fuse(*(a.cuda() if torch.is_tensor(a) else a for a in small), implementation="cuda")
    for a, b in zip(got, expected, strict=True):
        differs = ~torch.isclose(a.cpu(), b, rtol=1e-4, atol=1e-4)  # a voxel between two pixels may fall into either
        assert differs.float().mean() < 1e-3, f"{differs.sum()} voxels differ"
    maps = [a.cuda() for a in fusion_inputs(SIZE)]
    for resolution in (128, 256, 384, 512):
        moved = 4 * (2 * maps[0].numel() + 2 * resolution**3)
        rest = (resolution, HALF_EXTENT, 8 * HALF_EXTENT / resolution)
        took = report(f"tsdf_fuse  21 views, {resolution}^3", lambda: tsdf_fuse(*maps, *rest), moved)  # noqa: B023
        if recording and resolution == 256:
            record("reconstruction", "tsdf_fuse, 21 views of 576^2 into 256^3", took, "ms", "<= 3")


def bench_marching_cubes(recording: bool) -> None:
    field = bumpy_sphere(91, "cpu")
    expected = marching_cubes(field, implementation="csrc")
    got = marching_cubes(field.cuda(), implementation="cuda")
    torch.testing.assert_close(got[0].cpu(), expected[0], rtol=1e-6, atol=1e-5)
    assert torch.equal(got[1].cpu(), expected[1])
    for resolution in (128, 256, 384, 512):
        field = bumpy_sphere(resolution, "cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        vertices, faces = marching_cubes(field)
        peak = torch.cuda.max_memory_allocated() / 2**30
        moved = 4 * (field.numel() + vertices.numel() + faces.numel())
        what = f"marching_cubes  {resolution}^3, {len(faces)} faces, {peak:.2f} GiB"
        took = report(what, lambda: marching_cubes(field), moved)  # noqa: B023
        if recording and resolution == 256:
            record("reconstruction", "marching_cubes, 256^3", took, "ms", "<= 2")
        if recording and resolution == 512:
            record("reconstruction", "marching_cubes, 512^3, peak memory, field included", peak, "GiB", "<= 4")


def bench_ssim() -> None:
    generator = torch.Generator().manual_seed(0)
    for views in (4, 21):
        x = torch.rand((views, SIZE, SIZE, 3), generator=generator)
        y = (x + 0.2 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
        gradients, values = [], []
        for device, implementation in (("cpu", "csrc"), ("cuda", "cuda")):
            a = x.to(device).requires_grad_()
            value = ssim(a, y.to(device), implementation=implementation)
            gradients.append(torch.autograd.grad(value.sum(), a)[0].cpu())
            values.append(value.detach().cpu())
        torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-6)
        assert (gradients[1] - gradients[0]).norm() <= 1e-4 * gradients[0].norm()
        a, b = x.cuda(), y.cuda()
        report(f"ssim  {views} views, value alone", lambda: ssim(a, b), 8 * x.numel())  # noqa: B023
        leaf = a.clone().requires_grad_()
        value = ssim(leaf, b)
        report(f"ssim  {views} views, value, kept for its gradient", lambda: ssim(leaf, b), 20 * x.numel())  # noqa: B023
        report(
            f"ssim  {views} views, gradient",
            lambda: torch.autograd.grad(value.sum(), leaf, retain_graph=True),  # noqa: B023
            24 * x.numel(),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append the bars to bench/results")
    recording = parser.parse_args().record
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, medians of {RUNS}")
    bench_fusion(recording)
    bench_marching_cubes(recording)
    bench_ssim()


if __name__ == "__main__":
    main()
