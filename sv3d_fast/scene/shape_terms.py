"""What ties splats to one smooth surface: the normals that they render should be those of the depth that they render.

Splats of a fit are discs across their third axis, which points out of the object. Beside the colours each view
renders, of those that face it, how many there are, their depth and their normals; the bend is the normal consistency
of 2DGS (Huang et al., SIGGRAPH 2024, equation 15). Discs that face away lie on another side of the object.
"""

import torch
import torch.nn.functional as F

CHANNELS = 5  # one, depth, normal
SOLID = 0.5  # alpha from which a pixel's normal counts


def third_axes(quats: torch.Tensor) -> torch.Tensor:
    """(N, 3) unit vectors along the third axes of rotations (N, 4), w first, of any length."""
    w, x, y, z = F.normalize(quats, dim=1).unbind(1)
    return torch.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], 1)


def shape_channels(means: torch.Tensor, normals: torch.Tensor, viewmats: torch.Tensor, middle: float) -> torch.Tensor:
    """(C, N, 5) one, camera z over `middle` (a depth near the object) and the normal in camera axes; all zero for a
    splat that faces away.

    means (N, 3), unit normals (N, 3), viewmats (C, 4, 4) world-to-camera.
    """
    position = means @ viewmats[:, :3, :3].mT + viewmats[:, None, :3, 3]
    normals = normals @ viewmats[:, :3, :3].mT
    facing = ((normals.detach() * position.detach()).sum(-1, keepdim=True) < 0).to(means)
    z = position[..., 2:] - middle
    return torch.cat([torch.ones_like(z), z, normals], -1) * facing


def bend(image: torch.Tensor, focal: float, middle: float) -> torch.Tensor:
    """(C,) mean over pixels of the weight minus the cosine of the rendered normal with that of the depth map.

    image (C, S, S, 5): `shape_channels` rendered on black. focal in pixels, the principal point is the middle of the
    image. Pixels next to one that shows no surface don't count.
    """
    size, weight = image.shape[1], image[..., 0]
    depth = image[..., 1] / weight.clamp(min=1e-3) + middle
    pixel = (torch.arange(size, device=image.device) + 0.5 - size / 2) / focal
    points = torch.stack([depth * pixel, depth * pixel[:, None], depth], -1)
    across = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
    down = points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    normal = F.normalize(torch.linalg.cross(down, across), dim=-1, eps=1e-12)
    cosine = (normal * image[:, 1:-1, 1:-1, 2:]).sum(-1)
    solid = -F.max_pool2d(-weight.detach()[:, None], 3, 1)[:, 0] > SOLID
    return torch.where(solid, weight[:, 1:-1, 1:-1] - cosine, 0).sum((1, 2)) / size**2
