"""Reads Sweet Home 3D's furniture libraries (.sh3f): which models there are, their meshes, authors and licences."""

import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .bake import open_texture
from .obj import Material, ObjModel, read_obj

LIBRARIES = {  # file name: (short name, licence)
    "BlendSwap-CC-0.sh3f": ("BlendSwap CC-0", "CC0-1.0"),
    "BlendSwap-CC-BY.sh3f": ("BlendSwap CC-BY", "CC-BY-3.0"),
    "KatorLegaz.sh3f": ("Kator Legaz", "CC-BY-3.0-US"),
    "Scopia.sh3f": ("Scopia", "CC-BY-3.0"),
}
CHARACTERS = "Characters"
UNSUITED = (CHARACTERS, "Doors and windows", "Staircases")
FACES = (200, 100_000)
FLATNESS = 0.15  # shortest side of the bounding box over the longest
# what can still be learnt from: flatter and cruder ones, and those of one colour
USABLE_FACES = (50, FACES[1])
USABLE_FLATNESS = 0.04
HELD_OUT = 8  # one name in eight


@dataclass(frozen=True)
class Model:
    """One entry of a library, its mesh turned as the catalogue says (y up, front +z), and its pictures by name."""

    title: str
    key: str
    library: str
    category: str
    creator: str
    licence: str
    mesh: ObjModel
    pictures: dict[str, np.ndarray]


def split_of(title: str) -> str:
    """ "held_out" for one title in eight, else "train". `title` is the catalogue's `name#N` value as it stands there
    ("Armchair"), so all models of one title are on the same side."""
    return "held_out" if zlib.crc32(title.encode("utf-8")) % HELD_OUT == 0 else "train"


def read_properties(text: str) -> list[dict[str, str]]:
    """The numbered entries of a PluginFurnitureCatalog.properties, in order: [{"name": ..., "model": ...}, ...]."""
    entries: dict[int, dict[str, str]] = {}
    for key, number, value in re.findall(r"^([A-Za-z]+)#(\d+)[ \t]*=[ \t]*(.*?)\s*$", text, re.MULTILINE):
        entries.setdefault(int(number), {})[key] = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), value)
    return [entries[n] for n in sorted(entries)]


def suited(mesh: ObjModel) -> bool:
    """Whether a mesh makes a good subject of an orbit: not flat, neither crude nor huge, not of one colour."""
    seen = [mesh.palette[i] for i in np.unique(mesh.materials)]
    colorful = any(m.texture for m in seen) or len({m.color for m in seen}) >= 2
    return colorful and _sound(mesh, FLATNESS, FACES)


def usable(mesh: ObjModel) -> bool:
    """Whether a mesh is worth training on, suited or not."""
    return _sound(mesh, USABLE_FLATNESS, USABLE_FACES)


def _sound(mesh: ObjModel, flatness: float, faces: tuple[int, int]) -> bool:
    if not faces[0] <= len(mesh.faces) <= faces[1]:
        return False
    extents = np.ptp(mesh.vertices[np.unique(mesh.faces)], axis=0)
    return bool(extents.min() >= flatness * extents.max())


def read_library(path: Path, piece: int = 0, pieces: int = 1) -> Iterator[Model]:
    """The models of a library, in catalogue order; only every `pieces`-th entry, from `piece` on.

    What is held out are suited models alone; what is trained on are usable ones, but nobody's likeness.
    """
    library, licence = LIBRARIES[path.name]
    with zipfile.ZipFile(path) as archive:
        names = {n.lower(): n for n in archive.namelist()}
        entries = read_properties(archive.read("PluginFurnitureCatalog.properties").decode("latin-1"))
        for entry in entries[piece::pieces]:
            if entry["category"] == CHARACTERS:
                continue
            mesh, pictures = _read_model(archive, names, entry)
            good = entry["category"] not in UNSUITED and suited(mesh)
            if good or (usable(mesh) and split_of(entry["name"]) == "train"):
                yield Model(
                    entry["name"], entry["id"], library, entry["category"], entry.get("creator", library), licence,
                    mesh, pictures,
                )  # fmt: skip


def _read_model(archive: zipfile.ZipFile, names: dict[str, str], entry: dict[str, str]):
    """(mesh, pictures) of an entry. Materials whose texture is not in the library lose it."""
    path = entry["model"].lstrip("/")
    folder = path.rpartition("/")[0]

    def find(name: str) -> str | None:
        return names.get(f"{folder}/{name.rpartition('/')[2]}".lower())

    def read_sibling(name: str) -> str:
        found = find(name)
        return archive.read(found).decode("latin-1") if found else ""

    mesh = read_obj(archive.read(path).decode("latin-1"), read_sibling)
    pictures, palette = {}, []
    for material in mesh.palette:
        found = find(material.texture) if material.texture else None
        if found and found not in pictures:
            pictures[found] = open_texture(io.BytesIO(archive.read(found)))
        palette.append(Material(material.color, found))
    vertices = mesh.vertices
    if "modelRotation" in entry:
        vertices = vertices @ np.array(entry["modelRotation"].split(), dtype=np.float64).reshape(3, 3).T
    return ObjModel(vertices, mesh.faces, mesh.uvs, mesh.materials, tuple(palette)), pictures
