"""Splat rasteriser and SSIM, forward and backward: every implementation that runs here, in one process.

    python bench/splat_raster.py [--device cuda] [--repeats 10]

Times are the best of `repeats` in milliseconds a view; compare columns of one run, not runs.
"""

import argparse
import time

import torch
from torch.nn import functional as F

from sv3d_fast.camera import Orbit
from sv3d_fast.kernels.splat_raster import splat_raster
from sv3d_fast.kernels.ssim import ssim

CASES = (  # name, splats, pixels a side, views, shape
    ("ball", 5_000, 256, 1, "ball"),
    ("object", 15_000, 128, 1, "shell"),
    ("object", 15_000, 128, 4, "shell"),
    ("object", 60_000, 576, 4, "shell"),
)


def splats(n: int, shape: str, device: str) -> list[torch.Tensor]:
    """Means, quats, scales, opacities and colours: a filled ball, or the surface of one as a fit would cover it."""
    g = torch.Generator().manual_seed(0)
    means = 0.5 * F.normalize(torch.randn(n, 3, generator=g), dim=-1)
    size, opacity = 0.35 * (4 * torch.pi / n) ** 0.5, torch.full((n,), 0.6)
    if shape == "ball":
        means, size, opacity = means * torch.rand(n, 1, generator=g) ** (1 / 3), 0.02, torch.rand(n, generator=g)
    scales = size * torch.exp(0.2 * torch.randn(n, 3, generator=g))
    tensors = [means, torch.randn(n, 4, generator=g), scales, opacity, torch.rand(n, 3, generator=g)]
    return [t.to(device).requires_grad_() for t in tensors]


def milliseconds(forward, leaves, repeats: int) -> tuple[float, float]:
    """Best forward and best backward time of `repeats`."""
    cuda = leaves[0].is_cuda

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

    best = [float("inf")] * 2
    for _ in range(repeats):
        start = now()
        outputs = forward()
        middle = now()
        gradients = [torch.ones_like(t) for t in outputs]
        before = now()
        torch.autograd.grad(outputs, leaves, gradients)
        best = [min(best[0], middle - start), min(best[1], now() - before)]
    return best[0], best[1]


def row(name: str, op, arguments: tuple, leaves, views: int, repeats: int, slow: int) -> None:
    """Prints one case: each implementation, the reference only if it takes no more than `slow` splats or images."""
    total = {}
    for implementation in [*op.implementations, None]:
        label = implementation.name if implementation else "reference"
        if implementation and implementation.why_not(*arguments):
            continue
        if not implementation and len(leaves[0]) > slow:
            continue

        def forward(label=label):
            result = op(*arguments, implementation=label)
            return result if isinstance(result, tuple) else (result,)

        f, b = milliseconds(forward, leaves, repeats if implementation else 2)
        total[label] = (f + b) / views
        print(f"{name:<34}{label:<12}{f / views:>10.2f}{b / views:>10.2f}{total[label]:>10.2f}", end="")
        print(f"{'':>4}{total[label] / next(iter(total.values())):.1f}x the first")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.device}; ms a view")
    print(f"{'case':<34}{'run':<12}{'forward':>10}{'backward':>10}{'both':>10}")
    for name, n, size, views, shape in CASES:
        leaves = splats(n, shape, options.device)
        orbit = Orbit.sine(frames=views)
        cameras = (orbit.world_to_camera().to(options.device), orbit.intrinsics(size).to(options.device))
        title = f"{name}, {n} splats, {views} x {size}^2"
        row(title, splat_raster, (*leaves, *cameras, size, size), leaves, views, options.repeats, slow=5_000)
    for images, size in ((4, 128), (4, 576)):
        y = torch.rand(images, size, size, 3, device=options.device)
        x = torch.rand_like(y).requires_grad_()
        row(f"ssim, {images} x {size}^2", ssim, (x, y), [x], images, options.repeats, slow=images)


if __name__ == "__main__":
    main()
