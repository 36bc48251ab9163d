"""A run at its smallest, for tests of the pipeline and of what stands around it."""

import contextlib
import functools
import json

import pytest
from PIL import Image, ImageDraw

from sv3d_fast import pipeline
from sv3d_fast.batch_picture import reconstruct
from sv3d_fast.events import StageFinished, StageResumed
from sv3d_fast.formats import plan_of
from sv3d_fast.pipeline import running
from sv3d_fast.preview import write_preview
from sv3d_fast.scene.fit import FitConfig
from sv3d_fast.settings import Settings

PLAN = {k: v for k, v in plan_of(("glb", "obj"), ("ply",)).items() if k != "other"}  # of the default formats
SMALL = {"steps": 1, "frame_size": 64, "mc_resolution": 24, "target_faces": 300, "texture_resolution": 64}
FIT = FitConfig(size=32, count=200, steps=10, views_per_step=1)


@contextlib.contextmanager
def quick_fit():
    """Splats and previews of the least quality within."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FitConfig, "of", classmethod(lambda cls, device, size: FIT))
        patch.setattr(pipeline, "write_preview", functools.partial(write_preview, tile=32))
        yield


class FitterHere:
    """In place of a batch's Fitter, which has a process of its own."""

    def reconstruct(self, made):
        return reconstruct(made)

    def close(self):
        pass


def blob(path, color=(200, 60, 40, 255)):
    image = Image.new("RGBA", (96, 96))
    draw = ImageDraw.Draw(image)
    draw.ellipse((24, 18, 72, 78), fill=color)
    draw.rectangle((34, 40, 62, 56), fill=(40, 80, 200, 255))
    image.save(path)
    return path


def follow(events):
    """The value, names of the stages that ran, names of those taken up, and all events."""
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as stop:
            ran = [e.stage for e in seen if isinstance(e, StageFinished)]
            return stop.value, ran, [e.stage for e in seen if isinstance(e, StageResumed)], seen


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make_run(folder):
    """The photo, folder, result and events of a finished run."""
    photo = blob(folder / "blob.png")
    with quick_fit():
        result, ran, resumed, events = follow(running(photo, folder / "out", Settings(**SMALL)))
    assert (ran, resumed) == (list(PLAN), [])
    return photo, folder / "out", result, events
