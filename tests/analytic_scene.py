"""Synthetic orbits with known truth: spheres and boxes, ray cast independently of our kernels."""

from dataclasses import dataclass

import torch

from sv3d_fast.camera import Orbit
from sv3d_fast.video import OrbitVideo


@dataclass(frozen=True)
class Sphere:
    """A sphere with a centre, a radius and an RGB colour."""

    center: tuple
    radius: float
    color: tuple

    def hit(self, origin, direction):
        """Distance along each ray to the surface (inf: none) and the outward normal there."""
        p = origin - torch.tensor(self.center)
        b = (p * direction).sum(-1)
        discriminant = b * b - ((p * p).sum(-1) - self.radius**2)
        t = torch.where(discriminant > 0, -b - discriminant.clamp(min=0).sqrt(), torch.inf)
        t = torch.where(t > 0, t, torch.inf)
        return t, (p + t.nan_to_num(posinf=0)[..., None] * direction) / self.radius

    def contains(self, points):
        """Whether each point lies inside."""
        return (points - torch.tensor(self.center)).norm(dim=-1) <= self.radius


@dataclass(frozen=True)
class Box:
    """An axis-aligned box with a centre, half sides and an RGB colour."""

    center: tuple
    half: tuple
    color: tuple

    def hit(self, origin, direction):
        """Distance along each ray to the surface (inf: none) and the outward normal there."""
        p, half = origin - torch.tensor(self.center), torch.tensor(self.half)
        direction = torch.where(direction.abs() < 1e-9, torch.full_like(direction, 1e-9), direction)
        near = (-p - half * direction.sign()) / direction
        far = (-p + half * direction.sign()) / direction
        t, axis = near.max(-1)
        t = torch.where((t <= far.amin(-1)) & (t > 0), t, torch.inf)
        sign = -direction.gather(-1, axis[..., None]).sign()
        return t, torch.nn.functional.one_hot(axis, 3) * sign

    def contains(self, points):
        """Whether each point lies inside."""
        return ((points - torch.tensor(self.center)).abs() <= torch.tensor(self.half)).all(-1)


ASYMMETRIC = (
    Sphere((0.0, 0.0, 0.0), 0.26, (0.8, 0.25, 0.2)),
    Box((0.26, 0.12, 0.05), (0.14, 0.07, 0.09), (0.15, 0.45, 0.75)),
    Box((-0.1, -0.2, 0.18), (0.08, 0.16, 0.08), (0.2, 0.6, 0.25)),
)


def contains(shapes, points):
    """(...,) bool: whether points (..., 3) lie inside any of the shapes."""
    return torch.stack([s.contains(points) for s in shapes]).any(0)


def render(shapes, orbit: Orbit, size: int, supersampling: int = 2) -> OrbitVideo:
    """The exact anti-aliased orbit of Lambert-shaded shapes on white, with its true alpha."""
    fine = size * supersampling
    pixel = torch.arange(fine) + 0.5
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    f = orbit.focal(fine)
    camera = torch.stack([(x - fine / 2) / f, (y - fine / 2) / f, torch.ones_like(x)], -1)
    light = torch.nn.functional.normalize(torch.tensor([0.5, -0.3, 0.8]), dim=0)
    images, alphas = [], []
    for pose in orbit.camera_to_world():
        direction = torch.nn.functional.normalize(camera @ pose[:3, :3].T, dim=-1)
        best = torch.full((fine, fine), torch.inf)
        image = torch.ones(fine, fine, 3)
        for shape in shapes:
            t, normal = shape.hit(pose[:3, 3], direction)
            shade = 0.7 + 0.3 * (normal * light).sum(-1, keepdim=True)
            closer = (t < best)[..., None]
            image = torch.where(closer, torch.tensor(shape.color) * shade, image)
            best = torch.minimum(best, t)
        images.append(image)
        alphas.append(torch.isfinite(best).float())
    shrink = torch.nn.functional.avg_pool2d
    rgb = shrink(torch.stack(images).permute(0, 3, 1, 2), supersampling).permute(0, 2, 3, 1)
    alpha = shrink(torch.stack(alphas)[:, None], supersampling)[:, 0]
    return OrbitVideo((rgb.clamp(0, 1) * 255).round().to(torch.uint8), orbit, alpha)
