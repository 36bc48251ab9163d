"""Splats as a .splat file: the 32-byte records of antimatter15's web viewer, which many pages read.

Layout: little-endian float32 position and standard deviations, RGBA as bytes, the rotation as bytes, w first,
128 times the unit quaternion + 128 (antimatter15/splat, MIT). The file has no header; axes are y-down, as of PLY files.
"""

from pathlib import Path

import numpy as np
import torch

from .splat_axes import Y_DOWN, quantised, to_splats, unit
from .splats import Splats

RECORD = np.dtype([("position", "<f4", 3), ("scale", "<f4", 3), ("color", "u1", 4), ("rotation", "u1", 4)])


def splat_bytes(splats: Splats) -> bytes:
    """The largest and most opaque splats first, so that a page that shows what has arrived shows those.

    Positions and scales keep float32; colours are clamped to [0, 1]. Raises ValueError for splats that aren't finite.
    """
    s = splats.detach().to(device="cpu", dtype=torch.float64)
    order = torch.argsort(-(s.log_scales.sum(1).exp() * s.opacities), stable=True).numpy()
    means, quats = Y_DOWN.of_world(splats)
    table = np.empty(len(s), RECORD)
    table["position"], table["scale"] = means, s.scales.numpy()
    color, rotation = np.column_stack([s.colors.numpy(), s.opacities.numpy()]), unit(quats)
    finite = [np.isfinite(table[name]).all() for name in ("position", "scale")]
    if not all([*finite, np.isfinite(color).all(), np.isfinite(rotation).all()]):
        raise ValueError("splats: expected finite values and rotations other than 0, got NaN or infinite ones")
    table["color"], table["rotation"] = quantised(color * 255), quantised(rotation * 128 + 128)
    return table[order].tobytes()


def read_splat(data: bytes, path: Path) -> Splats:
    """Splats of a .splat file; float32, on the CPU.

    Raises ValueError (one line, naming `path`) for data of another length, or values that no splat has.
    """
    if len(data) % RECORD.itemsize:
        raise ValueError(f"{path}: expected records of {RECORD.itemsize} bytes, got {len(data)} bytes in all")
    table = np.frombuffer(data, RECORD)
    scales, quats = table["scale"].astype(np.float64), table["rotation"] / 128.0 - 1
    if not np.isfinite(table["position"]).all() or not (np.isfinite(scales) & (scales > 0)).all():
        raise ValueError(f"{path}: expected finite positions and positive scales, got something else")
    if not quats.any(1).all():
        raise ValueError(f"{path}: expected rotations other than 0, got one of length 0")
    colors, opacities = table["color"][:, :3] / 255.0, table["color"][:, 3]
    return to_splats(Y_DOWN, table["position"].astype(np.float64), unit(quats), np.log(scales), opacities, colors)
