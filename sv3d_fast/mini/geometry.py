"""How every object of the training data is placed in the world and shaded: one scale rule, one normal rule."""

import math

import numpy as np

RADIUS, FIELD_OF_VIEW = 2.0, 33.8  # of sv3d_fast.camera, which needs torch; a test holds them equal
FILL = 0.85  # of half the frame, at the widest view
ELEVATIONS = (-5.0, 10.0, 40.0)
AZIMUTHS = 24
CREASE = 40.0  # degrees between faces beyond which an edge is sharp


def fit_to_frame(vertices: np.ndarray) -> np.ndarray:
    """Vertices (V, 3) float32, moved and scaled so that the object fits the frame of every orbit.

    The centre of the bounding box goes to the origin. The scale is the one at which the largest |x| or |y| of the
    object in normalised image coordinates (+-1 at the frame's borders), over a full turn in 24 steps at the
    elevations -5, 10 and 40, is 0.85, at radius 2 and field of view 33.8. The input view can be smaller than that.
    Raises ValueError for a set of points without extent.
    """
    low, high = vertices.min(0), vertices.max(0)
    points = np.asarray(vertices, np.float64) - (low.astype(np.float64) + high) / 2
    size = float(np.abs(points).max())
    if not (np.isfinite(size) and size > 0):
        raise ValueError(f"vertices: expected finite points with an extent, got a largest coordinate of {size}")
    points /= size
    support = points[np.unique((points @ _DIRECTIONS.T).argmax(0))]
    scale = 0.5
    for _ in range(12):  # perspective makes the extent grow a little faster than the scale
        scale *= FILL / _extent(scale * support)
    return (scale * points).astype(np.float32)


def _extent(points: np.ndarray) -> float:
    """Largest |x| or |y| in normalised image coordinates over all cameras of the rule."""
    across, up, towards = (points @ axes.T for axes in _CAMERAS)
    reach = np.maximum(np.abs(across), np.abs(up)) / np.maximum(RADIUS - towards, 0.1)
    return float(reach.max()) / math.tan(math.radians(FIELD_OF_VIEW / 2))


def _cameras() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(C, 3) each: the right, up and outward axes of the cameras of the rule."""
    e, a = (g.ravel() for g in np.meshgrid(np.radians(ELEVATIONS), np.arange(AZIMUTHS) * 2 * np.pi / AZIMUTHS))
    zero = np.zeros_like(a)
    right = np.stack([-np.sin(a), np.cos(a), zero], 1)
    up = np.stack([-np.sin(e) * np.cos(a), -np.sin(e) * np.sin(a), np.cos(e)], 1)
    return right, up, np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)], 1)


def _sphere(count: int) -> np.ndarray:
    """(count, 3) directions spread evenly over the sphere (Fibonacci lattice)."""
    z = 1 - (2 * np.arange(count) + 1) / count
    turn = np.arange(count) * math.pi * (3 - math.sqrt(5))
    return np.stack([np.sqrt(1 - z * z) * np.cos(turn), np.sqrt(1 - z * z) * np.sin(turn), z], 1)


_CAMERAS = _cameras()
_DIRECTIONS = _sphere(256)


def shade_smoothly(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits vertices at creases and gives each a normal.

    A corner's normal is the mean of the normals of the faces around its vertex that are within 40 degrees of its own
    face's, weighted by area; opposite faces of a two-sided sheet do not mix. Vertices come in order of first use,
    those without a face are dropped.
    Returns vertices (V', 3) float32, faces (F, 3) int32 and normals (V', 3) float32, unit or zero.
    """
    corners = vertices[faces].astype(np.float64)
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(cross, axis=1, keepdims=True)
    unit = cross / np.maximum(area, 1e-20)

    vertex = faces.ravel().astype(np.int64)
    order = np.argsort(vertex, kind="stable")
    counts = np.bincount(vertex, minlength=len(vertices))
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    # All ordered pairs of corners at one vertex, as flat arrays
    degree = counts[vertex]
    left = np.repeat(np.arange(len(vertex)), degree)
    within = np.arange(len(left)) - np.repeat(np.cumsum(degree) - degree, degree)
    right = order[starts[vertex[left]] + within]
    smooth = (unit[left // 3] * unit[right // 3]).sum(1) > math.cos(math.radians(CREASE))
    smooth |= left == right
    left, right = left[smooth], right[smooth] // 3
    summed = np.stack([np.bincount(left, cross[right, k], minlength=len(vertex)) for k in range(3)], 1)
    normals = summed / np.maximum(np.linalg.norm(summed, axis=1, keepdims=True), 1e-20)

    code = np.round(normals * 50).astype(np.int64) + 64
    key = ((vertex * 128 + code[:, 0]) * 128 + code[:, 1]) * 128 + code[:, 2]
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    first = np.sort(first)
    new_faces = rank[inverse.reshape(-1)].reshape(faces.shape).astype(np.int32)
    return vertices[vertex[first]].astype(np.float32), new_faces, normals[first].astype(np.float32)
