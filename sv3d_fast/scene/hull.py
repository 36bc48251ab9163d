"""Visual hulls: the largest shape whose silhouettes agree with an orbit's masks, and what masks tell about cameras.

Laurentini, "The visual hull concept for silhouette-based image understanding", PAMI 1994. The hull is held as a
robust signed distance: for each point, the smallest distance to the masks' outlines over the views, leaving out the
`tolerance` worst views, since views of a generated orbit do not agree exactly.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from sv3d_fast.camera import Orbit

MASK_SIZE = 256  # masks are carved at this size at most: finer pixels are below a voxel
BLOCK = 4  # voxels: carving first asks blocks of this side whether the surface can pass through them
SLOPE = 1.5  # how fast the robust distance can change over a distance, with room for pixels and perspective
FOREGROUND = 0.25  # alpha from which a pixel counts: low, so that structures thinner than a pixel survive


@dataclass(frozen=True)
class Hull:
    """A visual hull on a cubic grid over [-half_extent, half_extent]^3, indexed (x, y, z).

    occupancy: (R, R, R) bool, voxels whose centre lies inside.
    field: (R, R, R) float32, distance to the outline in world units, positive inside and zero on the hull's surface;
        far from it a bound rather than the exact distance.
    half_extent: half the side of the cube, world units.
    """

    occupancy: torch.Tensor
    field: torch.Tensor
    half_extent: float

    def __post_init__(self):
        shape = tuple(self.field.shape)
        if len(set(shape)) != 1 or len(shape) != 3 or tuple(self.occupancy.shape) != shape:
            raise ValueError(f"field and occupancy: expected the same (R, R, R), got {shape}, {self.occupancy.shape}")

    @property
    def voxel(self) -> float:
        """Side of a voxel, world units."""
        return 2 * self.half_extent / self.field.shape[0]

    def centers(self) -> torch.Tensor:
        """(R,) float32 coordinates of voxel centres along each axis."""
        return _centers(self.field.shape[0], self.half_extent, self.field.device)

    def sample(self, points: torch.Tensor) -> torch.Tensor:
        """(...,) the field at points (..., 3), trilinear; beyond the grid its border value holds."""
        grid = points.reshape(1, 1, 1, -1, 3).flip(-1) / self.half_extent
        value = F.grid_sample(self.field[None, None], grid, align_corners=False, padding_mode="border")
        return value.reshape(points.shape[:-1])


def visual_hull(
    alpha: torch.Tensor,
    orbit: Orbit,
    resolution: int = 128,
    half_extent: float | None = None,
    tolerance: int = 1,
    dilation: float | None = None,
) -> Hull:
    """Carves the hull of masks alpha (T, H, W) in [0, 1] seen from `orbit`; runs on alpha's device.

    half_extent: world units; the cameras' half view at the origin if None. tolerance: how many of the T views may
    see a point outside their mask. dilation: pixels by which masks grow, so that small disagreements carve nothing;
    1.5 pixels at 576 in proportion, but at least half a pixel, if None. A point outside a view's frame takes the
    mask's nearest border pixel, so an object cut off by the frame is not carved there.
    Raises ValueError for shapes that don't agree, a tolerance outside [0, T) or an empty hull.
    """
    if alpha.ndim != 3 or len(alpha) != len(orbit):
        raise ValueError(f"alpha: expected ({len(orbit)}, H, W), one mask for each camera, got {tuple(alpha.shape)}")
    if not 0 <= tolerance < len(orbit):
        raise ValueError(f"tolerance: expected a number of views in [0, {len(orbit)}), got {tolerance}")
    half_extent = half_extent or view_half_extent(orbit)
    if dilation is None:
        dilation = max(0.5, alpha.shape[-1] / 384)
    distances, size = _outline_distances(alpha), min(alpha.shape[-1], MASK_SIZE)
    field = _carve(
        distances + dilation * size / alpha.shape[-1],
        orbit,
        _centers(resolution, half_extent, alpha.device),
        tolerance,
    )
    occupancy = field >= 0
    if not occupancy.any():
        raise ValueError("alpha: expected masks that agree on some volume, got an empty hull; check the orbit's angles")
    return Hull(occupancy, field, half_extent)


def view_half_extent(orbit: Orbit) -> float:
    """Half of what the cameras see in the plane through the origin, world units: the cube that holds the object."""
    return orbit.radius * math.tan(math.radians(orbit.fov) / 2)


def surface_points(
    hull: Hull, count: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` points spread over the hull's surface with outward unit normals, both (count, 3) float32.

    generator: a CPU generator. Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count: expected at least one point, got {count}")
    inside = F.pad(hull.occupancy, (1,) * 6)
    core = inside[1:-1, 1:-1, 1:-1]
    buried = core.clone()
    for axis in range(3):
        for shift in (-1, 1):
            buried &= inside.roll(shift, axis)[1:-1, 1:-1, 1:-1]
    cells = (core & ~buried).nonzero()
    turns = -(-count // len(cells))  # every surface voxel gets as many points as any other, but for the last turn
    order = torch.cat([torch.randperm(len(cells), generator=generator) for _ in range(turns)])[:count]
    jitter = torch.rand(count, 3, generator=generator)
    points = (cells[order.to(cells.device)] + jitter.to(cells.device)) * hull.voxel - hull.half_extent
    for _ in range(4):
        value, gradient = hull.sample(points), _gradient(hull, points)
        step = value / gradient.square().sum(-1).clamp(min=0.1)
        points = points - step.clamp(-hull.voxel, hull.voxel)[:, None] * gradient
    return points, F.normalize(-_gradient(hull, points), dim=-1)


def silhouette_iou(hull: Hull, alpha: torch.Tensor, orbit: Orbit) -> torch.Tensor:
    """(T,) intersection over union of the hull's silhouettes with masks (T, H, W), at 96 pixels at most."""
    alpha = _shrink(alpha, 96)
    seen = _depth_inside(hull, orbit, torch.ones_like(alpha, dtype=torch.bool)) >= 0
    mask = alpha >= 0.5
    union = (seen | mask).flatten(1).sum(1)
    return (seen & mask).flatten(1).sum(1) / union.clamp(min=1)


