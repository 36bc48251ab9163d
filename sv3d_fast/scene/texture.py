"""Texture of a mesh from the frames of an orbit: every texel takes its colour from the views that see it best.

Views of a generated orbit disagree a little, so a plain mean ghosts: weights fall steeply with the slant, and views
that disagree with the best ones are left out. Silhouettes are avoided, where pixels mix with the background.
"""

from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from scipy.sparse.linalg import factorized
from scipy.spatial import cKDTree

from sv3d_fast.events import Progress, Warned, finish
from sv3d_fast.kernels.mesh_raster import mesh_raster
from sv3d_fast.scene.masks import foreground
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.scene.splats import Splats
from sv3d_fast.scene.texels import Texels, padded
from sv3d_fast.scene.unwrap import unwrap
from sv3d_fast.video import OrbitVideo

STAGE = "texture"
CHUNK = 1 << 16  # texels projected at a time, to bound memory
SLANT_POWER = 6  # weight = cosine to this power, so that the best views dominate
INPUT_WEIGHT = 8.0  # of the last frame, the input view: the one that is a photograph, not a prediction
SURE = 0.25  # cosine of the best view from which a texel's projected colour stands alone
DISAGREEMENT = 0.12  # colour distance from the best views at which a view's weight falls to 1/e
GAIN_TEXELS, GAIN_ROUNDS, GAIN_MOST = 1 << 14, 8, 1.25  # of the views' exposures: sample, alternations, bound
FEATHER = 2  # pixels over which the weight rises, after the one next to an outline, which is not used
JUMP, DEPTH_TOLERANCE = 8.0, 3.0  # pixel footprints: a depth step that is an outline; how exactly a texel must be hit
NEIGHBOURS, FAINT = 8, 0.1  # splats that an unseen vertex's colour is blended from, and the opacity they need
PRIOR = 1e-6  # pull of the mean colour on unseen vertices, for parts of a mesh that no view sees at all


def bake(
    mesh: Mesh, video: OrbitVideo, *, resolution: int = 1024, splats: Splats | None = None, xatlas: float = 0.0
) -> Mesh:
    """The whole of `baking` at once."""
    return finish(baking(mesh, video, resolution=resolution, splats=splats, xatlas=xatlas))


def baking(
    mesh: Mesh, video: OrbitVideo, *, resolution: int = 1024, splats: Splats | None = None, xatlas: float = 0.0
) -> Generator[Progress | Warned, None, Mesh]:
    """Yields a Progress per step; returns the mesh with uvs and a texture (resolution, resolution, 3) uint8.

    A mesh that has uvs keeps them; another is unwrapped by projection onto a cube, which renders as well as xatlas's
    larger charts and takes a fraction of the time, or by xatlas if it ends within `xatlas` seconds; a Warned tells if
    it doesn't. Texels that no view sees take the colour of the nearest `splats` if given, else one interpolated along
    the surface. Runs on the mesh's device. Raises ValueError for a resolution outside 16 to 8192, a mesh without
    faces, frames without an object and, without splats, for a mesh that no view sees.
    """
    if not 16 <= resolution <= 8192:
        raise ValueError(f"resolution: expected 16 to 8192 texels, got {resolution}")
    if len(mesh.faces) == 0:
        raise ValueError("mesh: expected at least one face, got none")
    if mesh.uvs is None:
        layout = unwrap(mesh.vertices.cpu(), mesh.faces.cpu(), time_limit=xatlas)
        if xatlas > 0 and layout.method != "xatlas":
            yield Warned(STAGE, f"unwrapped by cube projection: {layout.why}")
        mesh = replace(mesh, uvs=torch.from_numpy(layout.uvs).to(mesh.vertices.device))
    texels = Texels.of(mesh, resolution)
    chunks = texels.index.split(CHUNK)
    steps = len(chunks) + 3
    yield Progress(STAGE, 1, steps)

    views = _views(mesh, video)
    views[:, :3] *= _gains(texels, views, video)[..., None, None]
    colors, certainty = [], []
    for step, (position, normal) in enumerate(
        zip(texels.positions.split(CHUNK), texels.normals.split(CHUNK), strict=True), 2
    ):
        color, sure = _projected(position, normal, views, video)
        colors.append(color)
        certainty.append(sure)
        yield Progress(STAGE, step, steps)
    color, sure = torch.cat(colors), torch.cat(certainty)
    around = _splat_colors(mesh, splats) if splats else _vertex_colors(mesh, texels, color, sure)
    color = torch.lerp((around[texels.corners] * texels.weights[..., None]).sum(1), color, sure[:, None])
    yield Progress(STAGE, steps - 1, steps)

    texture = padded(texels.index, color, resolution)
    yield Progress(STAGE, steps, steps, {"seen": float((sure > 0).float().mean())})
    return replace(mesh, texture=texture)


def _views(mesh: Mesh, video: OrbitVideo) -> torch.Tensor:
    """(T, 5, H, W): red, green, blue, the mesh's depth, and how far a pixel is from outlines, 0 to 1."""
    device, size = mesh.vertices.device, video.size
    cameras = video.orbit.world_to_camera().to(device), video.orbit.intrinsics(size).to(device)
    _, _, depth = mesh_raster(mesh.vertices, mesh.faces, *cameras, size, size)
    depth = depth.nan_to_num(posinf=1e3)[:, None]
    far, near = F.max_pool2d(depth, 3, 1, 1), -F.max_pool2d(-depth, 3, 1, 1)
    whole = (far - near < JUMP * _footprint(video)) & (foreground(video).to(device)[:, None] > 0.9)
    outside, trust = F.pad(~whole, (1,) * 4, value=True).float(), torch.zeros_like(depth)
    for _ in range(FEATHER):
        outside = F.max_pool2d(outside, 3, 1, 1)
        trust += (1 - outside[..., 1:-1, 1:-1]) / FEATHER
    return torch.cat([video.colors().to(device).permute(0, 3, 1, 2), depth, trust], 1)


