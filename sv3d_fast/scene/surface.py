"""Splats to a closed surface: depth maps from all around, fused into a field that the visual hull completes.

Each splat is read as the plane through its centre across its shortest axis; blending planes rather than centres and
intersecting each pixel's ray with the blend gives an unbiased depth (Chen et al., PGSR, TVCG 2024). Where no camera
saw anything, what lies inside the hull counts as inside, so that the surface is closed by construction.
"""

from collections.abc import Generator
from dataclasses import dataclass

import fast_simplification
import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from scipy import sparse
from scipy.sparse import csgraph

from sv3d_fast.camera import Orbit
from sv3d_fast.events import Progress, Warned, finish
from sv3d_fast.kernels.marching_cubes import marching_cubes
from sv3d_fast.kernels.splat_raster import splat_raster
from sv3d_fast.kernels.tsdf import tsdf_fuse
from sv3d_fast.scene.hull import Hull
from sv3d_fast.scene.manifold import parted
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.scene.silhouettes import snapped
from sv3d_fast.scene.splats import Splats
from sv3d_fast.video import OrbitVideo

STAGE = "surface"
RINGS = ((-75.0, 4), (-35.0, 8), (35.0, 8), (75.0, 4))  # elevation in degrees and number of the virtual cameras
TRUNCATION = 3.0  # voxels (2DGS takes 5, PGSR 4): thin parts have two sides
OPAQUE, CLEAR = 0.5, 0.05  # alpha from which a pixel shows a surface, and below which the orbit's cameras see through
CLEAR_WEIGHT = 0.1  # of a pixel that shows nothing; more would eat into silhouettes, which pixels cross
UNSURE = 0.1  # weight at which the hull has as much say as the depth maps
SMOOTHING = 0.8  # voxels, standard deviation
SLAB_POINTS = 1 << 21  # points at which the hull is sampled at a time, to bound memory
SMALLEST = 0.02  # components below this part of the largest one's volume are dropped
FEWER = (0.99, 0.85, 0.7)  # of the budget: parting sheets adds a few, and less may stay closed where more doesn't


def extract(
    splats: Splats, video: OrbitVideo, hull: Hull, *, resolution: int = 256, target_faces: int = 20_000
) -> Mesh:
    """The whole of `extracting` at once."""
    return finish(extracting(splats, video, hull, resolution=resolution, target_faces=target_faces))


