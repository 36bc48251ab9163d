"""Photos to meshes in a single pass each, by TripoSR: streamed, one that fails fails alone, results are kept."""

import time
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .batch_source import SUFFIXES
from .camera import Orbit
from .devices import pick_device
from .events import Event, FileWritten, Progress, Warned
from .files import make_folder
from .formats import MESH_FORMATS
from .identity import digest_picture, model_identity
from .image import cut_out, read_picture
from .orbit_io import write_mp4
from .pipeline import manifest_header
from .preview import VIEWS, mesh_preview_image, write_picture
from .preview_settings import REPOSITORY, PreviewSettings
from .report import write_report
from .scene.export import Y_UP, save_mesh
from .scene.mesh import Mesh
from .scene.surface import is_closed
from .stages import Record, plain
from .triposr import TripoSR, prepare
from .triposr.graphed import why_not_fused
from .triposr.picture import on_grey
from .video import OrbitVideo

STAGE = "preview"
BATCH = {"cpu": 1, "cuda": 8}  # pictures in a pass: weights are read once for all of them, which pays on a GPU alone
CUT_OUT_SIZE = 1024  # pixels: an object that fills half of a large photo keeps what the networks see of it
DISTANCE, FIELD_OF_VIEW = 1.9, 40.0  # of TripoSR's cameras: world units, degrees
TURNTABLE_VIEWS, TURNTABLE_FPS = 30, 30


@dataclass(frozen=True)
class Previews:
    """How it ended. done: the folder of every photo that has its mesh; failed: the reason for every other photo."""

    folder: Path
    done: list[Path]
    failed: dict[Path, str]


@dataclass
class _Job:
    """A photo on its way. name: of its folder; picture: as the networks take it."""

    name: str
    photo: Path
    record: Record
    depends: dict[str, Any]
    picture: Image.Image


