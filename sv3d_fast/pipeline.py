"""The whole: a photo to an orbit, splats, a textured mesh and a report, as events and as one call."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .devices import pick_device
from .events import Event, FileWritten, Progress, T, Warned, finish
from .formats import GLB, PLY, further_files, plan_of
from .identity import digest
from .model.weights import SV3DModel
from .orbit_io import brings_cameras, load_orbit
from .orbit_stage import manifest_header, orbiting
from .preview import render_mesh, write_preview
from .report import write_report
from .scene.align import straightened
from .scene.export import load_mesh, load_splats, save_mesh, save_splats
from .scene.fit import fitting, render
from .scene.hull import consistency, estimate_elevation, visual_hull
from .scene.masks import foreground, showing
from .scene.mesh import Mesh
from .scene.metrics import iou, psnr
from .scene.print_shape import printable
from .scene.splats import Splats
from .scene.surface import extracting, is_closed
from .scene.texture import baking
from .settings import Settings
from .stages import Record, plain
from .video import OrbitVideo

DECISIVE = 0.005  # gain in consistency from which an elevation found is believed; bodies of revolution stay below
AGREEMENT = 0.93  # IoU of splats and masks: right cameras reach 0.96 even on compressed frames, wrong ones 0.92
SHAPING = ("mc_resolution", "target_faces", "texture_resolution", "texture_format", "unlit")  # settings of mesh.glb
WRITING = ("mesh_formats", "splat_formats", "height_mm", "texture_format")  # and of the further files


@dataclass(frozen=True)
class Result:
    """What a run made and where it stands. figures: numbers of the report (PSNR, faces, watertight, ...)."""

    folder: Path
    video: OrbitVideo
    splats: Splats
    mesh: Mesh
    figures: dict


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
    `overwrite` starts anew. Every file appears whole or not at all. model: the settings' one, if it is open already.
    Raises ValueError for what the user can mend: the picture, the settings, the weights, the folder.
    """
    video, record = yield from orbiting(photo, output, settings, overwrite=overwrite, model=model)
    return (yield from reconstructing_orbit(video, settings, record))


def run(photo: str | Path, output: str | Path, *, overwrite: bool = False, **settings) -> Result:
    """`running` without its events; `settings` are those of Settings.of. Raises TypeError for one that isn't there."""
    for name in settings:
        if name not in Settings.__dataclass_fields__:
            raise TypeError(f"run: no setting {name!r}; there are {', '.join(Settings.__dataclass_fields__)}")
    return finish(running(photo, output, Settings.of(**settings), overwrite=overwrite))


def reconstructing(
    source: str | Path,
    output: str | Path,
    settings: Settings,
    *,
    elevation: float | None = None,
    overwrite: bool = False,
) -> Generator[Event, None, Result]:
    """Any orbit (mp4, gif, folder of frames, transforms.json, COLMAP text) to splats, mesh and report.

    elevation: of a static orbit in degrees, where the source holds no cameras; None estimates it from the silhouettes.
    Raises ValueError for what the user can mend: the orbit, the settings, the folder.
    """
    source, output, device = Path(source), Path(output), pick_device(settings.device)
    cameras_known = source.exists() and brings_cameras(source)
    video = load_orbit(source, elevation=elevation)
    seen, _ = showing(video)
    inside = source.resolve().is_relative_to(output.resolve())
    if inside and not cameras_known and source.resolve() == output.resolve():
        raise ValueError(f"{output}: expected another folder than the frames', where pictures will be written")
    names = ("seed", "device", "purpose", "watertight", *SHAPING, *WRITING)
    used = {k: getattr(settings, k) for k in names} | {"elevation": elevation}
    plan = plan_of(settings.mesh_formats, settings.splat_formats)
    if inside:
        del plan["orbit"]  # the source is not replaced
    record = Record.open(output, device, plan, manifest_header(source, device, used), overwrite=overwrite)
    if inside:
        record.keep("orbit")
    if elevation is None and not cameras_known:
        alpha = foreground(seen)
        estimate, score = estimate_elevation(alpha, seen.orbit)
        if score - consistency(alpha, seen.orbit) < DECISIVE:
            taken = f"the silhouettes don't tell it, so {video.orbit.elevations[0]:.0f} degrees are taken"
        else:
            video = replace(video, orbit=replace(video.orbit, elevations=torch.full((len(video.orbit),), estimate)))
            taken = f"the silhouettes say {estimate:.1f} degrees"
        yield record.warn("orbit", f"no elevation was given; {taken}")
    return (yield from reconstructing_orbit(video, settings, record, foreign=True))