def extracting(
    splats: Splats, video: OrbitVideo, hull: Hull, *, resolution: int = 256, target_faces: int = 20_000
) -> Generator[Progress | Warned, None, Mesh]:
    """Yields a Progress per depth map and step; returns a watertight Mesh, consistently wound, on the splats' device.

    The last Progress has figures: faces, and decimation_error, the root mean square distance of the decimated mesh from
    the surface that was found, over its diagonal.

    video: gives the cameras, the size of the depth maps and, where it has them, the masks whose outlines the mesh is
    moved onto. resolution: voxels along each side of the cube around
    the hull. target_faces: what the surface is decimated to; a Warned tells where the result had to keep more, since
    fewer faces would have left it open.
    Raises ValueError for a resolution below 8, fewer than 4 faces, no splats or an empty hull.
    """
    if resolution < 8:
        raise ValueError(f"resolution: expected at least 8 voxels, got {resolution}")
    if target_faces < 4:
        raise ValueError(f"target_faces: expected at least 4, got {target_faces}")
    if len(splats) == 0:
        raise ValueError("splats: expected at least one, got none")
    if not hull.occupancy.any():
        raise ValueError("hull: expected occupied voxels, got an empty hull")
    with torch.no_grad():
        splats = splats.detach().to(torch.float32)
        half_extent = _extent(hull)
        voxel = 2 * half_extent / resolution
        rings = _rings(video.orbit)
        size, steps = min(video.size, 2 * resolution), len(video.orbit) + len(rings) + 3

        planes = _Planes.of(splats)
        views = []
        for camera in range(len(video.orbit)):
            views.append(_depth_map(planes, _view(video.orbit, camera, size), None, TRUNCATION * voxel))
            yield Progress(STAGE, len(views), steps)
        outward = _outward(planes, views, video.orbit, size, hull, voxel)
        for camera in range(len(rings)):
            views.append(_depth_map(planes, _view(rings, camera, size), outward, TRUNCATION * voxel))
            yield Progress(STAGE, len(views), steps)

        device = splats.means.device
        viewmats = torch.cat([video.orbit.world_to_camera(), rings.world_to_camera()]).to(device)
        Ks = torch.cat([video.orbit.intrinsics(size), rings.intrinsics(size)]).to(device)
        depths, weights = (torch.stack(maps) for maps in zip(*views, strict=True))
        tsdf, weight = tsdf_fuse(depths, weights, viewmats, Ks, resolution, half_extent, TRUNCATION * voxel)
        field = _completed(tsdf, weight, hull, half_extent)
        yield Progress(STAGE, steps - 2, steps)

        field = _bordered(_smoothed(field))
        vertices, faces = _solid(*marching_cubes(field))
        if len(faces) == 0:
            raise ValueError("splats: expected a surface inside the hull, got an empty volume")
        vertices = (vertices + 0.5) * voxel - half_extent
        yield Progress(STAGE, steps - 1, steps)

        mesh, count = _decimated(vertices, faces, target_faces), len(faces)
        if mesh is None:
            yield Warned(STAGE, f"decimation to {target_faces} faces left the surface open; all {count} faces are kept")
            mesh = Mesh(vertices, faces)
        error = _distance(mesh, field, voxel, half_extent) / float((vertices.amax(0) - vertices.amin(0)).norm())
        if video.alpha is not None:
            mesh = snapped(mesh, video.alpha, video.orbit)
        yield Progress(STAGE, steps, steps, {"faces": float(len(mesh.faces)), "decimation_error": error})
        return mesh


def is_closed(mesh: Mesh) -> bool:
    """Whether each edge belongs to two faces that run along it in opposite ways, and the volume is positive."""
    solid = trimesh.Trimesh(mesh.vertices.cpu().numpy(), mesh.faces.cpu().numpy(), process=False)
    return bool(solid.is_watertight and solid.is_winding_consistent and solid.volume > 0)


@dataclass(frozen=True)
class _Planes:
    """Splats as what the depth maps need: activated, with unit shortest axes and how flat (0 to 1) each one is."""

    means: torch.Tensor
    quats: torch.Tensor
    scales: torch.Tensor
    opacities: torch.Tensor
    axes: torch.Tensor
    flatness: torch.Tensor

    @classmethod
    def of(cls, splats: Splats) -> "_Planes":
        scales = splats.scales
        (shortest, middle, _), order = scales.sort(dim=1)[0].unbind(1), scales.argmin(1)
        w, x, y, z = F.normalize(splats.quats, dim=1).unbind(1)
        columns = torch.stack(
            [
                torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)], 1),
                torch.stack([2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)], 1),
                torch.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], 1),
            ],
            1,
        )  # (N, axis, xyz)
        axes = columns[torch.arange(len(splats), device=order.device), order]
        flatness = (1 - (shortest / middle.clamp(min=1e-12)).square())[:, None]
        return cls(splats.means, splats.quats, scales, splats.opacities, axes, flatness)

    def facing(self, direction: torch.Tensor) -> torch.Tensor:
        """(N, 3) unit normals on the side of `direction`; a splat that is no disc has no side and faces along it."""
        axes = self.axes * (self.axes * direction).sum(1, keepdim=True).sign()
        return F.normalize(self.flatness * axes + (1 - self.flatness) * direction, dim=1)