def open_triposr(settings: PreviewSettings) -> TripoSR:
    """The model that the settings name, on their device. Raises ValueError for one that can't be found or used."""
    device, name = pick_device(settings.device), str(settings.model)
    path = Path(name).expanduser()
    if not path.is_dir() and (path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ValueError(
            f"model: expected TripoSR's folder with config.yaml and model.ckpt or model.safetensors, {name} is none; "
            f"on Hugging Face it is {REPOSITORY}, and --model {REPOSITORY} downloads it; nothing is downloaded unasked"
        )
    model = TripoSR.from_pretrained(path if path.is_dir() else name, device=device)
    if settings.chunk_size is not None:
        model.renderer.set_chunk_size(settings.chunk_size)
    return model


def find_photos(sources: Iterable[Path]) -> dict[str, Path]:
    """Photos by the name of their folder below the output: the stem, or the whole name where stems are the same.

    A source is a photo or a folder of them, taken in order of their names. Raises ValueError for a folder without
    pictures, and for photos of one name.
    """
    photos: list[Path] = []
    for source in sources:
        found = [source]
        if source.is_dir():
            found = sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise ValueError(f"photo: expected at least one picture, {source} has none ({', '.join(SUFFIXES)})")
        photos += found
    stems = Counter(photo.stem.lower() for photo in photos)
    named = [(p.stem if stems[p.stem.lower()] == 1 else p.name, p) for p in photos]
    twice = [name for name, count in Counter(name.lower() for name, _ in named).items() if count > 1]
    if twice:
        raise ValueError(f"photo: expected a folder of its own for each picture, {twice[0]!r} is there twice")
    return dict(named)


def previewing(
    sources: Sequence[str | Path],
    output: str | Path,
    settings: PreviewSettings,
    *,
    overwrite: bool = False,
    model: TripoSR | None = None,
) -> Generator[Event, None, Previews]:
    """Photos, and folders of them, each to a folder of its own below `output`: meshes, a report, a manifest.

    Photos are taken a batch at a time, so memory doesn't grow with their number. One that fails, fails alone, with a
    warning; one whose folder an earlier call filled from the same photo and settings is done, unless `overwrite`.
    Yields a Progress per photo and the files. model: the settings' one, if it is open already.
    Raises ValueError for what concerns all photos: the settings, the model, the folder, sources without pictures.
    """
    device = pick_device(settings.device)
    photos = list(find_photos(map(Path, sources)).items())
    network = model or open_triposr(settings)
    plan, folder = _plan(settings), make_folder(output)
    common = {k: v for k, v in settings.to_dict().items() if k not in ("chunk_size", "batch_size", "device")} | {
        "model": model_identity(str(settings.model)),
        "matting_model": settings.matting_model and model_identity(settings.matting_model),
    }
    header = manifest_header("", device, settings.to_dict())
    result = Previews(folder, [], {})

    def ended(name: str, photo: Path, error: Exception | None = None) -> Generator[Event, None, None]:
        if error is None:
            result.done.append(folder / name)
        else:
            result.failed[photo] = _reason(photo, error)
            yield Warned(STAGE, result.failed[photo])
        yield Progress(STAGE, len(result.done) + len(result.failed), len(photos))

    size = settings.batch_size or BATCH[device.type]
    for start in range(0, len(photos), size):
        jobs = []
        for name, photo in photos[start : start + size]:
            try:
                depends = common | {"picture": digest_picture(photo)}
                record = Record.open(folder / name, device, plan, {**header, "input": photo.name}, overwrite=overwrite)
                if others := sorted(record.before.keys() - plan.keys()):
                    raise ValueError(f"{folder / name}: holds {others[0]} of another command; give another folder")
                if all(record.is_finished(stage, depends) for stage in _stages(settings)):
                    yield from ended(name, photo)
                else:
                    jobs.append(_Job(name, photo, record, depends, _picture(photo, settings)))
            except Exception as error:
                yield from ended(name, photo, error)
        if not jobs:
            continue
        began = time.perf_counter()
        try:
            with torch.no_grad():
                how = "plain" if why_not_fused(network) else "fused"
                codes = network([job.picture for job in jobs], device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:
            for job in jobs:
                yield from ended(job.name, job.photo, error)
            continue
        seconds = round((time.perf_counter() - began) / len(jobs), 3)
        notes = {"network": how, "network_seconds": seconds, "batch": len(jobs)}
        for job, code in zip(jobs, codes, strict=True):
            try:
                for event in _finishing(job, network, code, settings, notes):
                    if isinstance(event, FileWritten):
                        yield event
            except Exception as error:
                yield from ended(job.name, job.photo, error)
            else:
                yield from ended(job.name, job.photo)
    return result


def _stages(settings: PreviewSettings) -> list[str]:
    return ["mesh", "turntable", "report"] if settings.turntable else ["mesh", "report"]


def _plan(settings: PreviewSettings) -> dict[str, tuple[str, ...]]:
    """What each stage writes; under "other", what only other settings would write, which goes."""
    textured = settings.texture_resolution is not None
    meshes = {file for kind in settings.mesh_formats for file in MESH_FORMATS[kind][: None if textured else 1]}
    every = {file for files in MESH_FORMATS.values() for file in files}
    return {
        "mesh": ("input.png", *sorted(meshes)),
        "turntable": ("render.mp4",),
        "report": ("preview.png", "report.html"),
        "other": tuple(sorted(every - meshes)),
    }


def _picture(photo: Path, settings: PreviewSettings) -> Image.Image:
    """The square on grey that the networks take, or the whole picture if its background is to stay."""
    if settings.remove_background:
        return prepare(
            cut_out(photo, size=CUT_OUT_SIZE, matting_model=settings.matting_model), settings.foreground_ratio
        )
    picture = read_picture(photo)
    return on_grey(picture) if picture.mode == "RGBA" else picture


def _finishing(
    job: _Job, network: TripoSR, code: torch.Tensor, settings: PreviewSettings, notes: dict[str, Any]
) -> Generator[Event, None, None]:
    """A scene code (3, C, S, S) to the files of its photo."""
    record, folder = job.record, job.record.folder

    def shape() -> Generator[Event, None, Mesh]:
        yield from ()
        record.note(**notes)
        mesh = network.extract_mesh(code[None], True, settings.mc_resolution)[0]
        if settings.texture_resolution is None:
            return mesh
        return network.bake_texture(mesh, code, settings.texture_resolution)

    def save_shape(mesh: Mesh) -> Iterable[Path]:
        yield write_picture(folder / "input.png", job.picture)
        for kind in settings.mesh_formats:
            yield from save_mesh(_in_axes(mesh, kind, settings.axes), folder / f"mesh.{kind}")

    def turn() -> Generator[Event, None, OrbitVideo]:
        yield from ()
        (views,) = network.render(code[None], TURNTABLE_VIEWS, camera_distance=DISTANCE, fovy_deg=FIELD_OF_VIEW)
        frames = torch.from_numpy(np.stack([np.asarray(view) for view in views]))
        return OrbitVideo(frames, _cameras(TURNTABLE_VIEWS))

    def judge() -> Generator[Event, None, dict[str, Any]]:
        yield from ()
        return {
            "Vertices": len(mesh.vertices),
            "Faces": len(mesh.faces),
            "Watertight": is_closed(mesh),
            "Grid points along a side": settings.mc_resolution,
        }

    mesh = yield from record.stage("mesh", job.depends, shape, save_shape)
    if settings.turntable:
        yield from record.stage(
            "turntable", job.depends, turn, lambda video: [write_mp4(video, folder / "render.mp4", TURNTABLE_FPS)]
        )
    record.manifest["figures"] = yield from record.stage(
        "report", job.depends, judge,
        lambda _: [write_picture(folder / "preview.png", mesh_preview_image(job.picture, mesh, _cameras(VIEWS)))],
    )  # fmt: skip
    record.write()
    yield FileWritten(write_report(folder, plain(record.manifest), plain(record.manifest["figures"])))


def _cameras(views: int) -> Orbit:
    """Those of TripoSR.render: level, the input view first."""
    return Orbit(torch.zeros(views), torch.arange(views) * (360 / views), DISTANCE, FIELD_OF_VIEW)


def _in_axes(mesh: Mesh, kind: str, axes: str) -> Mesh:
    """The mesh turned such that its file of this kind has these axes."""
    if axes == "gltf" or f".{kind}" not in Y_UP:
        return mesh
    return replace(mesh, vertices=mesh.vertices[:, [2, 0, 1]])  # undoes the turn to y up that save_mesh makes


def _reason(photo: Path, error: Exception) -> str:
    """One line that names the photo."""
    text = " ".join((str(error) or type(error).__name__).split())
    if not isinstance(error, ValueError | OSError | MemoryError | RuntimeError):
        text = f"{type(error).__name__}: {text}"
    return text if str(photo) in text else f"{photo}: {text}"
