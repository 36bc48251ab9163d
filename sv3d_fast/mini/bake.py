"""Bakes the materials of a model into one small atlas."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .obj import ObjModel

MAX_TILES = 2  # how many repeats of a tiling texture one face may span; denser ones are stretched to that
SOURCE_SIDE = 512  # textures are shrunk to this before anything else is done with them
GRID = 8  # patches start and end on blocks of JPEG, so that neighbours do not bleed into each other
PAD = 2  # texels of a patch's own edge around it, for bilinear sampling


@dataclass(frozen=True)
class _Patch:
    """A part of the atlas: the faces that use it, their uvs, and the picture region [low, high] they cover."""

    faces: np.ndarray
    uvs: np.ndarray
    low: np.ndarray
    high: np.ndarray
    picture: np.ndarray | None  # (H, W, 3) uint8, None for a plain colour
    color: tuple[int, int, int]
    share: float

    def native(self) -> tuple[float, float]:
        """Width and height in texels at which nothing of the picture is lost."""
        if self.picture is None:
            return (1.0, 1.0)
        h, w = self.picture.shape[:2]
        return max(1.0, (self.high[0] - self.low[0]) * w), max(1.0, (self.high[1] - self.low[1]) * h)


def open_texture(file) -> np.ndarray:
    """Reads a picture as (H, W, 3) uint8, at most SOURCE_SIDE wide and high; transparent texels take the mean colour
    of the opaque ones, since the renderer has no transparency."""
    picture = Image.open(file)
    picture.thumbnail((SOURCE_SIDE, SOURCE_SIDE), Image.Resampling.BOX)
    rgba = np.asarray(picture.convert("RGBA"))
    alpha = rgba[..., 3:].astype(np.float32) / 255
    mean = (rgba[..., :3] * alpha).sum((0, 1)) / max(float(alpha.sum()), 1e-6)
    return (rgba[..., :3] * alpha + mean * (1 - alpha) + 0.5).astype(np.uint8)


def bake(model: ObjModel, pictures: Mapping[str, np.ndarray], size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """One atlas for all materials of `model`.

    pictures: (H, W, 3) uint8 by texture name; a material whose texture is not among them is a plain colour.
    Returns uvs (F, 3, 2) float32 in [0, 1], v up, and the texture (R, R, 3) uint8, row 0 at v = 1, R <= size a
    multiple of 8. Patches get texels in proportion to the area of the surface that shows them. Textures that repeat
    are repeated in the atlas, up to MAX_TILES times across one face.
    Raises ValueError where the materials are too many for the atlas.
    """
    patches = _patches(model, pictures)
    side, boxes = _pack(patches, size)
    texture = np.full((side, side, 3), 128, np.uint8)
    uvs = np.zeros((len(model.faces), 3, 2), np.float32)
    for patch, (x, y, w, h) in zip(patches, boxes, strict=True):
        inner = (w - 2 * PAD, h - 2 * PAD)
        texture[y : y + h, x : x + w] = np.pad(_resample(patch, inner), ((PAD, PAD), (PAD, PAD), (0, 0)), mode="edge")
        unit = (patch.uvs - patch.low) / (patch.high - patch.low)
        uvs[patch.faces, :, 0] = (x + PAD + unit[..., 0] * inner[0]) / side
        uvs[patch.faces, :, 1] = 1 - (y + PAD + (1 - unit[..., 1]) * inner[1]) / side
    return uvs, texture


def _patches(model: ObjModel, pictures: Mapping[str, np.ndarray]) -> list[_Patch]:
    corners = model.vertices[model.faces]
    areas = 0.5 * np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    areas = areas / max(areas.sum(), 1e-12) + 1e-9
    groups: dict[tuple, list[int]] = {}
    for index, material in enumerate(model.palette):
        rgb = tuple(round(255 * c) for c in material.color)
        own = model.uvs[model.materials == index].reshape(-1, 2)
        textured = material.texture in pictures and len(own) > 0 and bool((own != own[0]).any())
        groups.setdefault((material.texture if textured else None, rgb), []).append(index)
    patches = []
    for (name, rgb), materials in groups.items():
        faces = np.flatnonzero(np.isin(model.materials, materials))
        if len(faces) == 0:
            continue
        share = float(areas[faces].sum())
        if name is None:
            unit = np.full((len(faces), 3, 2), 0.5)
            patches.append(_Patch(faces, unit, np.zeros(2), np.ones(2), None, rgb, share))
            continue
        # Kd tints a texture; its brightness is an exporter's habit (0.64 grey by default) and is dropped
        tint = np.array(rgb) / max(rgb) if max(rgb) > 12 else np.ones(3)
        uvs = _within_tiles(model.uvs[faces], areas[faces])
        low, high = uvs.min((0, 1)), uvs.max((0, 1))
        high = np.maximum(high, low + 1e-3)
        picture = (pictures[name] * tint + 0.5).astype(np.uint8)
        patches.append(_Patch(faces, uvs, low, high, picture, rgb, share))
    return patches


def _within_tiles(uvs: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Texture coordinates (F, 3, 2) moved by whole repeats so that every face starts in the first tile, and shrunk,
    all alike, so that 98 % of the surface spans at most MAX_TILES; the rest is cut off at the border."""
    span = np.ptp(uvs, axis=1)
    for axis in range(2):
        order = np.argsort(span[:, axis])
        reached = np.cumsum(areas[order]) / areas.sum()
        typical = span[order[min(int(np.searchsorted(reached, 0.98)), len(order) - 1)], axis]
        uvs = uvs * np.where(np.arange(2) == axis, min(1.0, MAX_TILES / max(typical, 1e-9)), 1.0)
    uvs = uvs - np.floor(uvs.min(1, keepdims=True) + 1e-3)
    return np.clip(uvs, 0, MAX_TILES + 1)