def _extent(hull: Hull) -> float:
    """Half the side of the smallest centred cube that holds the hull with some room, at most the hull's own."""
    occupied = hull.occupancy.nonzero()
    size = hull.occupancy.shape[0]
    reach = torch.maximum(occupied.max() + 1 - size / 2, size / 2 - occupied.min())
    return min(hull.half_extent, (float(reach) * 1.04 + 2) * 2 * hull.half_extent / size)


def _rings(orbit: Orbit) -> Orbit:
    elevations = [elevation for elevation, count in RINGS for _ in range(count)]
    azimuths = [360.0 * k / count for _, count in RINGS for k in range(count)]
    return Orbit(torch.tensor(elevations), torch.tensor(azimuths), orbit.radius, orbit.fov)


def _view(orbit: Orbit, camera: int, size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    return orbit.world_to_camera()[camera], orbit.intrinsics(size)[camera], size


def _depth_map(planes: _Planes, view, outward: torch.Tensor | None, tolerance: float):
    """Depth (H, W) and weight (H, W) of one camera; weights fall with the slant and where depths disagree.

    With `outward` (N, 3) given, only surfaces seen from their outer side count and empty pixels tell nothing: a
    camera that looks at what the orbit never saw may look through a hole onto the far wall's back.
    """
    means, (viewmat, K, size) = planes.means, view
    viewmat, K = viewmat.to(means), K.to(means)
    origin = -viewmat[:3, :3].T @ viewmat[:3, 3]
    toward = F.normalize(origin - means, dim=1)
    normals = planes.facing(toward)
    distances = (normals * (means - origin)).sum(1, keepdim=True)
    middle = origin.norm()
    z = means @ viewmat[2, :3, None] + viewmat[2, 3] - middle  # small numbers, whose squares stay exact
    front = torch.ones_like(z) if outward is None else (4 * (outward * toward).sum(1, keepdim=True)).clamp(-1, 1)
    first, alpha = splat_raster(
        means, planes.quats, planes.scales, planes.opacities, z, viewmat[None], K[None], size, size
    )
    alpha = alpha[0, ..., 0]
    frontmost = first[0, ..., 0] / alpha.clamp(min=1e-6)
    column, row = _pixels(means, viewmat, K, size)
    visible = (z < frontmost[row, column, None] + tolerance).to(z)
    channels = torch.cat([normals, distances, z, z.square(), front, torch.ones_like(z)], 1) * visible
    image, _ = splat_raster(
        means, planes.quats, planes.scales, planes.opacities, channels, viewmat[None], K[None], size, size
    )
    image, shown = image[0].split([7, 1], -1)
    normal, distance, mean, square, front = (image / shown.clamp(min=1e-6)).split([3, 1, 1, 1, 1], -1)

    pixel = torch.arange(size, device=alpha.device) + 0.5
    v, u = torch.meshgrid(pixel, pixel, indexing="ij")
    ray = torch.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], torch.ones_like(u)], -1) @ viewmat[:3, :3]
    slope = (normal * ray).sum(-1)
    center = mean[..., 0] + middle
    depth = torch.where(slope < -0.05, distance[..., 0] / slope.clamp(max=-0.05), center)
    depth = depth.clamp(center - tolerance, center + tolerance)
    variance = (square - mean.square())[..., 0].clamp(min=0)
    facing = torch.minimum((-slope / ray.norm(dim=-1)).clamp(0, 1), _cosine(depth, K[0, 0]))
    weight = facing * torch.exp(-variance / tolerance**2)
    weight = weight * (front[..., 0] > 0.3) * ((alpha - OPAQUE) / (1 - OPAQUE)).clamp(0, 1)
    if outward is None:
        weight = torch.where(alpha < CLEAR, CLEAR_WEIGHT, weight)
    return torch.where(alpha < CLEAR, torch.inf, depth), weight


