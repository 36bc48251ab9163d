"""Makes the training data of the embedded model: `python -m sv3d_fast.mini.data --output objects.pack`.

Two public packages are fetched by name and packed: the furniture libraries of Sweet Home 3D (Debian's
sweethome3d-furniture, CC0 and CC-BY models with materials) and the random shapes of pybullet (PyPI, zlib licence,
painted when they are read). Generated shapes (shapes.py) need no bytes. Read the pack with `load_objects`.
"""

import argparse
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from sv3d_fast.events import Event, FileWritten, Progress, StageStarted, Warned, finish

from .bake import bake
from .catalogue import LIBRARIES, Model, read_library, split_of
from .decimate import decimate
from .geometry import fit_to_frame, shade_smoothly
from .obj import read_obj
from .pack import MAX_VERTICES, Entry, Object, load_objects, write_pack

__all__ = ["Object", "build", "load_objects"]

DEBIAN_PACKAGE = "sweethome3d-furniture"
PYBULLET = "pybullet==3.2.7"
MAX_FACES = 6000
ATLAS = 256
PIECES = 12  # jobs per library, so that progress shows and cores share the work
LICENCE_LINKS = {
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY-3.0-US": "https://creativecommons.org/licenses/by/3.0/us/",
}


def to_world(vertices: np.ndarray) -> np.ndarray:
    """Vertices of the catalogue (y up, front +z) in the world's axes (z up, front +x)."""
    return vertices[:, [2, 0, 1]]


def to_entry(model: Model) -> Entry:
    """A catalogue model, thinned out, baked, fitted to the frame and shaded, ready to pack."""
    mesh = decimate(model.mesh, MAX_FACES)
    uvs, texture = bake(mesh, model.pictures, ATLAS)
    used, faces = np.unique(mesh.faces, return_inverse=True)
    vertices, faces, normals = shade_smoothly(
        fit_to_frame(to_world(mesh.vertices[used])), faces.reshape(mesh.faces.shape)
    )
    return Entry(
        model.title, model.key, model.library, model.category, model.creator, model.licence, split_of(model.title),
        vertices, faces, normals, uvs, texture,
    )  # fmt: skip


def pybullet_entries(wheel: Path) -> list[Entry]:
    """The 999 sound random shapes of pybullet, without materials."""
    entries = []
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if re.fullmatch(r"pybullet_data/random_urdfs/\d+/\d+\.obj", n)]
        for name in sorted(names):
            mesh = read_obj(archive.read(name).decode("latin-1"), lambda _: "")
            used, faces = np.unique(mesh.faces, return_inverse=True)
            if not np.isfinite(mesh.vertices[used]).all():
                continue  # one of them has vertices that are not numbers
            arrays = shade_smoothly(fit_to_frame(mesh.vertices[used]), faces.reshape(mesh.faces.shape))
            key = f"pybullet#{name.split('/')[-2]}"
            entries.append(Entry("Random shape", key, "pybullet", "Shape", "Erwin Coumans", "Zlib", "train", *arrays))
    return entries


