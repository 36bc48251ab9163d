"""Generated objects: recipes of furniture and things, put together from primitives and painted, from a seed."""

from dataclasses import dataclass

import numpy as np

from .furniture import FURNITURE
from .household import HOUSEHOLD
from .materials import place, random_atlas
from .primitives import Builder
from .toys import TOYS

RECIPES = FURNITURE | HOUSEHOLD | TOYS
OFTEN = {
    "chair": 2.0,
    "table": 1.5,
    "cabinet": 1.5,
    "tower": 3.0,
    "blob": 2.0,
    "creature": 1.5,
    "carton": 1.5,
    "car": 1.5,
}


@dataclass(frozen=True)
class Shape:
    """kind: the recipe. vertices (V, 3) float32, z up, front +x, any size; faces (F, 3) int32; uvs (F, 3, 2) float32
    in [0, 1], v up; texture (128, 128, 3) uint8, row 0 at v = 1."""

    kind: str
    vertices: np.ndarray
    faces: np.ndarray
    uvs: np.ndarray
    texture: np.ndarray


def make_shape(rng: np.random.Generator, kind: str | None = None) -> Shape:
    """A random object; `kind` picks the recipe, else chance does. Raises ValueError for an unknown kind."""
    names = list(RECIPES)
    if kind is None:
        weights = np.array([OFTEN.get(n, 1.0) for n in names])
        kind = names[rng.choice(len(names), p=weights / weights.sum())]
    elif kind not in RECIPES:
        raise ValueError(f"kind: expected one of {', '.join(names)}, got {kind!r}")
    builder = Builder()
    RECIPES[kind](rng, builder)
    vertices, faces, uvs, slots = builder.merge()
    stretch = rng.uniform(0.85, 1.18, 3)
    vertices, faces = weld(vertices * stretch, faces)
    return Shape(kind, vertices, faces, place(uvs, slots), random_atlas(rng))


def weld(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joins vertices at the same place, so that smooth surfaces made of several grids are shaded as one."""
    step = 1e-5 * float(np.ptp(vertices, axis=0).max())
    q = np.round((vertices - vertices.min(0)) / step).astype(np.int64)
    _, first, inverse = np.unique((q[:, 0] << 40) | (q[:, 1] << 20) | q[:, 2], return_index=True, return_inverse=True)
    return vertices[first].astype(np.float32), inverse.reshape(-1)[faces].astype(np.int32)
