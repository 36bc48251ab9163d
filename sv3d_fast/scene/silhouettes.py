"""Moves a mesh onto the silhouettes of its frames.

Splats blur what they show, so a surface taken from them stands a pixel or two inside the outlines. Where the mesh is
seen edge-on, the distance from its outline to the mask's tells how far its vertices should move along their normals;
elsewhere the displacement is a smooth one that agrees and stays small: a screened Poisson equation on the edges.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from sv3d_fast.camera import Orbit
from sv3d_fast.kernels.mesh_raster import mesh_raster

from .mesh import Mesh

ROUNDS = 2
STIFFNESS = 2.0  # of an edge against the evidence of one outline pixel
ANCHOR = 0.3  # of a vertex to its place: what no outline touches moves less the further it lies from one
WINDOW = 4  # pixels: outlines that lie further apart belong to different parts, or the views disagree
ITERATIONS = 50  # of conjugate gradients


def snapped(mesh: Mesh, alpha: torch.Tensor, orbit: Orbit) -> Mesh:
    """The mesh with vertices moved along their normals so that its outlines fit masks alpha (T, S, S) in [0, 1].

    Runs on the mesh's device. Raises ValueError for masks that are not one for each camera.
    """
    if alpha.ndim != 3 or len(alpha) != len(orbit) or alpha.shape[1] != alpha.shape[2]:
        raise ValueError(f"alpha: expected ({len(orbit)}, S, S), one mask for each camera, got {tuple(alpha.shape)}")
    masks = alpha.to(mesh.vertices.device) >= 0.5
    faces = mesh.faces.long()
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).T
    edges = torch.cat([edges, edges.flip(0)], 1)  # both ways; twice in all for an edge of two faces
    for _ in range(ROUNDS):
        normals = vertex_normals(mesh)
        evidence, pull = _evidence(mesh, normals, masks, orbit)
        displacement = _screened_poisson(evidence + ANCHOR, pull, edges)
        mesh = replace(mesh, vertices=mesh.vertices + displacement[:, None] * normals)
    return mesh


def vertex_normals(mesh: Mesh) -> torch.Tensor:
    """(V, 3) unit normals, the mean of the faces around weighted by area."""
    corners = mesh.vertices[mesh.faces.long()]
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    total = torch.zeros_like(mesh.vertices)
    for corner in range(3):
        total.index_add_(0, mesh.faces[:, corner].long(), normals)
    return F.normalize(total, dim=1)


def _evidence(
    mesh: Mesh, normals: torch.Tensor, masks: torch.Tensor, orbit: Orbit
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per vertex (V,) the sum of squared leverages, and of leverage times wanted motion of the outline, world units."""
    device, size = masks.device, masks.shape[-1]
    cameras = orbit.world_to_camera().to(device), orbit.intrinsics(size).to(device)
    ids, weights, depth = mesh_raster(mesh.vertices, mesh.faces, *cameras, size, size)
    covered = ids >= 0
    rim = covered & F.max_pool2d((~covered).float()[:, None], 3, 1, 1)[:, 0].bool()
    view, row, column = rim.nonzero(as_tuple=True)

    reach = torch.arange(-WINDOW, WINDOW + 1, device=device)
    down, right = (g.flatten() for g in torch.meshgrid(reach, reach, indexing="ij"))
    rows, columns = row[:, None] + down, column[:, None] + right
    framed = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    near = (view[:, None], rows.clamp(0, size - 1), columns.clamp(0, size - 1))
    own, mask, here = covered[near] & framed, masks[near] & framed, masks[rim]
    length = (down.square() + right.square()).sqrt()
    gap = torch.where(mask != here[:, None], length, torch.inf).amin(1) - 0.5  # the outline runs between pixels
    own_gap = torch.where(own, torch.inf, length).amin(1) - 0.5
    motion = torch.where(here, gap, -gap) - own_gap

    pose = orbit.camera_to_world().to(device)[view]
    outward = -(own.float() @ torch.stack([right, down], 1).float())
    outward = F.normalize(outward[:, :1] * pose[:, :3, 0] + outward[:, 1:] * pose[:, :3, 1], dim=1)
    first, second = weights[rim].unbind(1)
    corner = torch.stack([first, second, 1 - first - second], 1).argmax(1)
    vertex = mesh.faces[ids[rim].long(), corner].long()
    leverage = (normals[vertex] * outward).sum(1)
    usable = (gap < WINDOW) & framed.all(1) & (leverage > 0)
    leverage = torch.where(usable, leverage, 0)
    motion = torch.where(usable, motion * depth[rim] / orbit.focal(size), 0)
    evidence, pull = torch.zeros_like(normals[:, 0]), torch.zeros_like(normals[:, 0])
    return evidence.index_add_(0, vertex, leverage.square()), pull.index_add_(0, vertex, leverage * motion)


def _screened_poisson(screen: torch.Tensor, pull: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """(V,) x of (diag(screen) + STIFFNESS * Laplacian) x = pull, by conjugate gradients scaled by the diagonal.

    edges: (2, E) start and end of every edge, in both directions.
    """
    start, end = edges
    diagonal = screen + STIFFNESS * torch.zeros_like(screen).index_add_(
        0, start, torch.ones_like(start, dtype=screen.dtype)
    )

    def apply(x):
        return diagonal * x - STIFFNESS * torch.zeros_like(x).index_add_(0, start, x[end])

    x = pull / diagonal
    residual = pull - apply(x)
    scaled = residual / diagonal
    direction, energy = scaled, residual @ scaled
    for _ in range(ITERATIONS):
        image = apply(direction)
        step = energy / (direction @ image).clamp(min=1e-30)
        x, residual = x + step * direction, residual - step * image
        scaled = residual / diagonal
        before, energy = energy, residual @ scaled
        direction = scaled + energy / before.clamp(min=1e-30) * direction
    return x
