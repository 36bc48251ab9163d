"""What a worker does with a job: the pipeline's own generators, on models that are opened once."""

import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from sv3d_fast.events import Event, finish
from sv3d_fast.settings import Settings

from .jobs import Job
from .settings import ServeSettings

# A job, its picture and the folder for its result, to the events.
Execute = Callable[[Job, Path, Path], Generator[Event, None, None]]
# Opens and warms up what a device needs; the seam at which tests put a pipeline of their own.
Opening = Callable[[ServeSettings, str], Execute]


def open_pipeline(settings: ServeSettings, device: str) -> Execute:
    """Opens the models, makes one small orbit so that the first job finds everything loaded and compiled.

    Raises ValueError for weights that can't be used.
    """
    from sv3d_fast.orbit_stage import open_model, orbiting
    from sv3d_fast.pipeline import running
    from sv3d_fast.preview_settings import PreviewSettings
    from sv3d_fast.triposr_pipeline import open_triposr, previewing

    opened: dict[str, Any] = {"model": settings.model, "dtype": settings.dtype, "device": device}
    model = open_model(Settings(**opened))
    triposr = None
    if settings.preview_model:
        triposr = open_triposr(PreviewSettings(model=settings.preview_model, device=device))

    def execute(job: Job, picture: Path, folder: Path) -> Generator[Event, None, None]:
        matting = settings.matting_model if job.request.get("remove_background", True) else None
        common: dict[str, Any] = {**job.request, "matting_model": matting}
        if job.mode == "preview":
            asked = PreviewSettings(model=settings.preview_model, device=device, **common)
            summary = yield from previewing([picture], folder.parent, asked, model=triposr)
            if summary.failed:
                raise ValueError(summary.failed[picture])
            return
        step = orbiting if job.mode == "orbit" else running
        yield from step(picture, folder, Settings(**opened, **common), model=model)

    with tempfile.TemporaryDirectory() as scratch:
        picture = _disc(Path(scratch) / "warm-up.png")
        finish(orbiting(picture, scratch, Settings(**opened, steps=1), model=model))
    return execute


def _disc(path: Path) -> Path:
    from PIL import Image, ImageDraw

    image = Image.new("RGBA", (128, 128))
    ImageDraw.Draw(image).ellipse((32, 32, 96, 96), fill=(180, 90, 40, 255))
    image.save(path)
    return path


def device_names(names: tuple[str, ...]) -> list[str]:
    """One name for each worker; "auto" is every GPU, or the CPU. Raises ValueError for a device that is not there."""
    from sv3d_fast.devices import pick_device

    if names != ("auto",):
        return [str(pick_device(name)) for name in names]
    import torch

    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]


def gpu_memory(device: str) -> dict[str, int]:
    """Bytes in use and their peak so far; of a GPU alone."""
    if not device.startswith("cuda"):
        return {}
    import torch

    return {"allocated": torch.cuda.memory_allocated(device), "peak": torch.cuda.max_memory_allocated(device)}
