"""Splats to files and back, in the format that the suffix names."""

import os
from pathlib import Path

from sv3d_fast.files import write_bytes

from .splat_antimatter import read_splat, splat_bytes
from .splat_ply import ply_bytes, read_ply
from .splat_spz import read_spz, spz_bytes
from .splats import Splats

FORMATS = {".ply": (ply_bytes, read_ply), ".splat": (splat_bytes, read_splat), ".spz": (spz_bytes, read_spz)}
MAX_BYTES = 4 << 30


def save_splats(splats: Splats, path: str | os.PathLike) -> Path:
    """Writes .ply (exact), .splat (32 bytes a splat) or .spz (about 18 bytes a splat); returns the path.

    PLY and .splat are y-down, .spz is y-up with the front at +z; see their modules for layouts and precision.
    Raises ValueError for another suffix and for splats that the format can't hold; OutputError.
    """
    path = Path(path)
    write, _ = _format(path)
    return write_bytes(path, write(splats))


def load_splats(path: str | os.PathLike) -> Splats:
    """Reads a splat file of any program, by its suffix; float32, on the CPU, in the world's axes.

    Raises ValueError (one line) for a file that is missing, damaged, over 4 GB or of another format.
    """
    path = Path(path)
    _, read = _format(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: expected a file of at most 4 GB")
    return read(path.read_bytes(), path)


def _format(path: Path):
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"path: expected a name ending in {', '.join(FORMATS)}, got {path.name!r}")
    return FORMATS[path.suffix.lower()]
