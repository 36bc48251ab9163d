"""Primitives of generated objects, and the builder that puts them together. z is up; lengths are arbitrary."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .obj import clip_ears

Vector = Sequence[float] | np.ndarray
_AXES = {
    "x": np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]]),
    "y": np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]]),
    "z": np.eye(3),
}


def rotation(yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """(3, 3) rotation: roll about x, then pitch about y (positive lowers +x), then yaw about z; degrees."""
    a, b, c = (math.radians(d) for d in (yaw, pitch, roll))
    about_z = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
    about_y = np.array([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
    about_x = np.array([[1, 0, 0], [0, math.cos(c), -math.sin(c)], [0, math.sin(c), math.cos(c)]])
    return about_z @ about_y @ about_x


@lru_cache(maxsize=64)
def _grid(rows: int, columns: int, wrap: bool, close: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(faces, uvs) of a grid of rows x columns points, counter-clockwise where columns run left to right and rows run
    upwards; `wrap` joins the last column to the first, `close` the last row to the first."""
    r, c = np.mgrid[0 : rows - (not close), 0 : columns - (not wrap)].reshape(2, -1)
    r1, c1 = (r + 1) % rows, (c + 1) % columns
    quad = np.stack([r * columns + c, r * columns + c1, r1 * columns + c1, r1 * columns + c], 1)
    u, v = c / max(columns - (not wrap), 1), r / max(rows - (not close), 1)
    du, dv = 1 / max(columns - (not wrap), 1), 1 / max(rows - (not close), 1)
    corner = np.stack(
        [np.stack([u, v], 1), np.stack([u + du, v], 1), np.stack([u + du, v + dv], 1), np.stack([u, v + dv], 1)], 1
    )
    pick = [[0, 1, 2], [0, 2, 3]]
    return np.concatenate([quad[:, p] for p in pick]), np.concatenate([corner[:, p] for p in pick])


def smooth(points, count: int = 24) -> np.ndarray:
    """`count` points of a Catmull-Rom curve through `points`."""
    p = np.asarray(points, float)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.linspace(0, len(p) - 3 - 1e-9, count)
    i, t = t.astype(int), (t % 1)[:, None]
    a, b, c, d = p[i], p[i + 1], p[i + 2], p[i + 3]
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * (b - c) + d - a) * t**3)