def reconstructing_orbit(
    video: OrbitVideo, settings: Settings, record: Record, *, foreign: bool = False
) -> Generator[Event, None, Result]:
    """The second half of `running`: an orbit and its record to splats, mesh and report.

    foreign: whether the cameras are somebody's word, to be doubted where frames don't bear them out.
    """
    folder, device = record.folder, record.device
    depends: dict[str, Any] = {
        "frames": digest(video.frames), "alpha": None if video.alpha is None else digest(video.alpha),
        "orbit": video.orbit.to_dict(), "seed": settings.seed,
    }  # fmt: skip
    video, omissions = showing(video)
    for omission in omissions:
        yield record.warn("orbit", omission)

    def shape() -> Generator[Event, None, Mesh]:
        straight = straightened(video, splats)
        hull = visual_hull(foreground(straight), video.orbit)
        surface = yield from _noted(
            extracting(splats, straight, hull, resolution=settings.mc_resolution, target_faces=settings.target_faces),
            record,
        )
        return (yield from baking(surface, straight, resolution=settings.texture_resolution))

    def save_shape(mesh: Mesh) -> Iterable[Path]:
        return save_mesh(mesh, folder / "mesh.glb", unlit=settings.unlit, texture_format=settings.texture_format)

    def read_shape() -> Mesh:
        return _to(load_mesh(folder / "mesh.glb"), device)

    def nothing() -> Generator[Event, None, None]:
        yield from ()

    def save_formats(_: None) -> Iterable[Path]:
        for kind in settings.mesh_formats:
            if kind != GLB:
                yield from save_mesh(
                    mesh, folder / f"mesh.{kind}", texture_format=settings.texture_format, height_mm=settings.height_mm
                )
        for kind in settings.splat_formats:
            if kind != PLY:
                yield save_splats(splats, folder / f"splats.{kind}")

    def judge() -> Generator[Event, None, dict]:
        rendered, alpha = render(splats, video.orbit, video.size)
        agreement = iou(alpha, foreground(video).to(alpha))
        if foreign and agreement < AGREEMENT:
            yield Warned("report", f"frames and cameras disagree: splats and masks overlap by {agreement:.2f} only; "
                                   "check elevation, azimuths and the order of the frames")  # fmt: skip
        return _figures(video, rendered, agreement, len(splats), mesh)

    splats = yield from record.stage(
        "splats", depends, lambda: fitting(video, seed=settings.seed, device=device),
        lambda made: [save_splats(made, folder / "splats.ply")],
        lambda: load_splats(folder / "splats.ply").to(device),
    )  # fmt: skip
    depends = {"splats": record.fingerprint("splats"), **{k: getattr(settings, k) for k in SHAPING}}
    mesh = yield from record.stage("mesh", depends, shape, save_shape, read_shape)
    if settings.texture_format != "png":
        mesh = read_shape()  # what is judged and written further is what the file holds
    if settings.watertight and not is_closed(printable(mesh, settings.height_mm)):
        raise ValueError(
            "watertight: expected a closed mesh, got one with open edges, which mesh.glb shows; other --mc-resolution "
            "or --target-faces may close it, --no-watertight writes it as it is"
        )
    if further_files(settings.mesh_formats, settings.splat_formats):
        depends = {name: record.fingerprint(name) for name in ("splats", "mesh")}
        depends |= {k: getattr(settings, k) for k in WRITING}
        yield from record.stage("formats", depends, nothing, save_formats, lambda: None)
    depends = {"mesh": record.fingerprint("mesh")}
    figures = yield from record.stage(
        "report", depends, judge, lambda _: [write_preview(folder / "preview.png", video, mesh)]
    )
    record.manifest["figures"] = figures
    record.write()
    yield FileWritten(write_report(folder, plain(record.manifest), plain(figures)))
    return Result(folder, video, splats, mesh, figures)


def _noted(stage: Generator[Event, None, T], record: Record) -> Generator[Event, None, T]:
    """The stage, whose figures go into the manifest too."""
    while True:
        try:
            event = next(stage)
        except StopIteration as stop:
            return stop.value
        if isinstance(event, Progress):
            record.note(**event.figures)
        yield event


@torch.no_grad()
def _figures(video: OrbitVideo, rendered: torch.Tensor, agreement: float, splats: int, mesh: Mesh) -> dict:
    """What the report says of a result whose splats' views are `rendered`; PSNR in dB against the frames."""
    shown, _ = render_mesh(mesh, video.orbit, video.size)
    truth = video.colors()
    assert mesh.texture is not None
    return {
        "PSNR of the splats against the frames (dB)": round(psnr(rendered.clamp(0, 1).cpu(), truth), 2),
        "PSNR of the mesh against the frames (dB)": round(psnr(shown.cpu().float() / 255, truth), 2),
        "Overlap of splats and masks (IoU)": round(agreement, 3),
        "Splats": splats,
        "Faces": len(mesh.faces),
        "Watertight": is_closed(mesh),
        "Texture (pixels)": mesh.texture.shape[0],
        "Frames": len(video.orbit),
        "Frame size (pixels)": video.size,
    }


def _to(mesh: Mesh, device: torch.device) -> Mesh:
    return replace(mesh, **{k: v.to(device) for k, v in vars(mesh).items() if v is not None})