def consistency(alpha: torch.Tensor, orbit: Orbit, resolution: int = 48) -> float:
    """How well masks agree with cameras: the part of the masks' area that their common hull covers, 0 to 1.

    A hull never covers more than its masks, and covers all of them only if masks and cameras agree.
    """
    alpha = _shrink(alpha, resolution)
    half_extent = view_half_extent(orbit)
    pixel = 2 * half_extent / alpha.shape[-1]
    field = _carve(_outline_distances(alpha, 0.5), orbit, _centers(resolution, half_extent, alpha.device), 0)
    depth = _depth_inside(Hull(field >= 0, field, half_extent), orbit, alpha > 0)
    covered = (depth / pixel + 0.5).clamp(0, 1)
    return float((alpha * covered).sum() / alpha.sum().clamp(min=1e-6))


def azimuth_scores(alpha: torch.Tensor, orbit: Orbit) -> tuple[float, float]:
    """The masks' consistency with the orbit as given, and with the same orbit turning the other way."""
    other = Orbit(orbit.elevations, -orbit.azimuths, orbit.radius, orbit.fov)
    return consistency(alpha, orbit), consistency(alpha, other)


def estimate_elevation(alpha: torch.Tensor, orbit: Orbit, search: float = 10.0) -> tuple[float, float]:
    """The elevation of a static orbit that its masks agree with best, in degrees, and the consistency there.

    search: how far from the given elevation to look, degrees either way; refined to about half a degree. An object
    of revolution looks alike from all azimuths and tells little about its elevation.
    Raises ValueError for an orbit whose elevation changes.
    """
    given = float(orbit.elevations[0])
    if (orbit.elevations - given).abs().max() > 1e-3:
        raise ValueError("orbit: expected one elevation for all frames, got elevations that change")

    def score(elevation):
        return consistency(alpha, Orbit(torch.full((len(orbit),), elevation), orbit.azimuths, orbit.radius, orbit.fov))

    scores: dict[float, float] = {}
    center, step = given, search / 4
    for reach in (4, 2, 1):
        for i in range(-reach, reach + 1):
            elevation = min(max(center + i * step, -89.0), 89.0)
            if elevation not in scores:
                scores[elevation] = score(elevation)
        center = max(scores, key=scores.__getitem__)
        step /= 2
    low, high = scores.get(center - 2 * step), scores.get(center + 2 * step)
    if low is not None and high is not None and low + high < 2 * scores[center]:
        # the vertex of the parabola through the best three
        return center + step * (high - low) / (2 * scores[center] - low - high), scores[center]
    return center, scores[center]


def _centers(resolution: int, half_extent: float, device) -> torch.Tensor:
    return ((torch.arange(resolution, device=device) + 0.5) * 2 / resolution - 1) * half_extent


def _shrink(alpha: torch.Tensor, size: int) -> torch.Tensor:
    """Masks (T, H, W) averaged down to at most size x size."""
    if alpha.shape[-1] <= size:
        return alpha
    return F.interpolate(alpha[:, None], (size, size), mode="area")[:, 0]


