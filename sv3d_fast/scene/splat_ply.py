"""Splats as a PLY file in the layout of 3D Gaussian splatting, which every splat viewer reads."""

from pathlib import Path

import numpy as np
import torch

from .splat_axes import Y_DOWN
from .splats import SH_C0, Splats

AXES = "x right, y down, z towards the front; the world (x front, y, z up) is (z, -x, -y) of this file"
PROPERTIES = (
    *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
)
TYPES = {"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8", "uchar": "u1", "uint8": "u1",
         "char": "i1", "int8": "i1", "short": "<i2", "int16": "<i2", "ushort": "<u2", "uint16": "<u2",
         "int": "<i4", "int32": "<i4", "uint": "<u4", "uint32": "<u4"}  # fmt: skip
MAX_HEADER = 1 << 16


def ply_bytes(splats: Splats) -> bytes:
    """A binary little-endian PLY: x y z nx ny nz f_dc_0..2 opacity scale_0..2 rot_0..3, float32.

    Opacities are logits, scales logarithms, rotations quaternions with w first, and colours coefficients of the
    constant spherical harmonic: f_dc = (color - 0.5) / SH_C0. Axes are y-down, as of COLMAP scenes, which viewers
    expect; the header says so. `read_ply` gives the same splats back, to float32 rounding.
    """
    s = splats.detach().to(device="cpu", dtype=torch.float64)
    table = np.zeros((len(s), len(PROPERTIES)), "<f4")
    table[:, :3], table[:, 13:] = Y_DOWN.of_world(splats)
    table[:, 6:9] = (s.colors.numpy() - 0.5) / SH_C0
    table[:, 9] = s.logit_opacities.numpy()
    table[:, 10:13] = s.log_scales.numpy()
    header = [
        "ply", "format binary_little_endian 1.0", "comment Gaussian splats written by sv3d-fast",
        f"comment axes: {AXES}", f"element vertex {len(s)}", *(f"property float {name}" for name in PROPERTIES),
        "end_header",
    ]  # fmt: skip
    return ("\n".join(header) + "\n").encode() + table.tobytes()


def read_ply(data: bytes, path: Path) -> Splats:
    """Splats of a PLY file of any 3DGS program, y-down as `ply_bytes` writes it; float32, on the CPU.

    Properties may stand in any order; those beyond the constant colour (f_rest_*) are left out.
    Raises ValueError (one line, naming `path`) for data that is truncated, of another format or not finite.
    """
    count, layout, start = _header(path, data)
    missing = [name for name in PROPERTIES if name not in (layout.names or ()) and not name.startswith("n")]
    if missing:
        raise ValueError(f"{path}: expected a splat PLY, got one without {', '.join(missing)}")
    if len(data) - start < count * layout.itemsize:
        raise ValueError(
            f"{path}: truncated: expected {count * layout.itemsize} bytes of splats, got {len(data) - start}"
        )
    rows = np.frombuffer(data, layout, count, start)

    def columns(*names: str) -> np.ndarray:
        return np.stack([rows[name].astype(np.float64) for name in names], -1)

    xyz, f_dc, scales = columns("x", "y", "z"), columns(*PROPERTIES[6:9]), columns(*PROPERTIES[10:13])
    means, quats = Y_DOWN.to_world(xyz, columns(*PROPERTIES[13:]))
    opacities = columns("opacity")[:, 0]
    values = (means, quats, scales, opacities, f_dc * SH_C0 + 0.5)
    if not all(np.isfinite(value).all() for value in values):
        raise ValueError(f"{path}: expected finite splats, got NaN or infinite values")
    return Splats(*(torch.from_numpy(value).float() for value in values))


def _header(path: Path, data: bytes) -> tuple[int, np.dtype, int]:
    """Number of splats, their record and where they start."""
    end = data.find(b"end_header\n", 0, MAX_HEADER)
    lines = data[: max(end, 0)].decode("ascii", "replace").splitlines()
    if end < 0 or lines[0].strip() != "ply":
        raise ValueError(f"{path}: expected a PLY file, got something else")
    if "format binary_little_endian 1.0" not in lines:
        raise ValueError(f"{path}: expected a binary little-endian PLY, got another PLY format")
    elements = [line.split() for line in lines if line.startswith("element ")]
    if not elements or elements[0][1:2] != ["vertex"] or len(elements[0]) != 3 or not elements[0][2].isdigit():
        raise ValueError(f"{path}: expected the splats as the first element, 'vertex'")
    first = [i for i, line in enumerate(lines) if line.startswith("element ")]
    fields = [line.split() for line in lines[first[0] + 1 : first[1] if len(first) > 1 else None]]
    fields = [field for field in fields if field[:1] == ["property"]]
    if any(len(field) != 3 or field[1] not in TYPES for field in fields) or len({f[2] for f in fields}) < len(fields):
        raise ValueError(f"{path}: expected scalar properties with names of their own")
    layout = np.dtype([(name, TYPES[kind]) for _, kind, name in fields])
    return int(elements[0][2]), layout, end + len(b"end_header\n")
