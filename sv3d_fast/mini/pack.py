"""The pack: every object of the training data in one small file, and how it is read back.

A pack is a zip file. `index.json` lists the objects with their counts; `vertices`, `normals`, `faces` and `uvs` are
the arrays of all objects end to end, quantised, as differences of consecutive rows with the low and the high bytes
apart (LZMA); `textures/N` is the atlas of object N, JPEG or PNG. An object without a texture is painted when it is
read. Reading needs numpy and Pillow alone.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .geometry import fit_to_frame, shade_smoothly
from .materials import paint
from .shapes import make_shape

POSITION_STEP = 1 / 32767  # coordinates lie in [-1, 1]
FORMAT = 1
MAX_VERTICES = 65536
PROCEDURAL = "procedural"  # the source of shapes.py's objects
GENERATED = (PROCEDURAL, "pybullet")  # sources of objects that nobody modelled


@dataclass(frozen=True)
class Object:
    """A textured object, z up, front at +x, fitted to the frame (geometry.fit_to_frame).

    vertices: (V, 3) float32. faces: (F, 3) int32. uvs: (F, 3, 2) float32 in [0, 1], u right, v up.
    texture: (R, R, 3) uint8 sRGB, row 0 at v = 1. normals: (V, 3) float32, unit, or zero where there is none.
    name: title in its catalogue. key: unique. source, category, creator, licence: where it comes from.
    """

    name: str
    key: str
    source: str
    category: str
    creator: str
    licence: str
    split: str
    vertices: np.ndarray
    faces: np.ndarray
    uvs: np.ndarray
    texture: np.ndarray
    normals: np.ndarray


@dataclass(frozen=True)
class Entry:
    """What is packed: the arrays of an Object, uvs and texture None where it is to be painted when it is read."""

    name: str
    key: str
    source: str
    category: str
    creator: str
    licence: str
    split: str
    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray
    uvs: np.ndarray | None = None
    texture: np.ndarray | None = None


_TEXT = ("name", "key", "source", "category", "creator", "licence", "split")


def write_pack(path: str | Path, entries: Sequence[Entry]) -> None:
    """Writes `entries` to `path`. Raises ValueError for coordinates beyond 1 or more than 65,536 vertices."""
    index = []
    streams: dict[str, list[np.ndarray]] = {"vertices": [], "normals": [], "faces": [], "uvs": []}
    textures: dict[str, bytes] = {}
    for number, e in enumerate(entries):
        if len(e.vertices) > MAX_VERTICES or not np.abs(e.vertices).max() <= 1:
            raise ValueError(
                f"{e.key}: expected at most {MAX_VERTICES} vertices in [-1, 1], got {len(e.vertices)} up to "
                f"{np.abs(e.vertices).max()}"
            )
        streams["vertices"].append(np.round(e.vertices / POSITION_STEP).astype(np.int16))
        streams["normals"].append(np.round(e.normals * 127).astype(np.int8))
        streams["faces"].append(e.faces.astype(np.uint16))
        if e.uvs is not None and e.texture is not None:
            streams["uvs"].append(np.round(np.clip(e.uvs, 0, 1) * 65535).astype(np.uint16).reshape(-1, 2))
            textures[f"textures/{number}"] = _encode(e.texture)
        index.append(
            {k: getattr(e, k) for k in _TEXT}
            | {"vertices": len(e.vertices), "faces": len(e.faces), "textured": e.texture is not None}
        )
    empty = {"vertices": np.int16, "normals": np.int8, "faces": np.uint16}
    unfinished = Path(f"{path}.part")
    with zipfile.ZipFile(unfinished, "w") as file:
        header = json.dumps({"format": FORMAT, "objects": index}, ensure_ascii=False, indent=0)
        file.writestr("index.json", header, zipfile.ZIP_LZMA)
        for name, parts in streams.items():
            columns = 2 if name == "uvs" else 3
            rows = np.concatenate(parts) if parts else np.zeros((0, columns), empty.get(name, np.uint16))
            file.writestr(name, _squeeze(rows), zipfile.ZIP_LZMA)
        for name, data in textures.items():
            file.writestr(name, data, zipfile.ZIP_STORED)
    unfinished.replace(path)


def read_pack(path: str | Path, split: str = "all") -> list[Entry]:
    """Reads a pack's entries of one split. Raises ValueError for a file that is not a pack."""
    try:
        with zipfile.ZipFile(path) as file:
            header = json.loads(file.read("index.json"))
            if header["format"] != FORMAT:
                raise ValueError(f"{path}: expected a pack of format {FORMAT}, got {header['format']}")
            vertices = _expand(file.read("vertices"), np.int16, 3)
            normals = _expand(file.read("normals"), np.int8, 3)
            faces = _expand(file.read("faces"), np.uint16, 3)
            uvs = _expand(file.read("uvs"), np.uint16, 2)
            textures = {n: file.read(n) for n in file.namelist() if n.startswith("textures/")}
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path}: expected a pack written by sv3d_fast.mini.data, got {error}") from error
    entries = []
    v = f = t = 0
    for number, o in enumerate(header["objects"]):
        own_v, own_f = slice(v, v + o["vertices"]), slice(f, f + o["faces"])
        own_t = slice(t, t + (3 * o["faces"] if o["textured"] else 0))
        v, f, t = own_v.stop, own_f.stop, own_t.stop
        if split not in ("all", o["split"]):
            continue
        length = np.linalg.norm(normals[own_v].astype(np.float32), axis=1, keepdims=True)
        entries.append(
            Entry(
                **{k: o[k] for k in _TEXT},
                vertices=vertices[own_v].astype(np.float32) * np.float32(POSITION_STEP),
                faces=faces[own_f].astype(np.int32),
                normals=normals[own_v] / np.maximum(length, 1),
                uvs=uvs[own_t].astype(np.float32).reshape(-1, 3, 2) / 65535 if o["textured"] else None,
                texture=np.array(Image.open(io.BytesIO(textures[f"textures/{number}"])).convert("RGB"))
                if o["textured"]
                else None,
            )
        )
    return entries