def _pack(patches: list[_Patch], size: int) -> tuple[int, list[tuple[int, int, int, int]]]:
    """(side, a box (x, y, w, h) per patch, from the top left), the finest that fits."""
    full = [_sizes(patches, math.inf, side) for side in (GRID, 2 * GRID, 4 * GRID, 8 * GRID, 16 * GRID, 32 * GRID)]
    for side, sizes in zip((GRID, 2 * GRID, 4 * GRID, 8 * GRID, 16 * GRID, 32 * GRID), full, strict=True):
        if side <= size and (boxes := _shelves(sizes, side)) is not None:
            return side, boxes
    scale = float(size)
    while scale > 1:
        boxes = _shelves(_sizes(patches, scale, size), size)
        if boxes is not None:
            return size, boxes
        scale *= 0.94
    raise ValueError(f"materials: expected as many as fit an atlas of {size} texels, got {len(patches)}")


def _sizes(patches: list[_Patch], scale: float, side: int) -> list[tuple[int, int]]:
    """Width and height of the patches, padding included, when a surface of share 1 gets scale x scale texels."""
    sizes: list[tuple[int, int]] = []
    for patch in patches:
        w, h = patch.native()
        shrink = min(1.0, scale * math.sqrt(patch.share / (w * h))) if math.isfinite(scale) else 1.0
        w, h = (GRID * max(1, math.ceil((n * shrink + 2 * PAD) / GRID)) for n in (w, h))
        sizes.append((int(w), int(h)))
    if math.isfinite(scale):
        sizes = [(min(w, side), min(h, side)) for w, h in sizes]
    return sizes


def _shelves(sizes: list[tuple[int, int]], side: int) -> list[tuple[int, int, int, int]] | None:
    """Boxes in rows, the tallest first; None if they don't fit."""
    boxes: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * len(sizes)
    x = y = row = 0
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i][1], -sizes[i][0])):
        w, h = sizes[i]
        if x + w > side:
            x, y, row = 0, y + row, 0
        if w > side or y + h > side:
            return None
        boxes[i] = (x, y, w, h)
        x, row = x + w, max(row, h)
    return boxes


def _resample(patch: _Patch, size: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) uint8: the region of the endlessly repeated picture that a patch covers."""
    if patch.picture is None:
        return np.broadcast_to(np.array(patch.color, np.uint8), (size[1], size[0], 3))
    h, w = patch.picture.shape[:2]
    across, up = (max(1, math.ceil(t - 1e-9)) for t in patch.high)
    tiled = Image.fromarray(np.tile(patch.picture, (up, across, 1)))
    box = (patch.low[0] * w, (up - patch.high[1]) * h, patch.high[0] * w, (up - patch.low[1]) * h)
    return np.asarray(tiled.resize(size, Image.Resampling.BOX, box=box))
