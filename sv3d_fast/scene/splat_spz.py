"""Splats as a .spz file, Niantic's compressed format: about a quarter of the PLY, for splats without harmonics.

A gzip stream (nianticlabs/spz, README and loader, versions 2 and 3): a header of 16 bytes, then attribute by attribute
for all splats: positions as 24-bit fixed point, opacities, colours, logarithms of the scales, rotations and spherical
harmonics. Axes are x right, y up, z backward.
"""

import gzip
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from .splat_axes import RIGHT_UP_BACK, quantised, to_splats, unit
from .splats import SH_C0, Splats

MAGIC, VERSION, HEADER = 0x5053474E, 3, "<IIIBBBB"
LARGEST = (1 << 23) - 1  # of a coordinate in 24 bits
FRACTIONAL_BITS = 16  # of coordinates where they fit; Niantic's writer takes 12, a quarter of a millimetre
COLOR_SCALE = 0.15 * 255  # per f_dc, around 127.5: colours somewhat beyond [0, 1] fit
SCALE_OFFSET, SCALE_STEPS = 10.0, 16.0  # byte = (log scale + offset) * steps
QUAT_STEPS = 511 * np.sqrt(2)  # three components below 1 / sqrt(2), 9 bits and a sign each
OTHERS = np.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])  # the components beside the largest
HARMONICS = {0: 0, 1: 9, 2: 24, 3: 45, 4: 72}  # bytes by degree
EXTENSIONS = 2  # flag
MOST_SPLATS = 10_000_000


def spz_bytes(splats: Splats) -> bytes:
    """Version 3, without harmonics. Within half a step: positions 2^-17 (more beyond 128 units), opacities and colours
    1/255 and 0.0074, log scales 1/16; rotations within 0.3 degrees. Log scales are clamped to -10..5.9, which only
    makes discs that are thinner than anything shows a little thicker; colours to -0.44..1.44.

    Raises ValueError for splats that aren't finite, of more than 2^23 units, or more than ten million.
    """
    s = splats.detach().to(device="cpu", dtype=torch.float64)
    if len(s) > MOST_SPLATS:
        raise ValueError(f"splats: expected at most {MOST_SPLATS} for an .spz file, got {len(s)}")
    means, quats = RIGHT_UP_BACK.of_world(splats)
    values = [s.opacities.numpy(), (s.colors.numpy() - 0.5) / SH_C0, s.log_scales.numpy(), unit(quats)]
    if not all(np.isfinite(value).all() for value in (means, *values)):
        raise ValueError("splats: expected finite values and rotations other than 0, got NaN or infinite ones")
    extent = np.abs(means).max(initial=2**-24)
    if extent > LARGEST:
        raise ValueError(f"splats: expected positions within {LARGEST} units for an .spz file, got {extent:.4g}")
    bits = min(FRACTIONAL_BITS, int(np.log2(LARGEST / extent)))
    fixed = np.round(means * 2.0**bits).astype("<i4")
    opacities, f_dc, log_scales, unit_quats = values
    body = [
        struct.pack(HEADER, MAGIC, VERSION, len(s), 0, bits, 0, 0),
        fixed.reshape(-1, 1).view(np.uint8)[:, :3].tobytes(),
        quantised(opacities * 255).tobytes(),
        quantised(f_dc * COLOR_SCALE + 127.5).tobytes(),
        quantised((log_scales + SCALE_OFFSET) * SCALE_STEPS).tobytes(),
        _packed(np.roll(unit_quats, -1, axis=1)).tobytes(),
    ]
    return gzip.compress(b"".join(body), mtime=0)


def read_spz(data: bytes, path: Path) -> Splats:
    """Splats of an .spz file of version 2 or 3; float32, on the CPU. Spherical harmonics are left out.

    Raises ValueError (one line, naming `path`) for data that is no gzip stream, truncated, of another version, or has
    extensions.
    """
    try:
        with gzip.open(io.BytesIO(data)) as stream:
            header = stream.read(struct.calcsize(HEADER))
            if len(header) < struct.calcsize(HEADER):
                raise ValueError(f"{path}: truncated: expected a header of 16 bytes, got {len(header)}")
            magic, version, count, degree, bits, flags, _ = struct.unpack(HEADER, header)
            if magic != MAGIC or version not in (2, 3):
                raise ValueError(f"{path}: expected an .spz file of version 2 or 3, got magic {magic:#x}, {version}")
            if count > MOST_SPLATS or degree not in HARMONICS or bits > 24 or flags & EXTENSIONS:
                raise ValueError(
                    f"{path}: expected at most {MOST_SPLATS} splats of degree 0 to 4 without extensions, "
                    f"got {count} of degree {degree}, {bits} fractional bits, flags {flags}"
                )
            sizes = [count * width for width in (9, 1, 3, 3, version + 1, HARMONICS[degree])]
            body = stream.read(sum(sizes))
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: expected an .spz file, got one that can't be unpacked ({error})") from error
    if len(body) < sum(sizes):
        raise ValueError(f"{path}: truncated: expected {sum(sizes)} bytes of splats, got {len(body)}")
    parts = np.split(np.frombuffer(body, np.uint8), np.cumsum(sizes)[:-1])
    positions, opacities, colors, scales, rotations = parts[:5]
    wide = np.pad(positions.reshape(-1, 3), [(0, 0), (1, 0)])  # 24 bits as the upper ones of 32, which keep the sign
    means = (wide.view("<i4").reshape(-1, 3) >> 8) / 2.0**bits
    xyzw = _unpacked(rotations.view("<u4")) if version == 3 else _with_w(rotations.reshape(-1, 3) / 127.5 - 1)
    log_scales = scales.reshape(-1, 3) / SCALE_STEPS - SCALE_OFFSET
    f_dc = (colors.reshape(-1, 3) - 127.5) / COLOR_SCALE
    return to_splats(RIGHT_UP_BACK, means, np.roll(xyzw, 1, axis=1), log_scales, opacities, f_dc * SH_C0 + 0.5)


def _packed(quats: np.ndarray) -> np.ndarray:
    """Unit quaternions (N, 4), w last, in 32 bits: the largest one's place (2 bits), then the other three (10 each)."""
    largest = np.abs(quats).argmax(1)
    rows = np.arange(len(quats))
    small = quats[rows[:, None], OTHERS[largest]] * np.where(quats[rows, largest] < 0, -1, 1)[:, None]
    codes = np.floor(np.abs(small) * QUAT_STEPS + 0.5).astype(np.uint32) | ((small < 0).astype(np.uint32) << 9)
    return (largest.astype(np.uint32) << 30 | codes[:, 0] << 20 | codes[:, 1] << 10 | codes[:, 2]).astype("<u4")


def _unpacked(codes: np.ndarray) -> np.ndarray:
    largest = codes >> 30
    fields = np.stack([codes >> 20, codes >> 10, codes], -1)
    small = (fields & 511) / QUAT_STEPS * np.where(fields & 512, -1, 1)
    quats = np.empty((len(codes), 4))
    rows = np.arange(len(codes))
    quats[rows[:, None], OTHERS[largest]] = small
    quats[rows, largest] = np.sqrt(np.maximum(1 - np.square(small).sum(1), 0))
    return quats


def _with_w(xyz: np.ndarray) -> np.ndarray:
    return np.column_stack([xyz, np.sqrt(np.maximum(1 - np.square(xyz).sum(1), 0))])
