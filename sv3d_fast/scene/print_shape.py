"""The shape that a printer is to make: in millimetres, standing on the plate."""

import numpy as np
import torch

from .mesh import Mesh


def printable(mesh: Mesh, height_mm: float) -> Mesh:
    """The shape alone, z-up, `height_mm` high from z = 0 on, its box centred on the z axis; on the CPU.

    Vertices that come to the same place become one, and faces without an area of their own go: files for printers
    tell vertices by their places. Raises ValueError for a height that isn't positive, and a mesh without height.
    """
    if not 0 < height_mm < float("inf"):
        raise ValueError(f"height_mm: expected a positive number of millimetres, got {height_mm}")
    used, corners = np.unique(mesh.faces.cpu().numpy(), return_inverse=True)
    points = mesh.vertices.double().cpu().numpy()[used]
    low, high = points.min(0), points.max(0)
    if not high[2] > low[2]:
        raise ValueError("mesh: expected one of some height, got a flat one")
    middle = [(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]]
    placed = ((points - middle) * (height_mm / (high[2] - low[2]))).astype(np.float32) + np.float32(0)  # no -0.0
    places, index = np.unique(placed, axis=0, return_inverse=True)
    faces = index.reshape(-1)[corners.reshape(-1, 3)].astype(np.int32)
    distinct = (faces != np.roll(faces, 1, axis=1)).all(1)
    return Mesh(torch.from_numpy(places), torch.from_numpy(faces[distinct]))
