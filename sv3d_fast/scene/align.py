"""Frames that disagree are straightened: each is moved, smoothly, to where the splats of all frames show its content.

The views of a generated orbit show one object in slightly different shapes. Splats fitted to all of them average that
out, so what takes a frame to the splats' picture of its view is a displacement of that view, or an error of the
splats. Motions of the splats in space explain the latter in all views at once: they are taken out first, and what no
motion explains is the view's own. The frames of one shape thus stay where they are, however young the fit.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sv3d_fast.camera import Orbit
from sv3d_fast.kernels.splat_raster import splat_raster
from sv3d_fast.video import OrbitVideo

from .fit_step import EPS2D, NEAR
from .flow import field, prior, registered, resampled, spline
from .masks import foreground
from .splats import Splats

SAMPLE = 4000  # splats at most that are asked for motions
TURNS = 10  # of conjugate gradients; alternating between motions and displacements takes thirty for the same
TINY = 1e-30  # keeps what has converged from dividing by nothing
RIDGE = 1e-4  # of a motion, over the mean resistance: keeps what no view sees in place
SPREAD = 7  # pixels over which the pictures' resistance to a motion is averaged
BEHIND = 2.0  # pixels' worth of depth by which a splat may lie behind the surface and still be seen


def straightened(video: OrbitVideo, splats: Splats) -> OrbitVideo:
    """The video as splats fitted to it say it should look: frames and masks moved to agree; alpha is always given.

    Runs on the splats' device. Raises ValueError as `foreground` does.
    """
    device = splats.means.device
    images, alpha = video.colors().to(device), foreground(video).to(device)[..., None]
    images, alpha = moved(images, alpha, displacements(images, alpha, splats, video.orbit, video.size))
    return replace(video, frames=(images * 255).round().to(torch.uint8), alpha=alpha[..., 0])


@torch.no_grad()
def displacements(images: Tensor, alpha: Tensor, splats: Splats, orbit: Orbit, size: int) -> Tensor:
    """Knots (T, 2, K, K), see flow.py, of the displacement of each view that no motion of the splats explains.

    images (T, S, S, 3) on white, alpha (T, S, S, 1); looked at in `size` pixels, the ones that the splats were fitted
    to last.
    """
    splats, views = splats.detach(), orbit.world_to_camera().to(images)
    position = splats.means.nan_to_num() @ views[:, :3, :3].mT + views[:, None, :3, 3]
    depth = position[..., 2:] - orbit.radius  # small numbers, whose mean over a pixel's splats is exact
    channels = torch.cat([splats.colors.expand(len(views), -1, -1), depth], -1)
    drawn, cover = splat_raster(
        splats.means, splats.quats, splats.scales, splats.opacities, channels, views,
        orbit.intrinsics(size).to(views), size, size, None, NEAR, EPS2D,
    )  # fmt: skip
    goal = torch.cat([drawn[..., :3], cover], -1).permute(0, 3, 1, 2)
    frames = F.interpolate(_on_black(images, alpha), (size, size), mode="area")
    color = frames[:, :3]
    gain = (color * goal[:, :3]).sum((2, 3)) / color.square().sum((2, 3)).clamp(min=1e-6)  # each view's exposure
    frames = torch.cat([color * gain[..., None, None], frames[:, 3:]], 1)
    knots, metric = registered(goal, frames)
    front = (drawn[..., 3:] / cover.clamp(min=1e-3)).permute(0, 3, 1, 2)
    return _unexplained(knots, metric, front, position, views, splats, orbit)


def moved(images: Tensor, alpha: Tensor, knots: Tensor) -> tuple[Tensor, Tensor]:
    """Images (T, S, S, 3) on white and alpha (T, S, S, 1) after the displacements of `knots`."""
    picture = resampled(_on_black(images, alpha), field(knots, images.shape[1])).permute(0, 2, 3, 1)
    alpha = picture[..., 3:].clamp(0, 1)
    return (picture[..., :3] + 1 - alpha).clamp(0, 1), alpha


def _on_black(images: Tensor, alpha: Tensor) -> Tensor:
    """(T, 4, S, S): the object's part of each pixel's colour, and alpha."""
    return torch.cat([images - (1 - alpha), alpha], -1).permute(0, 3, 1, 2)


def _unexplained(
    knots: Tensor, metric: Tensor, front: Tensor, position: Tensor, views: Tensor, splats: Splats, orbit: Orbit
) -> Tensor:
    """The knots without what motions of the splats explain.

    metric (T, 2, 2, S, S): resistance of the pictures to a motion; front (T, 1, S, S): depth of the surface beyond
    the orbit's middle; position (T, N, 3): the splats in camera axes.
    """
    part = slice(None, None, -(-len(splats) // SAMPLE))
    position, opacity = position[:, part], splats.opacities[part].nan_to_num()
    focal, z = orbit.focal(1), position[..., 2].clamp(min=1e-3 * orbit.radius)
    across = position[..., :2] / z[..., None]
    at = focal * across + 0.5  # (T, N, 2) parts of a side
    turn = views[:, None, :3, :3]
    motion = (turn[..., :2, :] - across[..., None] * turn[..., 2:, :]) * (focal / z)[..., None, None]  # (T, N, 2, 3)

    grid, size = (2 * at - 1)[:, :, None], metric.shape[-1]
    surface = F.grid_sample(front, grid, mode="nearest", align_corners=False)[:, 0, :, 0]
    seen = (z - orbit.radius < surface + BEHIND * orbit.radius / orbit.focal(size)) * opacity
    spread = F.avg_pool2d(metric.flatten(1, 2), SPREAD, 1, SPREAD // 2)
    weight = F.grid_sample(spread, grid, align_corners=False)[..., 0] * seen[:, None]  # (T, 4, N)
    whole = (metric[:, 0, 0] + metric[:, 1, 1]).sum((1, 2)) / (weight[:, 0] + weight[:, 3]).sum(1).clamp(min=1e-9)
    weight = (weight * whole[:, None, None]).unflatten(1, (2, 2)).permute(0, 3, 1, 2)  # (T, N, 2, 2)

    x, y = spline(at).unbind(2)
    basis = (y[..., :, None] * x[..., None, :]).flatten(2)  # (T, N, K²)
    return _own(basis @ knots.flatten(2).mT, basis, weight, motion).view_as(knots)


def _own(found: Tensor, basis: Tensor, weight: Tensor, motion: Tensor) -> Tensor:
    """(T, 2, K²) the knots that, with a motion of each splat, come nearest to displacements `found` (T, N, 2).

    basis (T, N, K²): what each knot adds at each splat; weight (T, N, 2, 2) of what remains; motion (T, N, 2, 3): how a
    view sees a splat move. Knots are held by `prior`, motions by RIDGE. Conjugate gradients for the knots, motions
    eliminated, preconditioned by what each view would do alone.
    """
    exact = basis.double()
    rows = [[(exact * weight[..., a, b, None]).mT @ exact for b in (0, 1)] for a in (0, 1)]
    factor = torch.linalg.cholesky(torch.cat([torch.cat(row, 2) for row in rows], 1) + prior(basis.device))
    pressed = torch.einsum("tnac,tnab->tncb", motion, weight)
    resistance = torch.einsum("tncb,tnbd->ncd", pressed, motion)
    resistance += RIDGE * resistance.diagonal(dim1=1, dim2=2).mean() * torch.eye(3).to(resistance)
    inverse = torch.linalg.inv(resistance)

    def pull(displaced: Tensor) -> Tensor:
        """(T, 2, K²) float64: how displacements of the splats (T, N, 2) pull at the knots."""
        return (basis.mT @ torch.einsum("tnab,tnb->tna", weight, displaced)).mT.double()

    def explained(displaced: Tensor) -> Tensor:
        """(T, N, 2): as the views would see the motions that fit displacements best."""
        offset = torch.einsum("ncd,tndb,tnb->nc", inverse, pressed, displaced)
        return torch.einsum("tnac,nc->tna", motion, offset)

    def alone(force: Tensor) -> Tensor:
        return torch.cholesky_solve(force.flatten(1)[..., None], factor).view_as(force)

    rest = pull(found - explained(found))
    own, step = torch.zeros_like(rest), alone(rest)
    pressure, energy = rest, (rest * step).sum()  # pressure: what `step` would be the answer to in views alone
    for _ in range(TURNS):
        change = pressure - pull(explained(basis @ step.to(basis).mT))
        length = energy / (step * change).sum().clamp(min=TINY)
        own, rest = own + length * step, rest - length * change
        ahead, before = alone(rest), energy
        energy = (rest * ahead).sum()
        share = energy / before.clamp(min=TINY)
        step, pressure = ahead + share * step, rest + share * pressure
    return own.to(found)