def _pixels(means: torch.Tensor, viewmat: torch.Tensor, K: torch.Tensor, size: int):
    """Columns (N,) and rows (N,) of the pixels that points (N, 3) project to, or the nearest ones."""
    camera = means @ viewmat[:3, :3].T + viewmat[:3, 3]
    column, row = (K[:2, :2] @ camera[:, :2].T / camera[:, 2] + K[:2, 2:]).floor().long().clamp(0, size - 1)
    return column, row


def _cosine(depth: torch.Tensor, focal: torch.Tensor) -> torch.Tensor:
    """How much a depth map faces the camera, by its flatter side at each pixel: round splats have no normals."""
    steps = []
    for axis in (0, 1):
        step = depth.diff(dim=axis).abs()
        edge = torch.full_like(depth.narrow(axis, 0, 1), torch.inf)
        steps.append(torch.minimum(torch.cat([edge, step], axis), torch.cat([step, edge], axis)))
    return (1 + (steps[0].square() + steps[1].square()) * (focal / depth) ** 2).rsqrt()


def _outward(planes: _Planes, views, orbit: Orbit, size: int, hull: Hull, voxel: float) -> torch.Tensor:
    """(N, 3) unit vectors to the side that the orbit's cameras saw each splat from; out of the hull if none did."""
    means = planes.means
    seen_from = torch.zeros_like(means)
    for (depth, _), pose, K in zip(views, orbit.camera_to_world(), orbit.intrinsics(size), strict=True):
        pose, K = pose.to(means), K.to(means)
        camera = (means - pose[:3, 3]) @ pose[:3, :3]
        column, row = (K[:2, :2] @ camera[:, :2].T / camera[:, 2] + K[:2, 2:]).floor().long().clamp(0, size - 1)
        visible = camera[:, 2:] < depth[row, column, None] + 2 * voxel
        seen_from += visible * F.normalize(pose[:3, 3] - means, dim=1)
    field, step = hull.field.to(means), torch.eye(3, device=means.device) * hull.voxel
    local = Hull(hull.occupancy.to(means.device), field, hull.half_extent)
    gradient = torch.stack([local.sample(means - s) - local.sample(means + s) for s in step], 1)
    unseen = seen_from.norm(dim=1, keepdim=True) < 0.1
    return planes.facing(F.normalize(torch.where(unseen, gradient, seen_from), dim=1))


