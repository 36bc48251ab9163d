"""Smooth displacements between pictures: cubic B-splines of few knots, found by registration.

Lucas and Kanade, "An iterative image registration technique", 1981, with robust weights, from a quarter of the size
to the whole; flat parts of a picture follow what is around them. Displacements are held in parts of a picture's side,
so that the knots are the same at every size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SPANS = 6  # of the spline along a side
KNOTS = SPANS + 3
SIZES = (4, 2, 1)  # the whole over the sizes that are registered in turn
ROUNDS = 2  # of Gauss and Newton at each size
SMALLEST = 8  # pixels: no picture is shrunk below this
NOISE = 0.03  # of a colour: residuals beyond it count less and less
STIFFNESS, ANCHOR = 30.0, 0.3  # weights of the difference of neighbouring knots, and of their own size


def registered(goal: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Knots (T, 2, K, K), x before y, and what they rest on: `resampled(frames, field(knots, S))` looks like `goal`.

    goal, frames: (T, C, S, S), any channels in [0, 1]. The second value (T, 2, 2, S, S) is the metric: how much the
    picture resists a motion of each pixel, in the units of the prior.
    """
    size, device = frames.shape[-1], frames.device
    knots, metric = torch.zeros(len(frames), 2, KNOTS, KNOTS, device=device), frames.new_zeros(0)
    rigid = prior(device)
    for side in dict.fromkeys(max(size // part, min(size, SMALLEST)) for part in SIZES):
        target, given = (F.interpolate(picture, (side, side), mode="area") for picture in (goal, frames))
        basis = spline((torch.arange(side, device=device) + 0.5) / side)
        pairs = (basis[:, :, None] * basis[:, None, :]).flatten(1)  # (S, K²)
        for _ in range(ROUNDS):
            moved = resampled(given, basis @ knots @ basis.T)
            x, y = _slopes((moved + target) / 2)  # (T, C, S, S) each, colours per side
            residual = target - moved
            weight = 1 / (residual.square().mean(1) + NOISE**2) / side**2
            xx, xy, yy, x, y = (
                (a * b).sum(1) * weight for a, b in ((x, x), (x, y), (y, y), (x, residual), (y, residual))
            )
            metric = torch.stack([xx, xy, xy, yy], 1).unflatten(1, (2, 2))
            pull = torch.stack([x, y], 1)
            matrix = pairs.T.double() @ (metric @ pairs).double()  # (T, 2, 2, K², K²): pairs of rows, of columns
            matrix = matrix.unflatten(4, (KNOTS, KNOTS)).unflatten(3, (KNOTS, KNOTS)).permute(0, 1, 3, 5, 2, 4, 6)
            matrix = matrix.reshape(len(frames), len(rigid), len(rigid)) + rigid
            right = (basis.T @ pull @ basis).flatten(1) - knots.double().flatten(1) @ rigid
            step = torch.cholesky_solve(right[..., None], torch.linalg.cholesky(matrix))
            knots = knots + step.view_as(knots).float()
    return knots, metric


def field(knots: Tensor, size: int) -> Tensor:
    """(T, 2, S, S) displacements of the pixels of pictures of `size`, in parts of their side."""
    basis = spline((torch.arange(size, device=knots.device) + 0.5) / size)
    return basis @ knots @ basis.T


def resampled(images: Tensor, displacements: Tensor) -> Tensor:
    """(T, C, S, S) images (T, C, S, S) at each pixel's centre plus its displacement (T, 2, S, S), by cubic splines."""
    size = images.shape[-1]
    axis = (torch.arange(size, device=images.device) + 0.5) * 2 / size - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1) + 2 * displacements.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)


def spline(at: Tensor) -> Tensor:
    """(..., K) what each knot adds at places (...) along a side, from 0 to 1."""
    distance = (at[..., None] * SPANS - torch.arange(-1, SPANS + 2, device=at.device)).abs()
    return torch.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clamp(min=0) ** 3 / 6)


def prior(device: torch.device) -> Tensor:
    """(2K², 2K²) float64, the quadratic form that keeps knots small and even: contrast is up to a million times it."""
    eye = torch.eye(KNOTS, dtype=torch.float64, device=device)
    even = torch.diff(eye, dim=0).T @ torch.diff(eye, dim=0)
    one = STIFFNESS * (torch.kron(even, eye) + torch.kron(eye, even)) + ANCHOR * torch.kron(eye, eye)
    return torch.block_diag(one, one)


def _slopes(image: Tensor) -> tuple[Tensor, Tensor]:
    """(T, C, S, S) each: central differences along x and y, over the side of the image."""
    wide, side = F.pad(image, (1, 1, 1, 1), mode="replicate"), image.shape[-1]
    across, down = wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2], wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]
    return across * (side / 2), down * (side / 2)
