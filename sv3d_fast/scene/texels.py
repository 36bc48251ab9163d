"""The texels of a texture that a mesh's faces cover, and what surrounds them."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from sv3d_fast.kernels.mesh_raster import mesh_raster
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.scene.silhouettes import vertex_normals


@dataclass(frozen=True)
class Texels:
    """The texels that faces cover: index = row * resolution + column (P,), world positions and normals (P, 3).

    corners: (P, 3) the vertices around each one, and weights: (P, 3) its barycentrics.
    """

    index: torch.Tensor
    corners: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    normals: torch.Tensor

    @classmethod
    def of(cls, mesh: Mesh, resolution: int) -> "Texels":
        assert mesh.uvs is not None
        device = mesh.vertices.device
        u, v = mesh.uvs.reshape(-1, 2).unbind(1)
        layout = torch.stack([u * resolution, (1 - v) * resolution, torch.ones_like(u)], 1)  # one unit before a camera
        corners = torch.arange(len(layout), dtype=torch.int32, device=device).view(-1, 3)
        eye = torch.eye(4, device=device)[None]
        ids, weights, _ = mesh_raster(layout, corners, eye, eye[:, :3, :3].contiguous(), resolution, resolution)
        index = (ids.flatten() >= 0).nonzero()[:, 0]
        if len(index) == 0:
            raise ValueError(f"resolution: expected texels inside the mesh's faces, got none at {resolution}")
        first, second = weights.reshape(-1, 2)[index].unbind(1)
        weight = torch.stack([first, second, 1 - first - second], 1)
        corners = mesh.faces.long()[ids.flatten()[index].long()]
        positions = (mesh.vertices[corners] * weight[..., None]).sum(1)
        normals = F.normalize((vertex_normals(mesh)[corners] * weight[..., None]).sum(1), dim=1)
        return cls(index, corners, weight, positions, normals)


def padded(index: torch.Tensor, color: torch.Tensor, resolution: int) -> torch.Tensor:
    """The texture (R, R, 3) uint8; texels outside all charts repeat the nearest one, so that mipmaps don't bleed."""
    image = np.zeros((resolution * resolution, 3), np.uint8)
    image[index.cpu().numpy()] = (color.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    empty = np.ones(resolution * resolution, bool)
    empty[index.cpu().numpy()] = False
    nearest = ndimage.distance_transform_edt(
        empty.reshape(resolution, resolution), return_distances=False, return_indices=True
    )
    texture = image.reshape(resolution, resolution, 3)[nearest[0], nearest[1]]
    return torch.from_numpy(texture).to(index.device)