def _footprint(video: OrbitVideo) -> float:
    """Size of a pixel at the object, world units."""
    return video.orbit.radius / video.orbit.focal(video.size)


def _seen(position, normal, views, video: OrbitVideo) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of texels (P, 3) in each view: colours (T, 3, P), cosines (T, P) of the slant, and trust (T, P), 0 to 1."""
    pose = video.orbit.world_to_camera().to(position)
    focal = video.orbit.focal(video.size)
    camera = position @ pose[:, :3, :3].mT + pose[:, None, :3, 3]  # (T, P, 3)
    z = camera[..., 2].clamp(min=1e-6)
    grid = camera[..., :2] * (2 * focal / video.size) / z[..., None]
    sampled = F.grid_sample(views, grid[:, :, None], align_corners=False, padding_mode="zeros")[..., 0]
    color, depth, trust = sampled[:, :3], sampled[:, 3], sampled[:, 4]
    toward = video.orbit.camera_to_world().to(position)[:, None, :3, 3] - position
    cosine = (torch.einsum("tpc,pc->tp", toward, normal) * toward.square().sum(-1).rsqrt()).clamp(min=0)
    hit = (z - depth).abs() < DEPTH_TOLERANCE * _footprint(video)
    return color, cosine, trust * hit


def _gains(texels: "Texels", views: torch.Tensor, video: OrbitVideo) -> torch.Tensor:
    """(T, 3) what each view's colours are multiplied by to agree best with what all views show, 1 on average.

    Alternates between the texels' mean colours and least squares for the gains, on a part of the texels.
    """
    part = slice(None, None, max(1, len(texels.index) // GAIN_TEXELS))
    color, cosine, trust = _seen(texels.positions[part], texels.normals[part], views, video)
    weight = (cosine * trust)[:, None]
    energy = (weight * color.square()).sum(2)
    known = energy > 1e-3 * energy.amax()
    gains = torch.ones_like(energy)
    for _ in range(GAIN_ROUNDS):
        mean = (weight * color * gains[..., None]).sum(0) / weight.sum(0).clamp(min=1e-6)
        gains = torch.where(known, (weight * color * mean).sum(2) / energy.clamp(min=1e-12), 1)
        gains = gains / gains.mean(0)
    return gains.clamp(1 / GAIN_MOST, GAIN_MOST)


def _projected(position, normal, views, video: OrbitVideo) -> tuple[torch.Tensor, torch.Tensor]:
    """Colours (P, 3) from the views, and certainty (P,): 0 where no view sees a texel, 1 where one sees it well."""
    color, cosine, trust = _seen(position, normal, views, video)
    weight = cosine**SLANT_POWER * trust + 1e-20
    weight[-1] *= INPUT_WEIGHT
    best = (color * weight[:, None].square()).sum(0) / weight[:, None].square().sum(0).clamp(min=1e-38)
    weight = weight * torch.exp((color - best).square().sum(1) / -(DISAGREEMENT**2))
    blended = (color * weight[:, None]).sum(0) / weight[:, None].sum(0).clamp(min=1e-38)
    return blended.T, ((cosine * trust).amax(0) / SURE).clamp(max=1)


def _vertex_colors(mesh: Mesh, texels: Texels, color: torch.Tensor, sure: torch.Tensor) -> torch.Tensor:
    """(V, 3) colours that agree with the certain texels and vary as little as they can along edges elsewhere.

    The minimum of the sum over vertices of evidence * (x - mean)^2 plus that over edges of the squared difference.
    """
    if not sure.any():
        raise ValueError("mesh: expected a surface that some frame shows, got one that no camera sees")
    corners, count = texels.corners.cpu().numpy(), len(mesh.vertices)
    evidence = (texels.weights * sure[:, None].square()).cpu().numpy().astype(np.float64)
    known = np.bincount(corners.ravel(), evidence.ravel(), count)
    values = color.cpu().numpy().astype(np.float64)
    sums = [np.bincount(corners.ravel(), (evidence * channel[:, None]).ravel(), count) for channel in values.T]
    mean = np.array([channel.sum() for channel in sums]) / known.sum()

    faces = mesh.faces.cpu().numpy()
    start, end = faces[:, [0, 1, 2]].ravel(), faces[:, [1, 2, 0]].ravel()
    edges = sparse.coo_array((np.ones(len(start)), (start, end)), shape=(count, count)).tocsr()
    edges = edges + edges.T
    degree = np.asarray(edges.sum(1)).ravel()
    system = sparse.diags_array(known + degree + PRIOR).tocsr() - edges
    solve = factorized(system.tocsc())
    return torch.from_numpy(np.stack([solve(b + PRIOR * m) for b, m in zip(sums, mean, strict=True)], 1)).to(color)


def _splat_colors(mesh: Mesh, splats: Splats) -> torch.Tensor:
    """(V, 3) colours of the nearest splats that are not faint, blended by the inverse of the distance."""
    solid = splats.opacities >= min(FAINT, float(splats.opacities.max()))
    means, colors = splats.means[solid].detach().cpu().numpy(), splats.colors[solid].detach().clamp(0, 1)
    count = min(NEIGHBOURS, len(means))
    distance, index = cKDTree(means).query(mesh.vertices.cpu().numpy(), k=[*range(1, count + 1)])
    weight = 1 / np.maximum(distance, 1e-6)
    weight = torch.from_numpy(weight / weight.sum(1, keepdims=True)).to(colors)
    return (colors[torch.from_numpy(index).to(colors.device)] * weight[..., None]).sum(1).to(mesh.vertices)
