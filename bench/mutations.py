"""Damaged copies of small valid files, and what reads them: pictures and orbits as uploaded, checkpoints."""

import io
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from sv3d_fast.camera import Orbit
from sv3d_fast.image import load_subject
from sv3d_fast.orbit_io import load_orbit, save_orbit
from sv3d_fast.triposr.weights import load_weights
from sv3d_fast.video import OrbitVideo

NUMBER = re.compile(rb"\d+")
EXTREMES = [
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"[]",
    b"4294967295",
    b"9223372036854775807",
    b"18446744073709551616",
]
EDITS = ("flip", "cut", "insert", "splice", "number")


@dataclass(frozen=True)
class Sample:
    """A valid file. path: where its damaged copies are put for `read`, which takes that path."""

    name: str
    path: Path
    data: bytes = field(repr=False)
    read: Callable[[Path], object] = field(repr=False)


@dataclass(frozen=True)
class Edit:
    """One change. where: in (-1, 1), a place in the file, logarithmic from its start or, if negative, from its end,
    since that is where headers and directories are. value: what is written there; size: bytes that a splice moves.
    """

    kind: str
    where: float
    value: bytes
    size: int

    def __post_init__(self):
        if self.kind not in EDITS:
            raise ValueError(f"kind: expected one of {', '.join(EDITS)}, got {self.kind!r}")


def mutated(data: bytes, donor: bytes, edits: Sequence[Edit], repair: bool) -> bytes:
    """`data` after the edits. donor: the file that splices take bytes from. repair: checksums and lengths are made
    right afterwards, so that damage gets past the first check."""
    for edit in edits:
        if not data:
            break
        data = _edited(data, donor, edit)
    return _repaired(data) if repair else data


def _edited(data: bytes, donor: bytes, edit: Edit) -> bytes:
    at = _place(len(data), edit.where)
    if edit.kind == "flip":
        return (
            data[:at] + bytes(a ^ b for a, b in zip(data[at:], edit.value, strict=False)) + data[at + len(edit.value) :]
        )
    if edit.kind == "cut":
        return data[:at]
    if edit.kind == "insert":
        return data[:at] + edit.value + data[at:]
    if edit.kind == "splice":
        source = _place(len(donor), -edit.where)
        return data[:at] + donor[source : source + edit.size] + data[at + edit.size // 2 :]
    numbers = list(NUMBER.finditer(data, 0, 1 << 16))
    if not numbers:
        return data
    number = numbers[edit.size % len(numbers)]
    return data[: number.start()] + EXTREMES[sum(edit.value) % len(EXTREMES)] + data[number.end() :]


def _place(length: int, where: float) -> int:
    at = min(int(length ** abs(where)), length) - 1
    return at if where >= 0 else length - 1 - at


def _repaired(data: bytes) -> bytes:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _with_checksums(data)
    end = data.rfind(b"}}") + 2
    if data[8:9] == b"{" and end > 9:  # safetensors: the header's length, with the spaces that fill it up
        end += len(data[end:]) - len(data[end:].lstrip(b" "))
        return (end - 8).to_bytes(8, "little") + data[8:]
    return data


def _with_checksums(png: bytes) -> bytes:
    parts, at = [png[:8]], 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        if end + 4 > len(png):
            break
        parts += [png[at:end], zlib.crc32(png[at + 4 : end]).to_bytes(4, "big")]
        at = end + 4
    return b"".join([*parts, png[at:]])


def uploads(folder: Path) -> list[Sample]:
    """Pictures of every format that is read, and orbits in every form."""
    values = np.random.default_rng(0).integers(0, 256, (6, 6, 4), np.uint8)
    rgba = Image.fromarray(values).resize((24, 20), Image.Resampling.BICUBIC)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    made: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("rgba.png", rgba, {}), ("palette.png", rgb.quantize(16), {"transparency": 3}), ("deep.png", deep, {}),
        ("turned.jpg", rgb, {"exif": exif}), ("progressive.jpg", rgb, {"progressive": True}),
        ("cmyk.jpg", rgb.convert("CMYK"), {}), ("lossy.webp", rgba, {}), ("lossless.webp", rgba, {"lossless": True}),
        ("plain.gif", rgb.quantize(16), {"transparency": 1}), ("plain.tif", rgba, {"exif": exif}),
        ("lzw.tif", rgb, {"compression": "tiff_lzw"}), ("deep.tif", deep, {"compression": "tiff_adobe_deflate"}),
        ("jpeg.tif", rgb, {"compression": "jpeg"}), ("plain.bmp", rgb, {}), ("palette.bmp", rgb.quantize(16), {}),
        ("plain.ppm", rgb, {}), ("wavelet.jp2", rgb, {}), ("rle.tga", rgba, {"compression": "tga_rle"}),
        ("plain.ico", rgba, {"sizes": [(16, 16)]}), ("plain.avif", rgba, {}),
    ]  # fmt: skip
    samples = []
    for name, image, options in made:
        suffix, buffer = Path(name).suffix, io.BytesIO()
        image.save(buffer, "JPEG2000" if suffix == ".jp2" else Image.registered_extensions()[suffix], **options)
        samples.append(Sample(name, folder / name, buffer.getvalue(), _read_picture))
    return [*samples, *_orbits(folder)]


def _read_picture(path: Path) -> object:
    return load_subject(path, size=32, remove_background="never")


def _orbits(folder: Path) -> list[Sample]:
    frames = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), np.uint8))
    video = OrbitVideo(frames, Orbit.static(10, 5), torch.ones(5, 16, 16))
    for name in ("transforms", "colmap"):
        save_orbit(video, folder / name)
    (folder / "colmap" / "transforms.json").unlink()
    model = folder / "colmap" / "sparse" / "0"
    places = {
        folder / "transforms" / "transforms.json": load_orbit,
        model / "cameras.txt": lambda path: load_orbit(path.parents[2]),
        model / "images.txt": lambda path: load_orbit(path.parents[2]),
        folder / "colmap" / "orbit.gif": load_orbit,
        folder / "colmap" / "orbit.mp4": load_orbit,
    }
    return [Sample(path.name, path, path.read_bytes(), read) for path, read in places.items()]


def checkpoints(folder: Path) -> list[Sample]:
    """A small network's weights in safetensors, in torch's archive and in torch's older pickle."""
    torch.manual_seed(0)
    network = _network()
    state = network.state_dict()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(state, folder / "model.ckpt")
    torch.save(state, folder / "model.pth", _use_new_zipfile_serialization=False)
    paths = [folder / name for name in ("model.safetensors", "model.ckpt", "model.pth")]
    return [Sample(path.name, path, path.read_bytes(), _read_weights) for path in paths]


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Conv1d(3, 2, 1, dtype=torch.float16))


def _read_weights(path: Path) -> object:
    with torch.device("meta"):
        network = _network()
    load_weights(network, path, torch.float32, torch.device("cpu"))
    return network
