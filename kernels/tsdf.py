"""Fusion of depth maps into a truncated signed distance field (TSDF) on a cubic grid.

Curless and Levoy, A Volumetric Method for Building Complex Models from Range Images, SIGGRAPH 1996, with distances
along the camera's z axis.
"""

import math

import torch

from sv3d_fast.kernels import native
from sv3d_fast.kernels.op import Implementation, Op

NEAR = 1e-6  # voxels at or behind the camera's plane are not seen
MAX_SIDE = 32768  # pixels


def _check(depths, weights, viewmats, Ks, resolution, half_extent, truncation) -> None:
    if depths.ndim != 3 or 0 in depths.shape[1:] or max(depths.shape[1:]) > MAX_SIDE:
        raise ValueError(f"depths: expected (C, H, W) of 1 to {MAX_SIDE} pixels a side, got {tuple(depths.shape)}")
    views = len(depths)
    for name, tensor, shape in (
        ("depths", depths, tuple(depths.shape)),
        ("weights", weights, tuple(depths.shape)),
        ("viewmats", viewmats, (views, 4, 4)),
        ("Ks", Ks, (views, 3, 3)),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or tensor.device != depths.device:
            raise ValueError(
                f"{name}: expected float32 {shape} on {depths.device}, "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    if resolution < 1:
        raise ValueError(f"resolution: expected at least 1, got {resolution}")
    for name, value in (("half_extent", half_extent), ("truncation", truncation)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a positive length, got {value}")
    rules = (
        (torch.isnan(depths).any(), "depths: expected camera z, or infinity where nothing is hit, got NaN"),
        (((weights >= 0) & (weights < math.inf)).all().logical_not(), "weights: expected finite values of at least 0"),
        (torch.isfinite(viewmats).all().logical_not(), "viewmats: expected finite values, got NaN or infinity"),
        (torch.isfinite(Ks).all().logical_not(), "Ks: expected finite values, got NaN or infinity"),
    )
    broken = torch.stack([flag for flag, _ in rules]).tolist()  # waits for a GPU once
    for (_, message), found in zip(rules, broken, strict=True):
        if found:
            raise ValueError(message)


def reference(
    depths: torch.Tensor,
    weights: torch.Tensor,
    viewmats: torch.Tensor,
    Ks: torch.Tensor,
    resolution: int,
    half_extent: float,
    truncation: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fuses depth maps into a field over [-half_extent, half_extent]^3, indexed (x, y, z), sampled at voxel centres.

    depths: (C, H, W) float32 camera z in world units; infinity where the ray hits nothing, which frees all of it.
    weights: (C, H, W) float32; 0 where a pixel tells nothing. viewmats: (C, 4, 4) world-to-camera, OpenCV axes.
    Ks: (C, 3, 3) in pixels, pixel centres at +0.5. truncation: world units; voxels further behind a surface than
    this are not seen by that view.
    Returns tsdf (R, R, R), the weighted mean of distance / truncation cut to [-1, 1], positive outside, 0 where no
    view sees the voxel, and weight (R, R, R), the sum of the weights of the views that do.
    Raises ValueError for shapes, dtypes or devices that don't agree, NaN depths,
    cameras that are not finite and lengths that are not positive.
    """
    _check(depths, weights, viewmats, Ks, resolution, half_extent, truncation)
    _, height, width = depths.shape
    cell = 2 * half_extent / resolution
    axis = torch.arange(resolution, dtype=torch.float32, device=depths.device) * cell + (0.5 * cell - half_extent)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    total = torch.zeros((resolution,) * 3, dtype=torch.float32, device=depths.device)
    signed = torch.zeros_like(total)
    for depth, weight, viewmat, K in zip(depths, weights, viewmats, Ks, strict=True):
        x, y, z = (points @ viewmat[:3, :3].T + viewmat[:3, 3]).unbind(-1)
        u = K[0, 0] * x / z.clamp(min=NEAR) + K[0, 2]
        v = K[1, 1] * y / z.clamp(min=NEAR) + K[1, 2]
        seen = (z > NEAR) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        column, row = u.clamp(0, width - 0.5).long(), v.clamp(0, height - 0.5).long()
        distance = _sample(depth, u, v, row, column, truncation) - z
        w = torch.where(seen & (distance >= -truncation), weight[row, column], 0)
        signed += torch.where(w > 0, w * (distance / truncation).clamp(max=1), 0)
        total += w
    return torch.where(total > 0, signed / total, 0), total


def _sample(depth, u, v, row, column, truncation) -> torch.Tensor:
    """Depth between pixel centres: bilinear where the four pixels see one surface, else that of the pixel (u, v)."""
    height, width = depth.shape
    su, sv = (u - 0.5).clamp(0, width - 1), (v - 0.5).clamp(0, height - 1)
    u0, v0 = su.long(), sv.long()
    u1, v1 = (u0 + 1).clamp(max=width - 1), (v0 + 1).clamp(max=height - 1)
    corners = torch.stack([depth[v0, u0], depth[v0, u1], depth[v1, u0], depth[v1, u1]])
    low, high = corners.amin(0), corners.amax(0)
    top, bottom = torch.lerp(corners[0], corners[1], su - u0), torch.lerp(corners[2], corners[3], su - u0)
    smooth = (high <= low + truncation) & (high < math.inf)
    return torch.where(smooth, torch.lerp(top, bottom, sv - v0), depth[row, column])


def _native(depths, weights, viewmats, Ks, resolution, half_extent, truncation) -> tuple[torch.Tensor, torch.Tensor]:
    _check(depths, weights, viewmats, Ks, resolution, half_extent, truncation)
    tsdf = torch.empty((resolution,) * 3, dtype=torch.float32, device=depths.device)
    weight = torch.empty_like(tsdf)
    inputs = [t.detach().contiguous() for t in (depths, weights, viewmats, Ks)]
    native.load(depths.device.type).tsdf_fuse(*inputs, float(half_extent), float(truncation), tsdf, weight)
    return tsdf, weight


def _examples(device: str):
    generator = torch.Generator().manual_seed(0)
    for views, height, width, resolution in ((3, 37, 50, 19), (2, 8, 8, 33), (1, 1, 1, 1)):
        depths = 2 + 0.05 * torch.rand((views, height, width), generator=generator)
        depths[:, : height // 3] = math.inf
        weights = torch.rand((views, height, width), generator=generator)
        viewmats = torch.eye(4).repeat(views, 1, 1)
        viewmats[:, 2, 3] = 2.0
        viewmats[:, :2, 3] = 0.0137 + 0.0713 * torch.arange(2 * views).view(views, 2)  # no voxel between two pixels
        focal = 1.7 * width
        Ks = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]).repeat(views, 1, 1)
        yield *(t.to(device) for t in (depths, weights, viewmats, Ks)), resolution, 0.61, 0.1


tsdf_fuse = Op(
    name="tsdf_fuse",
    reference=reference,
    implementations=[
        Implementation("cuda", _native, lambda depths, *rest: native.why_not("cuda", depths)),
        Implementation("csrc", _native, lambda depths, *rest: native.why_not("cpu", depths)),
    ],
    examples=_examples,
    tolerance=1e-4,
    source="Curless and Levoy, SIGGRAPH 1996",
)
