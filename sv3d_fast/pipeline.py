"""The whole: a photo to an orbit, splats, a textured mesh and a report, as events and as one call."""

import hashlib
import json
import platform
from collections.abc import Generator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from . import __version__
from .camera import Orbit
from .events import Event, FileWritten, Warned, finish
from .files import make_folder
from .generation import generating
from .image import Subject, load_subject
from .info import chosen_implementations
from .model.weights import SV3DModel, load_model
from .orbit_io import load_orbit, save_orbit
from .preview import render_mesh, write_preview
from .report import write_report
from .scene.export import load_mesh, load_splats, save_mesh, save_splats
from .scene.fit import fitting, render
from .scene.hull import estimate_elevation, visual_hull
from .scene.masks import foreground
from .scene.mesh import Mesh
from .scene.metrics import psnr
from .scene.splats import Splats
from .scene.surface import extracting, is_closed
from .scene.texture import baking
from .settings import EMBEDDED, Settings
from .stages import Record
from .video import OrbitVideo

TIER = "exact"
EMBEDDED_WEIGHTS = Path(__file__).parent / "mini" / "weights"
EMBEDDED_RATIO = 0.85  # how the embedded model's training pictures were framed
ORBIT_FILES = ("transforms.json", "orbit.mp4", "orbit.gif", "frames")
MESH_FILES = ("mesh.glb", "mesh.obj")
PACKAGES = ("torch", "triton", "numpy", "diffusers", "transformers", "gsplat", "trimesh", "xatlas", "pillow", "av")


@dataclass(frozen=True)
class Result:
    """What a run made and where it stands. figures: numbers of the report (PSNR, faces, watertight, ...)."""

    folder: Path
    video: OrbitVideo
    splats: Splats
    mesh: Mesh
    figures: dict


def open_model(settings: Settings) -> SV3DModel:
    """The model that the settings name, on their device. Raises ValueError for weights that can't be used."""
    device = pick_device(settings.device)
    path = EMBEDDED_WEIGHTS if settings.model == EMBEDDED else settings.model
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return load_model(path, dtype=dtype, device=device)


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one. Raises ValueError for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def make_orbit(settings: Settings) -> Orbit:
    """The cameras that the settings describe. Raises ValueError for a file of poses that can't be read."""
    if settings.orbit == "static":
        return Orbit.static(settings.elevation)
    if settings.orbit == "sine":
        return Orbit.sine(settings.elevation)
    path = Path(settings.orbit)
    if not path.is_file():
        raise ValueError(f"orbit: expected static, sine or a JSON file of poses, got {settings.orbit!r}")
    try:
        poses = json.loads(path.read_text())
        return Orbit.from_poses(poses)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f'orbit: expected {path} to be a list of {{"elevation": e, "azimuth": a}}: {error}') from error


def running(
    photo: str | Path,
    output: str | Path,
    settings: Settings,
    *,
    overwrite: bool = False,
    model: SV3DModel | None = None,
) -> Generator[Event, None, Result]:
    """A photo to everything that `run` writes into `output`: yields events, returns a Result.

    A second run into the same folder takes up what an earlier one finished from the same photo and settings;
    `overwrite` starts anew. Every file appears whole or not at all. model: one that is open already.
    Raises ValueError for what the user can mend: the picture, the settings, the weights, the folder.
    """
    subject, video, record = yield from orbiting(photo, output, settings, overwrite=overwrite, model=model)
    return (yield from _reconstructing(video, subject, settings, record))


def run(photo: str | Path, output: str | Path, *, overwrite: bool = False, **settings) -> Result:
    """`running` without its events; `settings` are those of Settings."""
    return finish(running(photo, output, Settings(**settings), overwrite=overwrite))


def orbiting(
    photo: str | Path,
    output: str | Path,
    settings: Settings,
    *,
    overwrite: bool = False,
    model: SV3DModel | None = None,
) -> Generator[Event, None, tuple[Subject, OrbitVideo, Record]]:
    """The first half of `running`: the photo's orbit and its files."""
    orbit = make_orbit(settings)
    record = _open_record(output, settings, overwrite)
    model = model or open_model(settings)
    size = settings.frame_size or model.config.image_size
    ratio = settings.foreground_ratio or (EMBEDDED_RATIO if settings.model == EMBEDDED else None)
    subject = load_subject(
        photo, size=size, foreground_ratio=ratio, matting_model=settings.matting_model,
        remove_background="auto" if settings.remove_background else "never",
    )  # fmt: skip
    config = replace(model.config.sampler, steps=settings.steps or model.config.sampler.steps)
    record.manifest.update(input=Path(photo).name, tier=TIER, sampler=vars(config), variant=model.config.unet.variant)

    def work() -> Generator[Event, None, OrbitVideo]:
        if model.config.unet.variant == "u" and settings.orbit != "static":
            yield Warned("orbit", "SV3D_u takes no cameras: its orbit is static, whatever the settings say")
        image = subject.image.permute(2, 0, 1)[None] * 2 - 1
        frames = yield from generating(model, image, [orbit], config, [settings.seed], chunk=settings.decode_chunk_size)
        video = OrbitVideo(frames[0], orbit)
        for path in save_orbit(video, record.folder):
            yield FileWritten(path)
        return video

    depends = {
        "picture": _digest(subject.image), "orbit": orbit.to_dict(), "sampler": vars(config), "seed": settings.seed,
        "model": settings.model, "version": __version__,
    }  # fmt: skip
    video = yield from record.stage("orbit", depends, work, lambda: load_orbit(record.folder), ORBIT_FILES)
    return subject, video, record


