"""A reader of Wavefront OBJ and MTL files that keeps what a texture bake needs: corner uvs and diffuse materials."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Material:
    """What a surface looks like: `color` (3,) in [0, 1] (Kd), and the file name of its texture (map_Kd), if any."""

    color: tuple[float, float, float] = (0.8, 0.8, 0.8)
    texture: str | None = None


@dataclass(frozen=True)
class ObjModel:
    """A triangulated model: vertices (V, 3) float64, faces (F, 3) int64, uvs (F, 3, 2) float64 with v up (0 where the
    file gives none), materials (F,) int64 indices into `palette`."""

    vertices: np.ndarray
    faces: np.ndarray
    uvs: np.ndarray
    materials: np.ndarray
    palette: tuple[Material, ...]


def read_mtl(text: str) -> dict[str, Material]:
    """Materials by name. Transparency (d, Tr) is not kept: glass becomes an opaque surface, lightened by how clear it
    is, which is what it looks like on a white background."""
    materials: dict[str, Material] = {}
    name, color, texture, opacity = None, (0.8, 0.8, 0.8), None, 1.0

    def finish():
        if name is not None:
            lighter = tuple(min(1.0, max(0.0, c)) * opacity + (1 - opacity) * 0.9 for c in color)
            materials[name] = Material(lighter, texture)

    for line in text.splitlines():
        key, _, rest = line.strip().partition(" ")
        key, rest = key.strip().lower(), rest.strip()
        if key == "newmtl":
            finish()
            name, color, texture, opacity = rest, (0.8, 0.8, 0.8), None, 1.0
        elif key == "kd" and len(rest.split()) >= 3:
            red, green, blue = (float(c) for c in rest.split()[:3])
            color = (red, green, blue)
        elif key == "d" and rest:
            opacity = min(1.0, max(0.0, float(rest.split()[-1])))
        elif key == "map_kd" and rest:
            texture = rest.rsplit("\\", 1)[-1].lstrip("./")
    finish()
    return materials


def read_obj(text: str, read_sibling: Callable[[str], str]) -> ObjModel:
    """Reads an OBJ; `read_sibling(file name)` returns the text of the MTL files it names.

    Polygons are triangulated so that concave ones stay right. Raises ValueError for a file without faces or with an
    index out of range.
    """
    positions: list[str] = []
    coordinates: list[str] = []
    library: dict[str, Material] = {}
    palette: dict[str, int] = {}
    # Polygons of one layout (corners, with vt, with vn) are read together by numpy: (texts, material, v and vt so far)
    layouts: dict[tuple[int, bool, bool], tuple[list[str], list[tuple[int, int, int]]]] = {}
    current = ""
    for line in text.replace("\\\n", " ").splitlines():
        key, _, rest = line.strip().partition(" ")
        if key == "v":
            positions.append(rest)
        elif key == "vt":
            coordinates.append(rest)
        elif key == "f":
            corners = rest.split()
            first = corners[0].split("/")
            layout = (len(corners), len(first) > 1 and first[1] != "", len(first) > 2)
            texts, owners = layouts.setdefault(layout, ([], []))
            texts.append(rest)
            owners.append((palette.setdefault(current, len(palette)), len(positions), len(coordinates)))
        elif key == "usemtl":
            current = rest.strip()
        elif key == "mtllib":
            library.update(read_mtl(read_sibling(rest.strip())))
    vertices = np.array([p.split()[:3] for p in positions], dtype=np.float64).reshape(-1, 3)
    vt = np.array([[*c.split(), "0"][:2] for c in coordinates], dtype=np.float64).reshape(-1, 2)
    faces, uvs, materials = [], [], []
    for (sides, has_vt, has_vn), (texts, owners) in layouts.items():
        if sides < 3:
            continue
        index, owner = _corners(texts, owners, sides, has_vt, has_vn, len(vertices), len(vt))
        cut = _triangulate(vertices[index[..., 0]])
        faces.append(index[cut[:, :1], cut[:, 1:], 0])
        uvs.append(vt[index[cut[:, :1], cut[:, 1:], 1]] if has_vt else np.zeros((len(cut), 3, 2)))
        materials.append(owner[cut[:, 0]])
    if not faces:
        raise ValueError("OBJ: expected faces, got none")
    return ObjModel(
        vertices,
        np.concatenate(faces),
        np.concatenate(uvs),
        np.concatenate(materials),
        tuple(library.get(name, Material()) for name in palette),
    )


def _corners(
    texts: list[str], owners: list[tuple[int, int, int]], sides: int, has_vt: bool, has_vn: bool, v: int, vt: int
) -> tuple[np.ndarray, np.ndarray]:
    """((P, sides, 2) zero-based indices of vertices and coordinates, (P,) materials) of polygons of one layout."""
    fields = 1 + has_vt + has_vn
    plain = " ".join(texts).replace("/", " ").split()
    if len(plain) != len(texts) * sides * fields:
        raise ValueError("OBJ: expected the corners of a face to be written alike")
    index = np.array(plain, dtype=np.int64).reshape(len(texts), sides, fields)[..., : 1 + has_vt]
    owner = np.array(owners, dtype=np.int64)
    index = np.where(index < 0, index + owner[:, None, 1 : 2 + has_vt], index - 1)
    for slot, count in enumerate((v, vt)[: 1 + has_vt]):
        if index[..., slot].min() < 0 or index[..., slot].max() >= count:
            raise ValueError(f"OBJ: expected indices in 1..{count}, got {index[..., slot].max() + 1}")
    return index, owner[:, 0]


def _triangulate(polygons: np.ndarray) -> np.ndarray:
    """(T, 4) rows of polygon, corner, corner, corner that cut polygons (P, N, 3) of N corners each into triangles."""
    count, sides = polygons.shape[:2]
    which = np.arange(count)[:, None]
    fan = np.array([[0, i, i + 1] for i in range(1, sides - 1)])
    cuts = np.concatenate([np.repeat(which, len(fan), 0), np.tile(fan, (count, 1))], 1).reshape(count, len(fan), 4)
    corners = polygons[which[:, :, None], cuts[..., 1:].reshape(count, -1, 3)]
    normals = np.cross(corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0])
    for p in np.flatnonzero(((normals * normals.sum(1, keepdims=True)).sum(-1) < 0).any(1)):
        cuts[p, :, 1:] = clip_ears(polygons[p])  # a fan turns over in a concave polygon
    return cuts.reshape(-1, 4)


def clip_ears(points: np.ndarray) -> list[tuple[int, int, int]]:
    """Triangles (indices) of the polygon `points` (N, 3), which is nearly planar and may be concave; a polygon that
    no ear can be cut from any more (self-intersecting, degenerate) is finished as a fan."""
    ring = list(range(len(points)))
    normal = np.cross(points, np.roll(points, -1, 0)).sum(0)
    axis = int(np.abs(normal).argmax())
    flat = np.delete(points, axis, 1) * ((-1) ** (axis == 1) * (1 if normal[axis] >= 0 else -1), 1)
    xy = [tuple(p) for p in flat.tolist()]

    def turn(a, b, c):
        return (xy[b][0] - xy[a][0]) * (xy[c][1] - xy[a][1]) - (xy[b][1] - xy[a][1]) * (xy[c][0] - xy[a][0])

    triangles = []
    while len(ring) > 3:
        reflex = [ring[i] for i in range(len(ring)) if turn(ring[i - 1], ring[i], ring[(i + 1) % len(ring)]) < 0]
        for i in range(len(ring)):
            a, b, c = ring[i - 1], ring[i], ring[(i + 1) % len(ring)]
            if turn(a, b, c) <= 0:
                continue
            if any(p not in (a, b, c) and min(turn(a, b, p), turn(b, c, p), turn(c, a, p)) >= 0 for p in reflex):
                continue
            triangles.append((a, b, c))
            ring.pop(i)
            break
        else:
            break
    triangles.extend((ring[0], ring[i], ring[i + 1]) for i in range(1, len(ring) - 1))
    return triangles