class Builder:
    """Collects parts. `slot` 0..3 is the tile of the material atlas that a part shows."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []

    def add(self, vertices, faces, uvs, slot: int, at: Vector = (0, 0, 0), turn: np.ndarray | None = None) -> None:
        """Adds a part, turned about its own origin, then moved to `at`."""
        turned = vertices if turn is None else vertices @ turn.T
        self._parts.append((turned + np.asarray(at, float), faces, uvs, slot))

    def merge(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(vertices (V, 3), faces (F, 3), uvs (F, 3, 2), slots (F,)) of all parts; faces without area are left out."""
        starts = np.cumsum([0] + [len(p[0]) for p in self._parts])
        vertices = np.concatenate([p[0] for p in self._parts])
        faces = np.concatenate([p[1] + s for p, s in zip(self._parts, starts, strict=False)])
        uvs = np.concatenate([p[2] for p in self._parts])
        slots = np.concatenate([np.full(len(p[1]), p[3]) for p in self._parts])
        c = vertices[faces]
        area = np.linalg.norm(np.cross(c[:, 1] - c[:, 0], c[:, 2] - c[:, 0]), axis=1)
        keep = area > 1e-9 * max(float(np.ptp(vertices, axis=0).max()), 1e-9) ** 2
        return vertices, faces[keep], uvs[keep], slots[keep]

    def box(self, size: Vector, at: Vector = (0, 0, 0), slot: int = 0, turn=None, edge: float = 0.0) -> None:
        """A box of `size` centred at `at`; `edge` > 0 rounds its edges with that radius."""
        half = np.asarray(size, float) / 2
        radius = min(edge, float(half.min()))
        steps = (
            np.array([-1.0, 1.0])
            if radius <= 0
            else np.concatenate([np.linspace(-1, -0.001, 4), np.linspace(0.001, 1, 4)])
        )
        n = len(steps)
        faces, unit = _grid(n, n, False)
        for axis in range(3):
            for sign in (-1.0, 1.0):
                a, b = ((1, 2), (2, 0), (0, 1))[axis]
                points: np.ndarray = np.zeros((n, n, 3))
                points[..., axis] = sign
                points[..., a], points[..., b] = (sign if axis != 1 else 1) * steps[None], steps[:, None]
                if axis == 1:  # columns run along -z x ...: keep v upwards on the sides
                    points[..., 0], points[..., 2] = -sign * steps[None], steps[:, None]
                points = points.reshape(-1, 3)
                span = half[[1, 0, 1][axis]], half[[2, 2, 0][axis]]
                if radius > 0:
                    core = half - radius
                    inner = np.sign(points) * core
                    direction = points / np.linalg.norm(points, axis=1, keepdims=True)
                    points = inner + radius * direction
                else:
                    points = points * half
                scale = np.array(span) / half.max()
                self.add(points, faces, unit * scale, slot, at, turn)

    def lathe(
        self, profile, at: Vector = (0, 0, 0), slot: int = 0, turn=None, sides: int = 24, squash: Vector = (1, 1)
    ):
        """A surface of revolution about z: `profile` (N, 2) of radius and height, from the bottom up on the outside."""
        profile = np.asarray(profile, float)
        angle = np.arange(sides) * 2 * math.pi / sides
        ring = np.stack([np.cos(angle) * squash[0], np.sin(angle) * squash[1]], 1)
        points = np.concatenate(
            [profile[:, None, :1] * ring[None], np.broadcast_to(profile[:, None, 1:], (len(profile), sides, 1))], 2
        )
        faces, uvs = _grid(len(profile), sides, True)
        steps = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(profile, axis=0), axis=1))])
        along = np.interp(uvs[..., 1], np.linspace(0, 1, len(profile)), steps / max(steps[-1], 1e-9))
        self.add(points.reshape(-1, 3), faces, np.stack([uvs[..., 0], along], -1), slot, at, turn)

    def cylinder(
        self, radius: float, height: float, at: Vector = (0, 0, 0), slot: int = 0, top: float | None = None,
        axis: str = "z", turn=None, sides: int = 20,
    ) -> None:  # fmt: skip
        """A closed cylinder, or a frustum with radius `top`, centred at `at`, along x, y or z."""
        h, t = height / 2, radius if top is None else top
        turn = _AXES[axis] if turn is None else turn @ _AXES[axis]
        self.lathe([(0, -h), (radius, -h), (t, h), (0, h)], at, slot, turn, sides)

    def ball(
        self, radii: Vector, at: Vector = (0, 0, 0), slot: int = 0, turn=None, start: float = -90.0, rings: int = 12
    ) -> None:  # fmt: skip
        """An ellipsoid, or the part of it above the latitude `start` in degrees."""
        t = np.radians(np.linspace(start, 90, rings + 1))
        profile = np.stack([np.cos(t).clip(0), np.sin(t) * radii[2]], 1)
        self.lathe(profile, at, slot, turn, 8 + rings, (radii[0], radii[1]))

    def tube(
        self, path, radius, slot: int = 0, at: Vector = (0, 0, 0), turn=None, closed: bool = False, sides: int = 10
    ):
        """A round tube along `path` (N, 3); `radius` is one number or one per point. Open tubes get flat ends."""
        path = np.asarray(path, float)
        tangent = np.roll(path, -1, 0) - np.roll(path, 1, 0) if closed else np.gradient(path, axis=0)
        tangent /= np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-12)
        # The normal of the path's best plane stays clear of its tangents, so that the tube does not twist
        reference = np.linalg.svd(path - path.mean(0))[2][2]
        side = np.cross(reference, tangent)
        bad = np.linalg.norm(side, axis=1) < 1e-6
        side[bad] = np.cross([0.3, 0.5, 0.8], tangent[bad])
        side /= np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12)
        other = np.cross(tangent, side)
        angle = np.arange(sides) * 2 * math.pi / sides
        radius = np.broadcast_to(np.asarray(radius, float), (len(path),))[:, None, None]
        rings = path[:, None] + radius * (
            np.cos(angle)[None, :, None] * side[:, None] + np.sin(angle)[None, :, None] * other[:, None]
        )
        if not closed:
            rings = np.concatenate([np.repeat(path[:1, None], sides, 1), rings, np.repeat(path[-1:, None], sides, 1)])
        faces, uvs = _grid(len(rings), sides, True, closed)
        self.add(rings.reshape(-1, 3), faces, uvs, slot, at, turn)

    def torus(self, radius: float, thickness: float, at: Vector = (0, 0, 0), slot: int = 0, turn=None) -> None:
        """A torus around z."""
        t = np.arange(24) * 2 * math.pi / 24
        self.tube(np.stack([radius * np.cos(t), radius * np.sin(t), 0 * t], 1), thickness, slot, at, turn, True)

    def extrude(self, polygon, depth: float, at: Vector = (0, 0, 0), slot: int = 0, turn=None) -> None:
        """A prism: `polygon` (N, 2) in the xz plane, counter-clockwise seen from -y, `depth` along y, centred on it."""
        polygon = np.asarray(polygon, float)
        n = len(polygon)
        front = np.stack([polygon[:, 0], np.full(n, -depth / 2), polygon[:, 1]], 1)
        vertices = np.concatenate([front, np.add(front, [0, depth, 0])])
        cap = np.array(clip_ears(front))
        i = np.arange(n)
        j = (i + 1) % n
        faces = np.concatenate([cap, cap[:, ::-1] + n, np.stack([j, i, i + n], 1), np.stack([j, i + n, j + n], 1)])
        low, high = polygon.min(0), polygon.max(0)
        flat = (polygon - low) / max(float((high - low).max()), 1e-9)
        around = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(polygon[[*i, 0]], axis=0), axis=1))])
        around = around / around[-1]
        wide = min(1.0, depth / max(float((high - low).max()), 1e-9))
        a, b = around[:-1], around[1:]
        side = [np.stack([np.stack([p, np.full(n, q)], 1) for p, q in c], 1) for c in (
            ((b, 0.0), (a, 0.0), (a, wide)), ((b, 0.0), (a, wide), (b, wide)))]  # fmt: skip
        self.add(vertices, faces, np.concatenate([flat[cap], flat[cap[:, ::-1]], *side]), slot, at, turn)
