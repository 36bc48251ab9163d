"""What mesh files need of a Mesh: y-up axes, smooth normals, and vertices split where texture coordinates differ."""

from dataclasses import dataclass

import numpy as np

from .mesh import Mesh


@dataclass(frozen=True)
class SplitMesh:
    """Vertices as graphics cards take them, one per distinct (position, texture coordinate) pair.

    positions, normals: (N, 3) float32. uvs: (N, 2) float32, v up, or None. faces: (F, 3) uint32.
    source: (N,) the index of the mesh's vertex that each one came from.
    """

    positions: np.ndarray
    normals: np.ndarray
    uvs: np.ndarray | None
    faces: np.ndarray
    source: np.ndarray


def to_y_up(vectors: np.ndarray) -> np.ndarray:
    """World (x front, y, z up) -> glTF (x, y up, z front): (x, y, z) -> (y, z, x), a rotation."""
    return vectors[:, [1, 2, 0]]


def from_y_up(vectors: np.ndarray) -> np.ndarray:
    """The way back: (x, y, z) -> (z, x, y)."""
    return vectors[:, [2, 0, 1]]


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(V, 3) float32 unit normals, faces weighted by their area; (0, 0, 1) for a vertex without one."""
    a, b, c = (vertices[faces[:, i]].astype(np.float64) for i in range(3))
    normals = np.zeros((len(vertices), 3))
    face_normals = np.cross(b - a, c - a)
    for axis in range(3):
        for corner in range(3):
            normals[:, axis] += np.bincount(faces[:, corner], face_normals[:, axis], len(vertices))
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.where(lengths > 1e-20, normals / np.maximum(lengths, 1e-20), [0.0, 0.0, 1.0]).astype(np.float32)


def split(mesh: Mesh) -> SplitMesh:
    """Splits vertices at texture seams, and only there; normals stay smooth across seams. Axes stay z-up."""
    vertices, faces = mesh.vertices.cpu().numpy(), mesh.faces.cpu().numpy()
    normals = vertex_normals(vertices, faces)
    if mesh.uvs is None:
        return SplitMesh(vertices, normals, None, faces.astype(np.uint32), np.arange(len(vertices)))
    uvs = mesh.uvs.cpu().numpy().reshape(-1, 2) + np.float32(0)  # + 0: -0.0 and 0.0 are one coordinate
    keys = np.empty(len(uvs), [("vertex", np.int32), ("u", np.uint32), ("v", np.uint32)])
    keys["vertex"], bits = faces.ravel(), np.ascontiguousarray(uvs).view(np.uint32)
    keys["u"], keys["v"] = bits[:, 0], bits[:, 1]
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    source = faces.ravel()[first]
    return SplitMesh(vertices[source], normals[source], uvs[first], inverse.reshape(-1, 3).astype(np.uint32), source)
