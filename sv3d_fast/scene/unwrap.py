"""Texture coordinates of a mesh: xatlas in a process of its own with a time limit, else a cube projection.

xatlas can take hours on an unlucky mesh, and only ending its process stops it. The module is also that process:
`python -m sv3d_fast.scene.unwrap mesh.npz uvs.npy`; it imports numpy alone, so that it starts at once.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PADDING = 4  # texels between charts, on each side, in an atlas of ATLAS texels
ATLAS = 1024
SAMPLES = 1 << 24  # pixels of bounding boxes looked at at a time, to bound memory
OVERLAPS = 512  # texels of the raster in which faces that overlap are found
LAYERS = 8  # cube projection: how often faces that lie over others are moved to charts of their own
DIRECTIONS = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], np.float32)


@dataclass(frozen=True)
class Unwrapping:
    """uvs: (F, 3, 2) float32 in [0, 1], per face corner. method: "xatlas" or "cube".

    why: why xatlas was not used; empty if it was.
    """

    uvs: np.ndarray
    method: str
    why: str = ""


def unwrap(vertices, faces, *, time_limit: float = 20.0) -> Unwrapping:
    """Charts without overlaps for every face, by xatlas if it ends within `time_limit` seconds, else by projection.

    vertices: (V, 3) float, faces: (F, 3) integer; numpy arrays or CPU tensors. time_limit: 0 skips xatlas.
    Raises ValueError for other shapes, no faces, values that are not finite and indices out of range.
    """
    vertices, faces = np.ascontiguousarray(vertices, np.float32), np.ascontiguousarray(faces, np.int64)
    if vertices.ndim != 2 or vertices.shape[1] != 3 or not np.isfinite(vertices).all():
        raise ValueError(f"vertices: expected finite (V, 3), got {vertices.shape}")
    if faces.ndim != 2 or faces.shape[1] != 3 or len(faces) == 0:
        raise ValueError(f"faces: expected (F, 3), at least one, got {faces.shape}")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"faces: expected indices in [0, {len(vertices)}), got {faces.min()}..{faces.max()}")
    if time_limit <= 0:
        return Unwrapping(_cube(vertices, faces), "cube", "the time limit is 0")
    uvs, why = _xatlas_apart(vertices, faces, time_limit)
    return Unwrapping(_cube(vertices, faces), "cube", why) if uvs is None else Unwrapping(uvs, "xatlas")


def covered(uvs: np.ndarray, resolution: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which texel centres lie inside which faces of a layout: pairs of texel and face, in the order of the faces.

    uvs: (F, 3, 2), u right, v up; texel (row, column) has its centre at u = (column + 0.5) / resolution,
    v = 1 - (row + 0.5) / resolution. Returns texel = row * resolution + column (P,), face (P,) and barycentrics
    (P, 3) float32. A centre on an edge belongs to both faces; one outside [0, 1] is left out.
    """
    corners = np.stack([uvs[..., 0], 1 - uvs[..., 1]], -1).astype(np.float64) * resolution
    low = np.clip(np.ceil(corners.min(1) - 0.5), 0, resolution).astype(np.int64)
    high = np.clip(np.floor(corners.max(1) - 0.5) + 1, 0, resolution).astype(np.int64)
    box = np.maximum(high - low, 0)
    sizes = box.prod(1)
    found = []
    for part in np.split(np.arange(len(uvs)), np.flatnonzero(np.diff(np.cumsum(sizes) // SAMPLES)) + 1):
        face = np.repeat(part, sizes[part])
        within = np.arange(len(face)) - np.repeat(np.cumsum(sizes[part]) - sizes[part], sizes[part])
        column = low[face, 0] + within % box[face, 0]
        row = low[face, 1] + within // box[face, 0]
        a, b, c = corners[face].transpose(1, 0, 2)
        point = np.stack([column + 0.5, row + 0.5], 1)
        area = _cross(b - a, c - a)
        flat = np.abs(area) < 1e-9
        weights = np.stack([_cross(c - b, point - b), _cross(a - c, point - c), _cross(b - a, point - a)], 1)
        weights /= np.where(flat, 1, area)[:, None]
        inside = (weights >= 0).all(1) & ~flat
        found.append(((row * resolution + column)[inside], face[inside], weights[inside].astype(np.float32)))
    texels, owners, barycentrics = zip(*found, strict=True)
    return np.concatenate(texels), np.concatenate(owners), np.concatenate(barycentrics)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def _xatlas_apart(vertices, faces, time_limit) -> tuple[np.ndarray | None, str]:
    with tempfile.TemporaryDirectory() as folder:
        mesh, result = Path(folder) / "mesh.npz", Path(folder) / "uvs.npy"
        np.savez(mesh, vertices=vertices, faces=faces.astype(np.uint32))
        command = [sys.executable, "-m", __name__, str(mesh), str(result)]
        try:
            done = subprocess.run(command, timeout=time_limit, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            return None, f"xatlas did not end within {time_limit:g} s"
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            return None, f"xatlas failed with code {done.returncode}: {last[0]}"
        uvs = np.load(result)
    if uvs.shape != (len(faces), 3, 2) or not np.isfinite(uvs).all():
        return None, "xatlas returned another number of faces"
    return uvs, ""


def _xatlas(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(F, 3, 2) texture coordinates by xatlas, in this process. Raises RuntimeError where it leaves faces out."""
    import xatlas

    atlas = xatlas.Atlas()
    atlas.add_mesh(vertices, faces)
    packing = xatlas.PackOptions()
    packing.resolution, packing.padding, packing.bilinear = ATLAS, PADDING, True
    atlas.generate(pack_options=packing)
    _, indices, uvs = atlas[0]
    if atlas.atlas_count != 1 or len(indices) != len(faces):
        raise RuntimeError(f"expected one atlas of {len(faces)} faces, got {atlas.atlas_count} of {len(indices)}")
    return uvs[indices].astype(np.float32)


def _cube(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(F, 3, 2): faces projected along their nearest axis, connected ones together, those that overlap apart."""
    corners = vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    direction = (normals @ DIRECTIONS.T).argmax(1)
    neighbours = _neighbours(faces)
    u_axis, v_axis = (direction // 2 + 1) % 3, (direction // 2 + 2) % 3
    rows = np.arange(len(faces))[:, None]
    flat = np.stack([corners[rows, [[0, 1, 2]], u_axis[:, None]], corners[rows, [[0, 1, 2]], v_axis[:, None]]], -1)
    flat[..., 0] *= np.where(direction % 2, -1, 1)[:, None]  # so that charts keep the winding of the surface

    chart = np.full(len(faces), -1)
    left, charts = np.arange(len(faces)), 0
    for _ in range(LAYERS):
        label = _components(left, neighbours, direction)
        beaten = _beaten(_packed(flat[left], label))
        chart[left[~beaten]] = charts + label[~beaten]
        charts += label.max() + 1
        left = left[beaten]
        if len(left) == 0:
            break
    chart[left] = charts + np.arange(len(left))  # a face alone overlaps nothing
    _, chart = np.unique(chart, return_inverse=True)
    return _packed(flat, chart).astype(np.float32)


def _neighbours(faces: np.ndarray) -> np.ndarray:
    """(E, 2) pairs of faces that share an edge."""
    edges = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), 1)
    order = np.lexsort(edges.T)
    same = (edges[order[1:]] == edges[order[:-1]]).all(1)
    return np.stack([order[:-1][same], order[1:][same]], 1) // 3


def _components(left: np.ndarray, neighbours: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Labels 0.. of the connected parts of the faces `left`, within one direction."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    position = np.full(len(direction), -1)
    position[left] = np.arange(len(left))
    a, b = position[neighbours].T
    joined = (a >= 0) & (b >= 0) & (direction[neighbours[:, 0]] == direction[neighbours[:, 1]])
    graph = coo_array((np.ones(joined.sum()), (a[joined], b[joined])), shape=(len(left),) * 2)
    return connected_components(graph, directed=False)[1]


def _packed(flat: np.ndarray, chart: np.ndarray) -> np.ndarray:
    """Layout (F, 3, 2) of charts on shelves in the unit square, all at one scale."""
    count = chart.max() + 1
    low, high = np.full((count, 2), np.inf), np.full((count, 2), -np.inf)
    np.minimum.at(low, chart, flat.min(1))
    np.maximum.at(high, chart, flat.max(1))
    extent = high - low
    order = np.argsort(-extent[:, 1], kind="stable")
    padding = min(2 * PADDING / ATLAS, 0.5 / count**0.5)  # many charts get less, so that all of them fit
    smallest, largest = 0.0, 1.0 / max(extent.max(), 1e-12)
    corner, scale = _shelves(np.full((count, 2), padding)), 0.0
    for _ in range(24):  # the largest scale at which the shelves fit
        middle = (smallest + largest) / 2
        tried = _shelves(extent[order] * middle + padding)
        if tried is None:
            largest = middle
        else:
            smallest, scale, corner = middle, middle, tried
    origin = np.empty((count, 2))
    origin[order] = corner + padding / 2
    return (flat - low[chart][:, None]) * scale + origin[chart][:, None]


def _shelves(boxes: np.ndarray) -> np.ndarray | None:
    """Lower left corners (N, 2) of boxes, highest first, set side by side on shelves; None if they don't fit."""
    corners, x, y, shelf = [], 0.0, 0.0, 0.0
    for width, height in boxes.tolist():
        if x + width > 1:
            x, y, shelf = 0.0, y + shelf, 0.0
        if x + width > 1 or y + height > 1:
            return None
        corners.append((x, y))
        x, shelf = x + width, max(shelf, height)
    return np.array(corners)


def _beaten(uvs: np.ndarray) -> np.ndarray:
    """(F,) whether a face loses a texel to a face of lower index: what is left overlaps nowhere."""
    texel, face, weights = covered(uvs, OVERLAPS)
    inside = (weights > 1e-4).all(1)
    texel, face = texel[inside], face[inside]
    first = np.full(OVERLAPS * OVERLAPS, len(uvs))
    np.minimum.at(first, texel, face)
    beaten = np.zeros(len(uvs), bool)
    beaten[face[first[texel] < face]] = True
    return beaten


if __name__ == "__main__":
    given = np.load(sys.argv[1])
    np.save(sys.argv[2], _xatlas(given["vertices"], given["faces"]))
