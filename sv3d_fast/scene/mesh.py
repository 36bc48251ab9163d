"""Mesh: the container of a triangle mesh with an optional texture."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh in world coordinates (z up); faces wind counter-clockwise seen from outside.

    vertices: (V, 3) float32. faces: (F, 3) int32 indices into vertices.
    uvs: (F, 3, 2) float32 texture coordinates of each face corner, u right, v up, in [0, 1]; None without texture.
    texture: (R, R, 3) uint8 sRGB albedo, row 0 at v = 1 (top); None without texture.
    colors: (V, 3) uint8 sRGB vertex colours; None without.
    Texture coordinates belong to face corners, so that seams do not split vertices and the surface stays welded.
    """

    vertices: torch.Tensor
    faces: torch.Tensor
    uvs: torch.Tensor | None = None
    texture: torch.Tensor | None = None
    colors: torch.Tensor | None = None

    def __post_init__(self):
        v, f = self.vertices, self.faces
        if v.ndim != 2 or v.shape[1] != 3 or v.dtype != torch.float32:
            raise ValueError(f"vertices: expected float32 (V, 3), got {v.dtype} {tuple(v.shape)}")
        if f.ndim != 2 or f.shape[1] != 3 or f.dtype != torch.int32:
            raise ValueError(f"faces: expected int32 (F, 3), got {f.dtype} {tuple(f.shape)}")
        if len(f) and (int(f.min()) < 0 or int(f.max()) >= len(v)):
            raise ValueError(f"faces: expected indices in [0, {len(v)}), got {int(f.min())}..{int(f.max())}")
        if self.uvs is not None and tuple(self.uvs.shape) != (len(f), 3, 2):
            raise ValueError(f"uvs: expected shape ({len(f)}, 3, 2), got {tuple(self.uvs.shape)}")
        if self.texture is not None and (self.texture.dtype != torch.uint8 or self.texture.ndim != 3):
            raise ValueError(f"texture: expected uint8 (R, R, 3), got {self.texture.dtype} {tuple(self.texture.shape)}")
        if self.colors is not None and tuple(self.colors.shape) != (len(v), 3):
            raise ValueError(f"colors: expected shape ({len(v)}, 3), got {tuple(self.colors.shape)}")