def fetch(cache: Path) -> tuple[Path, Path]:
    """(folder of .sh3f libraries, pybullet wheel), downloaded into `cache` unless they are there already.

    Raises RuntimeError, with the tool's own message, where a download fails.
    """
    cache.mkdir(parents=True, exist_ok=True)
    libraries = cache / "usr/share/sweethome3d/furniture"
    if not libraries.exists():
        _run(["apt-get", "download", DEBIAN_PACKAGE], cache)
        _run(["dpkg", "-x", str(next(cache.glob(f"{DEBIAN_PACKAGE}_*.deb")).name), "."], cache)
    if not list(cache.glob("pybullet-*.whl")):
        _run([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", PYBULLET], cache)
    return libraries, next(cache.glob("pybullet-*.whl"))


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")


def _library_entries(path: Path, piece: int) -> list[Entry]:
    entries = map(to_entry, read_library(path, piece, PIECES))
    return [entry for entry in entries if len(entry.vertices) <= MAX_VERTICES]


def build(output: Path, cache: Path, workers: int = 2) -> Generator[Event, None, list[Entry]]:
    """Fetches, converts and packs everything, and writes licences.md beside the pack; returns the entries."""
    libraries, wheel = fetch(cache)
    jobs = [(libraries / name, piece) for name in LIBRARIES for piece in range(PIECES)]
    yield StageStarted("data")
    entries: list[Entry] = []
    with ProcessPoolExecutor(workers) as pool:
        for done, part in enumerate(pool.map(_library_entries, *zip(*jobs, strict=True)), 1):
            entries.extend(part)
            yield Progress("data", done, len(jobs) + 1, {"objects": len(entries)})
    entries.sort(key=lambda e: e.key)
    entries.extend(pybullet_entries(wheel))
    yield Progress("data", len(jobs) + 1, len(jobs) + 1, {"objects": len(entries)})
    held_out = sum(e.split == "held_out" for e in entries)
    if not held_out:
        yield Warned("data", "no object is held out")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_pack(output, entries)
    yield FileWritten(output)
    notice = output.with_name("licences.md")
    notice.write_text(licences(entries), encoding="utf-8")
    yield FileWritten(notice)
    return entries


def licences(entries: Sequence[Entry]) -> str:
    """Markdown: title, author, library and licence of every model that the embedded model is trained on."""
    models = [e for e in entries if e.split == "train" and e.licence in LICENCE_LINKS]
    lines = [
        "# 3D models used to train the embedded model",
        "",
        f"{len(models)} models of the Sweet Home 3D furniture libraries (https://www.sweethome3d.com), edited by",
        "Emmanuel Puybaret / eTeks. They were simplified, re-textured and rendered; the weights were trained on those",
        "renders. Besides them: the random shapes of pybullet (Erwin Coumans, zlib licence) and generated shapes.",
        "",
        *(f"- {name}: {link}" for name, link in LICENCE_LINKS.items()),
        "",
        "| model | identifier | author | licence |",
        "|---|---|---|---|",
    ]
    lines += [f"| {e.name} | {e.key} | {e.creator} | {e.licence} |" for e in models]
    return "\n".join(lines) + "\n"


def render_examples(pack: Path, folder: Path, count: int = 4, size: int = 576) -> list[Path]:
    """Input pictures: RGBA PNGs of the held-out models with the lowest crc32 of their title, one a title, seen from
    elevation 10, azimuth 0, under the light of the evaluation."""
    import torch
    from PIL import Image

    from sv3d_fast.camera import Orbit
    from sv3d_fast.kernels.mesh_raster import mesh_render

    from .scenes import STANDARD_AMBIENT, STANDARD_LIGHTS

    first: dict[int, Object] = {}
    for o in load_objects(pack, "held_out"):
        first.setdefault(zlib.crc32(o.name.encode("utf-8")), o)
    camera = Orbit.static(10.0, 1)
    lights = torch.tensor(STANDARD_LIGHTS)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for code in sorted(first)[:count]:
        o = first[code]
        arrays = [torch.from_numpy(a) for a in (o.vertices, o.faces, o.uvs, o.texture, o.normals)]
        rgb, alpha = mesh_render(
            *arrays, camera.world_to_camera(), camera.intrinsics(size), size, lights, STANDARD_AMBIENT, (1.0,) * 3, 3
        )  # fmt: skip
        path = folder / (re.sub(r"[^a-z0-9]+", "-", o.name.lower()).strip("-") + ".png")
        share = np.maximum(alpha[0].numpy()[..., None] / 255, 1 / 255)
        color = np.clip((rgb[0].numpy() - 255 * (1 - share)) / share + 0.5, 0, 255)  # without the white behind it
        Image.fromarray(np.dstack([color.astype(np.uint8), alpha[0].numpy()])).save(path, optimize=True)
        paths.append(path)
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sv3d_fast.mini.data", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/data/objects.pack"), help="the pack")
    parser.add_argument("--cache", type=Path, default=Path("build/data/cache"), help="where downloads are kept")
    parser.add_argument("--workers", type=int, default=2, help="processes that convert models")
    parser.add_argument("--examples", type=Path, help="only render four held-out input pictures into this folder")
    options = parser.parse_args(arguments)
    if options.examples:
        for path in render_examples(options.output, options.examples):
            print(path)
        return
    entries = finish(_shown(build(options.output, options.cache, options.workers)))
    held_out = sum(e.split == "held_out" for e in entries)
    megabytes = options.output.stat().st_size / 1e6
    print(f"{options.output}: {len(entries)} objects, {held_out} held out, {megabytes:.1f} MB")


def _shown(stage: Generator[Event, None, list[Entry]]) -> Generator[Event, None, list[Entry]]:
    while True:
        try:
            event = next(stage)
        except StopIteration as stop:
            return stop.value
        if isinstance(event, Progress):
            print(f"{event.done}/{event.total}: {event.figures['objects']:.0f} objects", flush=True)
        yield event


if __name__ == "__main__":
    main()
