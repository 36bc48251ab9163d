"""The surface where a field crosses a level, from a coarse grid refined only where the surface can be."""

from collections.abc import Callable

import torch
from torch import Tensor

from sv3d_fast.kernels.marching_cubes import marching_cubes

COARSE = 64  # cells a side of the coarse grid
SAFETY = 2.0  # how many times steeper than between coarse points the field may be within a cell

Evaluate = Callable[[Tensor], Tensor]  # places on the grid (N,) int32, (x * R + y) * R + z -> values (N,) float32


def surface(evaluate: Evaluate, resolution: int, level: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Vertices (V, 3) float32 in grid coordinates and faces (F, 3) int32 of the surface where the field is `level`.

    The inside is above the level; faces wind counter-clockwise seen from outside. The surface is open where it
    leaves the grid.
    """
    stride = max(1, -(-(resolution - 1) // COARSE))
    values = sample_grid(evaluate, resolution, level, stride, device)
    return marching_cubes(values.neg_(), -level)


def sample_grid(evaluate: Evaluate, resolution: int, level: float, stride: int, device: torch.device) -> Tensor:
    """The field on the grid, (R, R, R) float32: exact near the level, elsewhere only on the right side of it.

    The points at every stride-th index are evaluated first. A cell between them is refined where its corners, or
    their slopes extended into it by half a cell, reach the level; then, until nothing changes, every neighbour into
    which the refined surface runs. What remains undetected is a part that lies wholly within unrefined cells, i.e.
    one that is thin against the stride and, besides, doesn't show in the slopes around it. A stride of 1 evaluates
    all points.
    """
    ends = torch.arange(0, resolution - 1, stride, device=device)
    ends = torch.cat([ends, ends.new_tensor([resolution - 1])])
    places = (ends[:, None, None] * resolution + ends[:, None]) * resolution + ends
    coarse = evaluate(places.flatten().int()).view(places.shape)
    if stride == 1:
        return coarse

    at = torch.arange(resolution, device=device)
    after = (torch.bucketize(at, ends, right=True) - 1).clamp(max=len(ends) - 2)  # the cell that a point begins
    before = (torch.bucketize(at, ends) - 1).clamp(min=0)  # the cell that it ends, the same one within a cell
    values = coarse[after][:, after][:, :, after]
    refined, pending = torch.zeros_like(values, dtype=torch.bool), _near_level(coarse, level)
    active = pending
    while pending.any():
        wanted = _points(pending, before, after) & ~refined
        refined |= wanted
        places = wanted.flatten().nonzero()[:, 0]
        values.view(-1)[places] = evaluate(places.int())
        pending = _mixed(values > level, ends, stride) & ~active
        active = active | pending
    return values


def _both(x: Tensor, axis: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combines neighbours along an axis, which loses one entry."""
    n = x.shape[axis] - 1
    return combine(x.narrow(axis, 0, n), x.narrow(axis, 1, n))


def _near_level(coarse: Tensor, level: float) -> Tensor:
    """(K, K, K) values -> (K-1, K-1, K-1): cells that the level can cross."""
    low, high, reach = coarse, coarse, torch.zeros((), device=coarse.device)
    for axis in range(3):
        low, high = _both(low, axis, torch.minimum), _both(high, axis, torch.maximum)
        # the steepest slope along this axis: of the cell's four edges, and of those that continue them either way
        slope = _both(coarse, axis, torch.sub).abs()
        for other in {0, 1, 2} - {axis}:
            slope = _both(slope, other, torch.maximum)
        n = slope.shape[axis] - 1
        if n > 0:
            inner = _both(slope, axis, torch.maximum)
            first, last = inner.narrow(axis, 0, 1), inner.narrow(axis, n - 1, 1)
            slope = torch.maximum(torch.cat([first, inner], axis), torch.cat([inner, last], axis))
        reach = reach + 0.5 * SAFETY * slope
    return (low - reach <= level) & (high + reach >= level)


def _points(cells: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """(K-1, K-1, K-1) cells -> (R, R, R): the grid points in them or on their faces."""
    for axis in range(3):
        cells = cells.index_select(axis, before) | cells.index_select(axis, after)
    return cells


def _mixed(inside: Tensor, ends: Tensor, stride: int) -> Tensor:
    """(R, R, R) -> (K-1, K-1, K-1): cells that hold both inside and outside points, faces included."""
    some, every = inside, inside
    for axis in range(3):
        steps = [torch.minimum(ends[:-1] + step, ends[1:]) for step in range(stride + 1)]
        some_along, every_along = some.index_select(axis, steps[0]), every.index_select(axis, steps[0])
        for step in steps[1:]:
            some_along |= some.index_select(axis, step)
            every_along &= every.index_select(axis, step)
        some, every = some_along, every_along
    return some & ~every
