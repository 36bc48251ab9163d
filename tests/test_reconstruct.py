"""Reconstruction of a given orbit: every form of one, the folder it may be written to, and frames that are amiss."""

import shutil

import pytest
import torch
from analytic_scene import ASYMMETRIC, render
from PIL import Image
from small_run import PLAN, SMALL, contents, follow, manifest

from sv3d_fast.camera import Orbit
from sv3d_fast.events import Warned
from sv3d_fast.pipeline import reconstructing, running
from sv3d_fast.scene.fit import FitConfig
from sv3d_fast.settings import Settings

pytestmark = pytest.mark.usefixtures("quick_fit")


@pytest.mark.parametrize("kind", ["orbit.mp4", "orbit.gif", "images", "transforms.json", ""])
def test_reconstruct_takes_every_form_of_an_orbit(copied_run, tmp_path, kind):
    _, folder = copied_run
    source, settings = folder / kind, Settings(**SMALL)
    given = kind in ("transforms.json", "")
    result, ran, _, events = follow(reconstructing(source, tmp_path / "new", settings))
    assert ran == list(PLAN)[1:]
    assert {p.name for p in (tmp_path / "new").iterdir()} == {
        "manifest.json", *(name for stage in ran for name in PLAN[stage])
    }  # fmt: skip
    assert len(result.video.orbit) == 21
    estimates = [w for w in manifest(tmp_path / "new")["warnings"] if "silhouettes" in w["message"]]
    assert len(estimates) == sum("silhouettes" in e.message for e in events if isinstance(e, Warned)) == (not given)
    if given:
        assert torch.equal(result.video.orbit.elevations, Orbit.static(10).elevations)


def test_reconstruct_within_a_run_keeps_its_orbit(copied_run):
    photo, folder = copied_run
    orbit = {path: data for path, data in contents(folder).items() if path.parts[0] in PLAN["orbit"]}
    settings = Settings(**(SMALL | {"seed": 3}))
    assert follow(reconstructing(folder / "transforms.json", folder, settings))[1] == list(PLAN)[1:]
    assert orbit.items() <= contents(folder).items()
    assert follow(running(photo, folder, Settings(**SMALL)))[2] == ["orbit"]


def test_reconstruct_of_another_orbit_replaces_the_whole_run(copied_run, tmp_path):
    _, folder = copied_run
    other = tmp_path / "other.mp4"
    shutil.copy2(folder / "orbit.mp4", other)
    follow(reconstructing(other, folder, Settings(**SMALL), elevation=10.0))
    assert not any((folder / name).exists() for name in PLAN["orbit"])
    assert list(manifest(folder)["stages"]) == list(PLAN)[1:]
    assert manifest(folder)["settings"]["elevation"] == 10.0


def test_reconstruct_writes_no_pictures_among_the_frames(copied_run):
    _, folder = copied_run
    before = contents(folder)
    with pytest.raises(ValueError, match="another folder"):
        follow(reconstructing(folder / "images", folder / "images", Settings(**SMALL)))
    assert contents(folder) == before


@pytest.mark.parametrize("right", [True, False])
def test_empty_frames_are_left_out_and_frames_in_the_wrong_order_are_told(tmp_path, right, monkeypatch):
    config = FitConfig(size=32, count=500, steps=150, views_per_step=1, lr_means=0.6)
    monkeypatch.setattr(FitConfig, "of", classmethod(lambda cls, device, size: config))
    frames = render(ASYMMETRIC, Orbit.static(10), 32).frames
    if not right:
        frames = frames[torch.randperm(21, generator=torch.Generator().manual_seed(0))]
    frames[[2, 7, 8]] = 255
    for index, frame in enumerate(frames.numpy()):
        Image.fromarray(frame).save(tmp_path / f"{index}.png")
    result, *_ = follow(reconstructing(tmp_path, tmp_path / "out", Settings(**SMALL), elevation=10.0))
    messages = [w["message"] for w in manifest(result.folder)["warnings"]]
    assert "frames [2, 7, 8]: the mask is empty; they are left out" in messages
    assert any("frames and cameras disagree" in message for message in messages) != right
    assert result.figures["Frames"] == 18
    assert result.figures["Watertight"]