def _outline_distances(alpha: torch.Tensor, threshold: float = FOREGROUND) -> torch.Tensor:
    """(T, S, S) distance in pixels to the masks' outline, positive inside; S is at most MASK_SIZE."""
    alpha = _shrink(alpha, MASK_SIZE)
    inside = alpha.cpu().numpy() >= threshold
    distance = np.empty(inside.shape, np.float32)
    size = inside.shape[-1]
    for out, mask in zip(distance, inside, strict=True):
        if mask.all() or not mask.any():
            out[:] = size if mask.all() else -size
        else:
            out[:] = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
            out -= 0.5 * np.sign(out)  # the outline runs between pixel centres
    return torch.from_numpy(distance).to(alpha.device)


def _carve(distances: torch.Tensor, orbit: Orbit, centers: torch.Tensor, tolerance: int) -> torch.Tensor:
    """(R, R, R) the (tolerance + 1)-th smallest over the views of the outline distance, in world units.

    Blocks of BLOCK^3 voxels that the surface can't reach, by the distance at their centre, are interpolated.
    """
    resolution, device = len(centers), centers.device
    voxel = float(centers[1] - centers[0]) if resolution > 1 else 0.0
    blocks = -(-resolution // BLOCK)
    middles = centers[0] + voxel * (torch.arange(blocks, device=device) * BLOCK + (BLOCK - 1) / 2)
    coarse = _robust_distance(torch.cartesian_prod(middles, middles, middles), distances, orbit, tolerance)
    coarse = coarse.view(1, 1, blocks, blocks, blocks)
    field = F.interpolate(coarse, scale_factor=BLOCK, mode="trilinear")[0, 0]
    near = (coarse.abs() <= SLOPE * voxel * BLOCK * math.sqrt(3) / 2)[0, 0]
    near = near.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    field, near = (g[:resolution, :resolution, :resolution].contiguous() for g in (field, near))
    voxels = near.nonzero()
    field[near] = _robust_distance(centers[voxels], distances, orbit, tolerance)
    return field


def _robust_distance(points: torch.Tensor, distances: torch.Tensor, orbit: Orbit, tolerance: int) -> torch.Tensor:
    """(N,) the (tolerance + 1)-th smallest outline distance of points (N, 3) over the views, world units."""
    size = distances.shape[-1]
    focal = orbit.focal(size)
    lowest = [torch.full_like(points[:, 0], torch.inf) for _ in range(tolerance + 1)]
    for distance, view in zip(distances, orbit.world_to_camera().to(points.device), strict=True):
        position = points @ view[:3, :3].T + view[:3, 3]
        depth = position[:, 2:].clamp(min=1e-3 * orbit.radius)
        grid = position[:, :2] * ((2 * focal / size) / depth)
        sample = F.grid_sample(distance[None, None], grid[None, None], align_corners=False, padding_mode="border")
        sample = sample.view(-1) * depth[:, 0] / focal
        for k, low in enumerate(lowest):  # insertion into the sorted smallest
            lowest[k], sample = torch.minimum(low, sample), torch.maximum(low, sample)
    return lowest[-1]


def _depth_inside(hull: Hull, orbit: Orbit, wanted: torch.Tensor) -> torch.Tensor:
    """The largest field value on the ray of each wanted pixel (T, S, S) bool: (T, S, S) world units, -inf elsewhere.

    It is negative, -inf where far, if the ray misses the hull.
    """
    device, size = hull.field.device, wanted.shape[-1]
    result = torch.full(wanted.shape, -torch.inf, device=device)
    occupied = hull.occupancy.nonzero()
    if len(occupied) == 0:
        return result
    # rays and depths outside the ball around the origin that holds the hull meet nothing
    reach = float(hull.centers()[occupied].norm(dim=-1).max()) + 2 * hull.voxel
    pixel = (torch.arange(size, device=device) + 0.5 - size / 2) / orbit.focal(size)
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], -1)
    wanted = wanted & (orbit.radius * (x * x + y * y).sqrt() <= reach * rays.norm(dim=-1))
    depths = orbit.radius + torch.linspace(-reach, reach, int(2 * reach / hull.voxel) + 2, device=device)
    depths = depths[depths > 0]
    for out, want, pose in zip(result, wanted, orbit.camera_to_world().to(device), strict=True):
        directions = rays[want] @ pose[:3, :3].T
        out[want] = hull.sample(pose[:3, 3] + directions[:, None] * depths[:, None]).amax(-1)
    return result


def _gradient(hull: Hull, points: torch.Tensor) -> torch.Tensor:
    """(N, 3) the field's gradient by central differences over a voxel."""
    offsets = torch.eye(3, device=points.device) * hull.voxel
    ahead, behind = hull.sample(points[:, None] + offsets), hull.sample(points[:, None] - offsets)
    return (ahead - behind) / (2 * hull.voxel)