def reconstructing(
    source: str | Path,
    output: str | Path,
    settings: Settings,
    *,
    elevation: float | None = None,
    overwrite: bool = False,
) -> Generator[Event, None, Result]:
    """Any orbit (mp4, gif, folder of frames, transforms.json) to splats, mesh and report.

    elevation: of a static orbit in degrees, where the source holds no cameras; None estimates it from the silhouettes.
    """
    video = load_orbit(source, elevation=elevation)
    record = _open_record(output, settings, overwrite)
    alpha = foreground(video)
    if elevation is None and not _brings_cameras(Path(source)):
        estimate, _ = estimate_elevation(alpha, video.orbit)
        video = replace(video, orbit=replace(video.orbit, elevations=torch.full((len(video.orbit),), estimate)))
        yield Warned("orbit", f"no elevation was given; the silhouettes say {estimate:.1f} degrees")
    record.manifest.update(input=Path(source).name, tier=TIER)
    return (yield from _reconstructing(video, Subject(video.colors()[-1], alpha[-1]), settings, record))


def _reconstructing(
    video: OrbitVideo, subject: Subject, settings: Settings, record: Record
) -> Generator[Event, None, Result]:
    folder, device = record.folder, record.device

    def fit() -> Generator[Event, None, Splats]:
        splats = yield from fitting(video, seed=settings.seed, device=device)
        yield FileWritten(save_splats(splats, folder / "splats.ply"))
        return splats

    def mesh_and_texture() -> Generator[Event, None, Mesh]:
        hull = visual_hull(foreground(video).to(device), video.orbit)
        surface = yield from extracting(
            splats, video, hull, resolution=settings.mc_resolution, target_faces=settings.target_faces
        )
        mesh = yield from baking(surface, video, resolution=settings.texture_resolution)
        for name in MESH_FILES:
            for path in save_mesh(mesh, folder / name):
                yield FileWritten(path)
        return mesh

    def report() -> Generator[Event, None, dict]:
        figures = _figures(video, splats, mesh)
        yield FileWritten(write_preview(folder / "preview.png", video, mesh, subject))
        return figures

    depends = {"frames": _digest(video.frames), "orbit": video.orbit.to_dict(), "seed": settings.seed}
    splats = yield from record.stage(
        "splats", depends, fit, lambda: load_splats(folder / "splats.ply").to(device), ("splats.ply",)
    )
    surface = {k: getattr(settings, k) for k in ("mc_resolution", "target_faces", "texture_resolution")}
    mesh = yield from record.stage(
        "mesh", surface, mesh_and_texture, lambda: _to(load_mesh(folder / "mesh.glb"), device), MESH_FILES
    )
    figures = yield from record.stage("report", {}, report)
    record.manifest["figures"] = figures
    record.write()
    yield FileWritten(write_report(folder, record.manifest, figures))
    return Result(folder, video, splats, mesh, figures)


@torch.no_grad()
def _figures(video: OrbitVideo, splats: Splats, mesh: Mesh) -> dict:
    """What the report says of a result; PSNR in dB against the frames."""
    rendered, _ = render(splats, video.orbit, video.size)
    shown, _ = render_mesh(mesh, video.orbit, video.size)
    truth = video.colors()
    assert mesh.texture is not None
    return {
        "PSNR of the splats against the frames (dB)": round(psnr(rendered.clamp(0, 1).cpu(), truth), 2),
        "PSNR of the mesh against the frames (dB)": round(psnr(shown.cpu().float() / 255, truth), 2),
        "Splats": len(splats),
        "Faces": len(mesh.faces),
        "Watertight": is_closed(mesh),
        "Texture (pixels)": mesh.texture.shape[0],
        "Frames": len(video.orbit),
        "Frame size (pixels)": video.size,
    }


def _open_record(output: str | Path, settings: Settings, overwrite: bool) -> Record:
    device = pick_device(settings.device)
    record = Record.open(make_folder(output), device, overwrite)
    versions = {"sv3d-fast": __version__, "python": platform.python_version()}
    record.manifest.update(
        settings=settings.to_dict(),
        versions=versions | {name: metadata.version(name) for name in PACKAGES},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        implementations=chosen_implementations(device.type),
    )
    return record


def _brings_cameras(source: Path) -> bool:
    return source.suffix.lower() == ".json" or (source / "transforms.json").is_file()


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def _to(mesh: Mesh, device: torch.device) -> Mesh:
    return replace(mesh, **{k: v.to(device) for k, v in vars(mesh).items() if v is not None})
