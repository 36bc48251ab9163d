"""How close images, masks and meshes are to the truth.

Lengths of mesh metrics are in units of the true mesh's bounding box diagonal, so that they compare across objects.
"""

import math

import numpy as np
import torch
from scipy.spatial import cKDTree

from sv3d_fast.camera import Orbit
from sv3d_fast.kernels.mesh_raster import mesh_raster

from .flip import flip
from .mesh import Mesh

__all__ = [
    "chamfer", "compare", "f_score", "flip", "iou", "normal_consistency", "psnr", "sample_surface", "visible_points",
]  # fmt: skip
THRESHOLDS = (0.01, 0.02, 0.05)  # F-scores that `compare` reports


def psnr(image: torch.Tensor, truth: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in [0, 1], over all elements; inf if equal.

    Raises ValueError for shapes that differ.
    """
    if image.shape != truth.shape:
        raise ValueError(f"image: expected the truth's shape {tuple(truth.shape)}, got {tuple(image.shape)}")
    error = float((image.double() - truth.double()).square().mean())
    return -10 * math.log10(error) if error else math.inf


def iou(mask: torch.Tensor, truth: torch.Tensor) -> float:
    """Intersection over union of two masks or occupancies (values from 0.5 are inside); 1 if both are empty.

    Raises ValueError for shapes that differ.
    """
    if mask.shape != truth.shape:
        raise ValueError(f"mask: expected the truth's shape {tuple(truth.shape)}, got {tuple(mask.shape)}")
    a, b = mask >= 0.5, truth >= 0.5
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def chamfer(points: torch.Tensor, truth: torch.Tensor) -> float:
    """Chamfer distance of point sets (N, 3), (M, 3): the mean of both one-way mean distances, not squared."""
    return _chamfer(_nearest(points, truth)[0], _nearest(truth, points)[0])


def f_score(points: torch.Tensor, truth: torch.Tensor, threshold: float) -> float:
    """Harmonic mean of precision and recall of point sets (N, 3), (M, 3) at a distance threshold, 0 to 1.

    Knapitsch et al., "Tanks and Temples", 2017.
    """
    return _f_score(_nearest(points, truth)[0], _nearest(truth, points)[0], threshold)


def normal_consistency(
    points: torch.Tensor, normals: torch.Tensor, truth: torch.Tensor, true_normals: torch.Tensor
) -> float:
    """Mean |cosine| between unit normals (N, 3) of nearest points, both ways averaged, 0 to 1.

    Mescheder et al., "Occupancy Networks", 2019.
    """
    there, back = _nearest(points, truth)[1], _nearest(truth, points)[1]
    return (_aligned(normals, true_normals, there) + _aligned(true_normals, normals, back)) / 2


def sample_surface(
    mesh: Mesh, count: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` points uniform over a mesh's surface and their face normals, both (count, 3) float32, on its device.

    generator: a CPU generator. Raises ValueError for a mesh without area.
    """
    corners = mesh.vertices[mesh.faces.long()].cpu()
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = normals.double().norm(dim=-1)
    if not area.sum() > 0:
        raise ValueError(f"mesh: expected a surface with an area, got {len(mesh.faces)} faces without")
    total = area.cumsum(0)
    face = torch.searchsorted(total, torch.rand(count, generator=generator, dtype=torch.float64) * total[-1])
    face = face.clamp(max=len(area) - 1)
    u, v = torch.rand(2, count, 1, generator=generator)
    root = u.sqrt()  # uniform over a triangle (Osada et al. 2002)
    a, b, c = corners[face].unbind(1)
    points = (1 - root) * a + root * (1 - v) * b + root * v * c
    normals = torch.nn.functional.normalize(normals[face], dim=-1)
    return points.to(mesh.vertices.device), normals.to(mesh.vertices.device)


def visible_points(points: torch.Tensor, mesh: Mesh, orbit: Orbit, size: int = 512) -> torch.Tensor:
    """(N,) bool: which points (N, 3) on a mesh's surface at least one camera of the orbit sees.

    A depth test against the mesh rendered at `size` pixels, with room for the depth's change over a pixel.
    """
    device = points.device
    views, intrinsics = orbit.world_to_camera().to(device), orbit.intrinsics(size).to(device)
    _, _, depth = mesh_raster(mesh.vertices, mesh.faces, views, intrinsics, size, size)
    slack = 2 * orbit.radius / orbit.focal(size)  # two pixels: a surface seen at up to about 60 degrees
    seen = torch.zeros(len(points), dtype=torch.bool, device=device)
    for view, matrix, nearest in zip(views, intrinsics, depth, strict=True):
        position = points @ view[:3, :3].T + view[:3, 3]
        z = position[:, 2]
        x, y = (position @ matrix.T)[:, :2].div(z[:, None]).floor().long().unbind(-1)
        framed = (z > 0) & (x >= 0) & (x < size) & (y >= 0) & (y < size)
        front = nearest[y.clamp(0, size - 1), x.clamp(0, size - 1)]
        seen |= framed & (z <= front + slack) & front.isfinite()
    return seen


def compare(
    mesh: Mesh, truth: Mesh, orbit: Orbit | None = None, samples: int = 100_000, seed: int = 0
) -> dict[str, float]:
    """Chamfer distance, F-scores and normal consistency of a mesh, lengths in units of the truth's box diagonal.

    orbit: count only the parts of the truth that its cameras see, and the parts of the mesh that they see.
    """
    diagonal = float((truth.vertices.amax(0) - truth.vertices.amin(0)).norm())
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for m in (mesh, truth):
        points, normals = sample_surface(m, samples, generator)
        if orbit is not None:
            seen = visible_points(points, m, orbit)
            points, normals = points[seen], normals[seen]
        sets.append((points / diagonal, normals))
    (points, normals), (true_points, true_normals) = sets
    (there, index), (back, index_back) = _nearest(points, true_points), _nearest(true_points, points)
    figures = {"chamfer": _chamfer(there, back)}
    figures |= {f"f_score@{t}": _f_score(there, back, t) for t in THRESHOLDS}
    alike = _aligned(normals, true_normals, index), _aligned(true_normals, normals, index_back)
    figures["normal_consistency"] = sum(alike) / 2
    return figures


def _chamfer(there: np.ndarray, back: np.ndarray) -> float:
    return float(there.mean() + back.mean()) / 2


def _f_score(there: np.ndarray, back: np.ndarray, threshold: float) -> float:
    precision, recall = float((there <= threshold).mean()), float((back <= threshold).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _aligned(normals: torch.Tensor, others: torch.Tensor, index: np.ndarray) -> float:
    """Mean |cosine| of normals with those of the points that `index` pairs them with."""
    return float((normals.cpu() * others.cpu()[torch.from_numpy(index)]).sum(-1).abs().mean())


def _nearest(points: torch.Tensor, targets: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Distance (N,) and index (N,) of the nearest target of each point."""
    for name, value in (("points", points), ("targets", targets)):
        if value.ndim != 2 or value.shape[1] != 3 or len(value) == 0:
            raise ValueError(f"{name}: expected at least one point, (N, 3), got {tuple(value.shape)}")
    tree = cKDTree(targets.detach().cpu().double().numpy())
    return tree.query(points.detach().cpu().double().numpy(), workers=-1)