def load_objects(path: str | Path, split: str = "train", procedural: int = 1200, seed: int = 0) -> list[Object]:
    """The objects of a pack and, in the splits "train" and "all", `procedural` generated ones.

    split: "train", "held_out" or "all". The same seed gives the same objects; it also paints those that come without
    a material. Raises ValueError for an unknown split or a file that is not a pack.
    """
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"split: expected train, held_out or all, got {split!r}")
    objects = []
    for number, e in enumerate(read_pack(path, split)):
        uvs, texture = e.uvs, e.texture
        if uvs is None or texture is None:
            uvs, texture = paint(e.vertices, e.faces, np.random.default_rng([seed, 1, number]))
        text = {k: getattr(e, k) for k in _TEXT}
        objects.append(Object(**text, vertices=e.vertices, faces=e.faces, uvs=uvs, texture=texture, normals=e.normals))
    if split != "held_out":
        objects.extend(procedural_object(seed, number) for number in range(procedural))
    return objects


def procedural_object(seed: int, number: int) -> Object:
    """The generated object `number` of the set that `seed` defines."""
    shape = make_shape(np.random.default_rng([seed, 2, number]))
    vertices, faces, normals = shade_smoothly(fit_to_frame(shape.vertices), shape.faces)
    return Object(
        name=shape.kind, key=f"procedural#{seed}-{number}", source=PROCEDURAL, category=shape.kind, creator="",
        licence="", split="train", vertices=vertices, faces=faces, uvs=shape.uvs, texture=shape.texture,
        normals=normals,
    )  # fmt: skip


def _encode(texture: np.ndarray) -> bytes:
    """PNG for atlases of few plain colours, JPEG without chroma subsampling (patches would bleed) for the rest."""
    buffer = io.BytesIO()
    picture = Image.fromarray(texture)
    colors = picture.getcolors(256)
    if colors is not None:
        picture.quantize(len(colors), dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=88, subsampling=0, optimize=True)
    return buffer.getvalue()


def _squeeze(rows: np.ndarray) -> bytes:
    """Differences of consecutive rows, wrapping around, with the bytes of equal weight together."""
    unsigned = rows.view(f"u{rows.itemsize}")
    delta = np.diff(unsigned, axis=0, prepend=np.zeros((1, rows.shape[1]), unsigned.dtype))
    return np.ascontiguousarray(
        delta.astype(f"<u{rows.itemsize}").view(np.uint8).reshape(-1, rows.itemsize).T
    ).tobytes()


def _expand(data: bytes, dtype: type, columns: int) -> np.ndarray:
    """The inverse of _squeeze."""
    width = np.dtype(dtype).itemsize
    planes = np.frombuffer(data, np.uint8).reshape(width, -1)
    delta = np.ascontiguousarray(planes.T).view(f"<u{width}").reshape(-1, columns)
    return np.cumsum(delta, axis=0, dtype=f"u{width}").view(dtype)
