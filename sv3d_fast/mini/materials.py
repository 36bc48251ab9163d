"""Procedural materials: colours that go together, patterns, atlases of them, and box-projected texture coordinates."""

import colorsys
import math

import numpy as np

TILE = 64  # texels; an atlas holds 2 x 2 tiles
INSET = 1.0  # texels between a tile's border and its coordinates


def random_colors(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 3) float32 in [0, 1]: one scheme out of wood, metal and plastic greys, pastels, vivid and mixed ones."""
    scheme = rng.choice(5, p=[0.22, 0.2, 0.18, 0.25, 0.15])
    hue, colors = rng.random(), []
    for _ in range(count):
        if scheme == 0:
            h, s, v = rng.uniform(0.04, 0.12), rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.85)
        elif scheme == 1:
            h, s, v = hue, rng.uniform(0, 0.12), rng.uniform(0.08, 0.95)
        elif scheme == 2:
            h, s, v = hue + rng.normal(0, 0.08), rng.uniform(0.15, 0.45), rng.uniform(0.7, 0.98)
        elif scheme == 3:
            h, s, v = hue + rng.choice([0, 0.33, 0.5, 0.08]), rng.uniform(0.55, 1), rng.uniform(0.45, 1)
        else:
            h, s, v = rng.random(), rng.beta(1.2, 1.6), rng.uniform(0.15, 1)
        colors.append(colorsys.hsv_to_rgb(h % 1, s, v))
    return np.array(colors, np.float32)


def noise(rng: np.random.Generator, size: int, cells: int, octaves: int = 3) -> np.ndarray:
    """(size, size) float32 in [0, 1]: value noise that repeats, `cells` bumps across, halved in each octave."""
    total, amplitude = np.zeros((size, size), np.float32), 1.0
    for _ in range(octaves):
        grid = rng.random((cells, cells), dtype=np.float32)
        at = np.arange(size, dtype=np.float32) * cells / size
        low = at.astype(int) % cells
        t = at - np.floor(at)
        t = t * t * (3 - 2 * t)
        rows = grid[low] * (1 - t)[:, None] + grid[(low + 1) % cells] * t[:, None]
        total += amplitude * (rows[:, low] * (1 - t) + rows[:, (low + 1) % cells] * t)
        cells, amplitude = min(2 * cells, size), amplitude / 2
    return (total - total.min()) / max(float(np.ptp(total)), 1e-6)


def pattern(rng: np.random.Generator, colors: np.ndarray, size: int = TILE, plain: float = 0.3) -> np.ndarray:
    """(size, size, 3) uint8: a plain colour with probability `plain`, else one of eleven patterns of 2..4 `colors`."""
    a, b, c = colors[0], colors[1 % len(colors)], colors[2 % len(colors)]
    if rng.random() < plain:
        return _finish(rng, np.broadcast_to(a, (size, size, 3)), rng.uniform(0, 0.04))
    v, u = np.mgrid[0:size, 0:size].astype(np.float32) / size
    kind = int(rng.integers(11))
    repeats = int(rng.integers(2, 7))
    if kind == 0:  # stripes
        mask = _stripe(u if rng.random() < 0.5 else v, repeats, rng.uniform(0.2, 0.8))
    elif kind == 1:  # checker
        mask = ((np.floor(u * 2 * repeats) + np.floor(v * 2 * repeats)) % 2).astype(np.float32)
    elif kind == 2:  # wood: rings bent by noise
        mask = 0.5 + 0.5 * np.sin(2 * np.pi * (u * repeats + 0.7 * noise(rng, size, 3) + 0.1 * v))
        mask = 0.75 * mask * noise(rng, size, 16, 2)
        b = a * rng.uniform(0.35, 0.7)
    elif kind == 3:  # cloth, stone
        mask = noise(rng, size, int(rng.integers(2, 24)), 4)
        b = b if rng.random() < 0.5 else a * rng.uniform(0.4, 0.8)
    elif kind == 4:  # marble
        mask = np.abs(np.sin(np.pi * (2 * u + repeats * noise(rng, size, 3, 4)))) ** 0.4
    elif kind == 5:  # dots
        radius = rng.uniform(0.15, 0.4)
        mask = (np.hypot(u * repeats % 1 - 0.5, v * repeats % 1 - 0.5) < radius).astype(np.float32)
    elif kind == 6:  # bricks, tiles
        row = np.floor(v * 2 * repeats)
        across = (u * repeats + 0.5 * (row % 2)) % 1
        mask = ((across < 0.08) | (v * 2 * repeats % 1 < 0.14)).astype(np.float32)
    elif kind == 7:  # gradient
        mask = v if rng.random() < 0.7 else u
    elif kind == 8:  # plaid
        mask = 0.5 * _stripe(u, repeats, 0.4) + 0.5 * _stripe(v, repeats, 0.4)
    elif kind == 9:  # a label: blocks and lines like print
        return _finish(rng, _label(rng, colors, size), 0.01)
    else:  # spots of a second and a third colour
        mask = (noise(rng, size, 2 * repeats, 2) > rng.uniform(0.45, 0.7)).astype(np.float32)
        a = np.where((noise(rng, size, repeats, 2) > 0.6)[..., None], c, a)
    return _finish(rng, a * (1 - mask[..., None]) + b * mask[..., None], rng.uniform(0, 0.06))


def _stripe(t: np.ndarray, repeats: int, duty: float) -> np.ndarray:
    return (t * repeats % 1 < duty).astype(np.float32)


def _label(rng: np.random.Generator, colors: np.ndarray, size: int) -> np.ndarray:
    picture = np.broadcast_to(colors[0], (size, size, 3)).copy()
    for _ in range(int(rng.integers(3, 9))):
        w, h = rng.integers(size // 16, size // 2, 2)
        x, y = rng.integers(0, size - w), rng.integers(0, size - h)
        color = colors[rng.integers(len(colors))] if rng.random() < 0.7 else rng.random(3)
        if rng.random() < 0.35:
            yy, xx = np.mgrid[0:h, 0:w]
            disc = np.hypot((xx - w / 2) / (w / 2), (yy - h / 2) / (h / 2)) < 1
            picture[y : y + h, x : x + w][disc] = color
        elif rng.random() < 0.5:
            picture[y : y + max(1, h // 8), x : x + w] = color
        else:
            picture[y : y + h, x : x + w] = color
    return picture


def _finish(rng: np.random.Generator, picture: np.ndarray, grain: float) -> np.ndarray:
    grained = picture + grain * (rng.random((*picture.shape[:2], 1), dtype=np.float32) - 0.5)
    return (np.clip(grained, 0, 1) * 255 + 0.5).astype(np.uint8)


def random_atlas(rng: np.random.Generator, plain: float = 0.35) -> np.ndarray:
    """(128, 128, 3) uint8: four tiles of one colour scheme; `place` puts coordinates into tile 0..3."""
    colors = random_colors(rng, 5)
    tiles = [pattern(rng, np.roll(colors, -i, 0), TILE, plain) for i in range(4)]
    return np.concatenate([np.concatenate(tiles[:2], 1), np.concatenate(tiles[2:], 1)], 0)


def place(uvs: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Moves coordinates (F, 3, 2) in [0, 1] into the tiles `slots` (F,) of random_atlas; float32."""
    edge = INSET / (2 * TILE)
    inner = (np.clip(uvs, 0, 1) * (1 - 2 * INSET / TILE) / 2 + edge).astype(np.float32)
    corner = np.stack([(slots % 2) * 0.5, 0.5 - (slots // 2) * 0.5], -1)
    return (inner + corner[:, None, :]).astype(np.float32)


def box_project(vertices: np.ndarray, faces: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """(F, 3, 2) coordinates in [0, 1]: each face projected along the axis its normal is closest to, v up on upright
    faces, not mirrored; the longest side of the bounding box spans `scale` tiles (<= 1)."""
    low, high = vertices.min(0), vertices.max(0)
    unit = 0.5 + (vertices - (low + high) / 2) * (scale / max(float((high - low).max()), 1e-9))
    corners = unit[faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    axis = np.abs(normal).argmax(1)
    sign = np.where(np.take_along_axis(normal, axis[:, None], 1)[:, 0] < 0, -1.0, 1.0)[:, None]
    x, y, z = corners[..., 0], corners[..., 1], corners[..., 2]
    across = np.where(axis[:, None] == 0, y, np.where(axis[:, None] == 1, 1 - x, y))
    up = np.where(axis[:, None] == 2, 1 - x, z)
    return np.stack([0.5 + (across - 0.5) * sign, up], -1)


def paint(vertices: np.ndarray, faces: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random materials for a mesh that has none: (uvs (F, 3, 2) float32, texture (128, 128, 3) uint8).

    One to four patterns of one colour scheme, given out by height, by direction or by connected part.
    """
    count = int(rng.integers(1, 5))
    corners = vertices[faces]
    way = int(rng.integers(3))
    if count == 1:
        slots = np.zeros(len(faces), np.int64)
    elif way == 0:
        z = corners.mean(1)[:, 2]
        slots = np.searchsorted(np.sort(rng.uniform(z.min(), z.max(), count - 1)), z)
    elif way == 1:
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        slots = np.abs(normal).argmax(1) % count
    else:
        slots = rng.integers(0, count, len(vertices))[_parts(faces, len(vertices))]
    uvs = box_project(vertices, faces, rng.uniform(0.35, 1.0))
    return place(uvs, slots), random_atlas(rng, plain=0.25)


def _parts(faces: np.ndarray, vertices: int) -> np.ndarray:
    """(F,) the lowest vertex of the connected part a face belongs to."""
    label = np.arange(vertices)
    for _ in range(2 * math.ceil(math.sqrt(vertices)) + 8):
        low = label[faces].min(1)
        before = label.copy()
        for corner in range(3):
            np.minimum.at(label, faces[:, corner], low)
        label = label[label]
        if (label == before).all():
            break
    return label[faces[:, 0]]