def _completed(tsdf: torch.Tensor, weight: torch.Tensor, hull: Hull, half_extent: float) -> torch.Tensor:
    """The fused field inside the hull (a voxel of slack), and the hull's own where no camera saw anything."""
    size = len(tsdf)
    voxel = 2 * half_extent / size
    axis = (torch.arange(size, device=tsdf.device) + 0.5) * voxel - half_extent
    local = Hull(hull.occupancy.to(tsdf.device), hull.field.to(tsdf), hull.half_extent)
    completed = torch.empty_like(tsdf)
    slab = max(1, SLAB_POINTS // size**2)
    for x in (slice(start, start + slab) for start in range(0, size, slab)):
        points = torch.stack(torch.meshgrid(axis[x], axis, axis, indexing="ij"), -1)
        outside = (-local.sample(points) / (TRUNCATION * voxel)).clamp(-1, 1)
        trust = weight[x] / (weight[x] + UNSURE)
        completed[x] = torch.lerp(outside, torch.maximum(tsdf[x], outside - 1 / TRUNCATION), trust)
    return completed


def _smoothed(field: torch.Tensor) -> torch.Tensor:
    """The field after a Gaussian of SMOOTHING voxels."""
    radius = int(3 * SMOOTHING) + 1
    offsets = torch.arange(-radius, radius + 1, device=field.device)
    gaussian = torch.exp(-0.5 * (offsets / SMOOTHING) ** 2)
    taps = (gaussian / gaussian.sum()).tolist()
    for axis in range(3):
        first, last = field.narrow(axis, 0, 1), field.narrow(axis, len(field) - 1, 1)
        padded = torch.cat([first] * radius + [field] + [last] * radius, axis)
        field = torch.zeros_like(field)
        for k, tap in enumerate(taps):
            field.add_(padded.narrow(axis, k, len(field)), alpha=tap)
    return field


def _bordered(field: torch.Tensor) -> torch.Tensor:
    """The field with its border outside, so that the surface closes."""
    for axis in range(3):
        for end in (0, len(field) - 1):
            field.select(axis, end).clamp_(min=0.5)
    return field


def _solid(vertices: torch.Tensor, faces: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The surface without specks and without voids: components of too small, or negative, volume are dropped."""
    if len(faces) == 0:
        return vertices, faces
    points, triangles = vertices.cpu().numpy(), faces.cpu().numpy()
    start, end = triangles[:, [0, 1]].T
    start, end = np.concatenate([start, end]), np.concatenate([end, triangles[:, 2]])
    graph = sparse.coo_array((np.ones(len(start), np.int8), (start, end)), shape=(len(points),) * 2)
    count, label = csgraph.connected_components(graph, directed=False)
    if count == 1:
        return vertices, faces
    a, b, c = (points[triangles[:, k]].astype(np.float64) for k in range(3))
    volumes = np.bincount(label[triangles[:, 0]], (a * np.cross(b, c)).sum(1) / 6, count)
    kept = volumes >= SMALLEST * volumes.max()
    keep = kept[label]
    index = np.cumsum(keep) - 1
    triangles = index[triangles[keep[triangles[:, 0]]]].astype(np.int32)
    device = vertices.device
    return torch.from_numpy(points[keep]).to(device), torch.from_numpy(triangles).to(device)


def _decimated(vertices: torch.Tensor, faces: torch.Tensor, target_faces: int) -> Mesh | None:
    """The mesh with at most `target_faces` faces, still closed; with more where that fails, None if all attempts do."""
    if len(faces) <= target_faces:
        return Mesh(vertices, faces)
    points, triangles = vertices.cpu().numpy(), faces.cpu().numpy()
    beyond = (target_faces + len(faces)) // 2
    for target, most in [*((max(4, int(share * target_faces)), target_faces) for share in FEWER), (beyond, len(faces))]:
        new_points, new_triangles = parted(*fast_simplification.simplify(points, triangles, target_count=target))
        mesh = Mesh(
            torch.from_numpy(new_points.astype(np.float32)).to(vertices.device),
            torch.from_numpy(new_triangles.astype(np.int32)).to(faces.device),
        )
        if len(mesh.faces) <= most and is_closed(mesh):
            return mesh
    return None


def _distance(mesh: Mesh, field: torch.Tensor, voxel: float, half_extent: float) -> float:
    """Root mean square distance of a mesh's vertices and face centres from the zero level of a field (R, R, R) around
    it, to first order: the field's value over its slope. World units."""
    corners = mesh.vertices[mesh.faces.long()]
    points = torch.cat([mesh.vertices, corners.mean(1)])
    steps = 0.5 * voxel * torch.eye(3, device=points.device)
    ahead, behind = (_sampled(field, (points[:, None] + step).view(-1, 3), half_extent) for step in (steps, -steps))
    slope = ((ahead - behind) / voxel).view(-1, 3).norm(dim=1)
    distance = _sampled(field, points, half_extent) / slope.clamp(min=1e-6)
    return float(distance.clamp(-voxel * TRUNCATION, voxel * TRUNCATION).square().mean().sqrt())


def _sampled(field: torch.Tensor, points: torch.Tensor, half_extent: float) -> torch.Tensor:
    """(N,) the field (R, R, R), whose voxels' centres fill the cube, at points (N, 3), trilinearly."""
    grid = (points / half_extent).flip(-1)[None, None, None]
    return F.grid_sample(field[None, None], grid, padding_mode="border", align_corners=False).flatten()
