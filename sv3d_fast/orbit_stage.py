"""The first half of the whole: a photo to its orbit of known cameras, made in one step and written in another."""

import json
import platform
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .camera import FRAMES, Orbit
from .cfg_parallel import twin_of
from .devices import pick_device, pick_dtype, second_device
from .events import Event, Warned
from .formats import plan_of
from .identity import digest_picture, model_identity
from .image import load_subject
from .info import chosen_implementations, versions
from .mini.config import WEIGHTS as EMBEDDED_WEIGHTS
from .model.weights import SV3DModel, load_model
from .orbit_io import load_orbit, save_orbit
from .planned import budget_of, check_budget, planned
from .poses import read_orbit
from .prediction import why_not_fused
from .settings import EMBEDDED, Settings
from .stages import Product, Record
from .video import MIN_FRAMES, OrbitVideo

STAGE = "orbit"
TIER = "exact"
EMBEDDED_RATIO = 0.85  # how the embedded model's training pictures were framed
MAX_POSES = 1000
CHUNKS = {"cpu": 7, "cuda": 1}  # frames decoded at once where nobody says: on a GPU each takes 1.1 GiB at 576²


def open_model(settings: Settings) -> SV3DModel:
    """The model that the settings name, on their device; with a budget in main memory, from where a plan places it.

    Raises ValueError for weights that can't be used and for a budget that is too little.
    """
    device = pick_device(settings.device)
    path = EMBEDDED_WEIGHTS if settings.model == EMBEDDED else settings.model
    chosen = pick_dtype(settings.dtype, device)
    dtype = {"unet": chosen, "image_encoder": chosen, "vae": torch.float32}  # as official: no 16-bit VAE
    budget = budget_of(settings.max_memory, device)
    model = load_model(path, dtype=dtype, device=device if budget is None else "cpu")
    if budget is not None:
        check_budget(model, budget, settings.frame_size, len(make_orbit(settings)), _chunk(settings, device))
    return model


def _chunk(settings: Settings, device: torch.device) -> int:
    return settings.decode_chunk_size or CHUNKS[device.type]


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
        poses = json.loads(path.read_text(encoding="utf-8"))
        orbit, _ = read_orbit(frames=None, default_frames=FRAMES, poses=poses)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f'orbit: {path}: expected a list of {{"elevation": e, "azimuth": a}}: {error}') from error
    if not MIN_FRAMES <= len(orbit) <= MAX_POSES:
        raise ValueError(f"orbit: {path}: expected {MIN_FRAMES} to {MAX_POSES} poses, got {len(orbit)}")
    return orbit


def orbiting(
    photo: str | Path,
    output: str | Path,
    settings: Settings,
    *,
    overwrite: bool = False,
    model: SV3DModel | None = None,
) -> Generator[Event, None, tuple[OrbitVideo, Record]]:
    """The photo's orbit and its files below `output`: yields events, returns the orbit and the folder's record.

    A second run into the same folder takes up the orbit of an earlier one from the same photo and settings;
    `overwrite` starts anew. model: the settings' one, if it is open already; else it is opened if the orbit is made.
    Raises ValueError for what the user can mend: the picture, the settings, the weights, the folder.
    """
    product, record = yield from making(photo, output, settings, overwrite=overwrite, model=model)
    return (yield from writing(product, record)), record


def making(
    photo: str | Path,
    output: str | Path,
    settings: Settings,
    *,
    overwrite: bool = False,
    model: SV3DModel | None = None,
    turn: AbstractContextManager | None = None,
) -> Generator[Event, None, tuple[Product[OrbitVideo], Record]]:
    """`orbiting` up to where `writing` goes on, perhaps in another process: encoders would hold up the networks here.

    turn: held while the networks run, for callers that make several orbits with one model.
    """
    device, orbit = pick_device(settings.device), make_orbit(settings)
    dtype = str(pick_dtype(settings.dtype, device)).removeprefix("torch.")
    budget = budget_of(settings.max_memory, device)
    beside = second_device(device) if settings.cfg_parallel else None
    depends = {
        "picture": digest_picture(photo), "orbit": orbit.to_dict(), "model": model_identity(settings.model),
        "dtype": dtype, "matting_model": settings.matting_model and model_identity(settings.matting_model),
        **{k: getattr(settings, k) for k in ("seed", "steps", "frame_size", "foreground_ratio", "remove_background")},
    }  # fmt: skip
    plan = plan_of(settings.mesh_formats, settings.splat_formats)
    record = Record.open(output, device, plan, manifest_header(photo, device, settings.to_dict()), overwrite=overwrite)

    def work() -> Generator[Event, None, OrbitVideo]:
        network = model or open_model(settings)
        ratio = settings.foreground_ratio or (EMBEDDED_RATIO if settings.model == EMBEDDED else None)
        subject = load_subject(
            photo, size=settings.frame_size or network.config.image_size, foreground_ratio=ratio,
            remove_background="auto" if settings.remove_background else "never", matting_model=settings.matting_model,
        )  # fmt: skip
        config = replace(network.config.sampler, steps=settings.steps or network.config.sampler.steps)
        variant, cameras = network.config.unet.variant, orbit
        form = "plain" if why_not_fused(network.unet) else "fused"
        record.note(variant=variant, sampler=vars(config), unet=form, dtype=dtype)
        if variant == "u" and settings.orbit != "static":
            yield Warned(STAGE, "SV3D_u takes no cameras: its orbit is static, whatever the settings say")
            cameras = Orbit.static(settings.elevation, len(orbit))
        if len(cameras) != network.config.frames:
            trained = network.config.frames
            yield Warned(STAGE, f"the model was trained on orbits of {trained} frames; this one has {len(cameras)}")
        image, chunk = subject.image.permute(2, 0, 1)[None] * 2 - 1, _chunk(settings, device)
        began = time.perf_counter()
        with turn or nullcontext():
            if turn:
                record.note(waited_seconds=round(time.perf_counter() - began, 3))
            twin = None if beside is None else twin_of(network, beside)
            frames = yield from planned(
                network, image, [cameras], config, [settings.seed], device=device, budget=budget, chunk=chunk,
                note=record.note, twin=twin,
            )  # fmt: skip
        return OrbitVideo(frames[0], cameras)

    product = yield from record.make(STAGE, depends, work, lambda: load_orbit(record.folder))
    return product, record


def writing(product: Product[OrbitVideo], record: Record) -> Generator[Event, None, OrbitVideo]:
    """Writes the orbit that `making` returned, unless an earlier run had, and returns it."""
    return (yield from record.save(product, lambda video: save_orbit(video, record.folder)))


def manifest_header(source: str | Path, device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """What a manifest holds from the start."""
    return {
        "input": Path(source).name,
        "tier": TIER,
        "settings": settings,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "implementations": chosen_implementations(device.type),
        "versions": {"sv3d-fast": __version__, "python": platform.python_version()} | versions(),
    }
