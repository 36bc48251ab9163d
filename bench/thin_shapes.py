"""Shapes with thin parts, which a coarse grid misses: signed distances in [-1, 1]^3, and raw densities made of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def box(p: Tensor, center: Sequence[float], half: Sequence[float]) -> Tensor:
    """Distances (N,) of points (N, 3) to a box, negative inside."""
    q = (p - p.new_tensor(center)).abs() - p.new_tensor(half)
    return q.clamp(min=0).norm(dim=1) + q.amax(1).clamp(max=0)


def rod(p: Tensor, a: Sequence[float], b: Sequence[float], radius: float) -> Tensor:
    """Distances (N,) of points (N, 3) to a rod with round ends at a and b, negative inside."""
    start, along = p.new_tensor(a), p.new_tensor(b) - p.new_tensor(a)
    t = ((p - start) @ along / along.square().sum()).clamp(0, 1)
    return (p - start - t[:, None] * along).norm(dim=1) - radius


VOXEL = 2 / 120  # of a grid over [-1, 1]; coarse ones are some times wider
SKEW = torch.linalg.qr(torch.tensor([[0.9, 0.3, -0.2], [0.1, 0.8, 0.5], [0.4, -0.6, 0.7]]))[0]
SPECKS = torch.rand(12, 3, generator=torch.Generator().manual_seed(4)) * 1.4 - 0.7


def _table(p: Tensor) -> Tensor:
    legs = [rod(p, (x, y, 0.2), (x, y, -0.6), 1.1 * VOXEL) for x in (-0.4, 0.4) for y in (-0.4, 0.4)]
    return torch.stack([box(p, (0.0, 0.0, 0.2), (0.5, 0.5, VOXEL)), *legs]).amin(0)


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "plate": lambda p: box(p, (0.013, 0.0, 0.0), (0.6 * VOXEL, 0.5, 0.6)),
    "tilted plate": lambda p: box(p @ SKEW.to(p), (0.0, 0.0, 0.0), (0.5, 0.6, 0.7 * VOXEL)),
    "rod": lambda p: rod(p, (-0.6, -0.1, 0.0), (0.5, 0.3, 0.1), 0.9 * VOXEL),
    "ring": lambda p: ((p[:, :2].norm(dim=1) - 0.6).square() + p[:, 2].square()).sqrt() - 1.1 * VOXEL,
    "specks": lambda p: torch.stack([(p - c).norm(dim=1) - 1.4 * VOXEL for c in SPECKS.to(p)]).amin(0),
    "hollow": lambda p: (p.norm(dim=1) - 0.6).abs() - 0.8 * VOXEL,
    "table": _table,
    "sphere": lambda p: p.norm(dim=1) - 0.55,
}
LEVEL = 4.0
DENSITIES: dict[str, Callable[[Tensor], Tensor]] = {  # distance -> raw density, LEVEL on the surface
    "linear": lambda d: LEVEL - 40 * d,
    "saturated": lambda d: LEVEL - 9 * torch.tanh(d / 0.06),
    "steep": lambda d: LEVEL - 3 * d.sign() * (60 * d).abs().sqrt(),
}


def on_grid(density: Callable[[Tensor], Tensor], resolution: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A density (N, 3) -> (N,) as the extraction asks for it: by places on a grid over [-1, 1]^3."""
    ticks = torch.linspace(-1, 1, resolution, device=device)

    def evaluate(places: Tensor) -> Tensor:
        x, y, z = torch.unravel_index(places.long(), (resolution,) * 3)
        return density(torch.stack([ticks[x], ticks[y], ticks[z]], 1))

    return evaluate
