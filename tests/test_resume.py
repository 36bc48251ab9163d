"""What a second run takes up and what it makes again, and what an interrupted or failed one leaves."""

import errno
import os
import shutil

import pytest
import torch
from small_run import PLAN, SMALL, blob, contents, follow, manifest

from sv3d_fast import orbit_stage, pipeline
from sv3d_fast.events import Progress, Warned
from sv3d_fast.files import OutputError
from sv3d_fast.mini.config import WEIGHTS as EMBEDDED_WEIGHTS
from sv3d_fast.orbit_stage import orbiting
from sv3d_fast.pipeline import running
from sv3d_fast.settings import Settings

pytestmark = pytest.mark.usefixtures("quick_fit")


def no_model(*args, **kwargs):
    raise AssertionError("the model was opened")


def test_a_second_run_takes_everything_up_without_the_model(finished_run, copied_run, monkeypatch):
    photo, folder = copied_run
    monkeypatch.setattr(orbit_stage, "load_model", no_model)
    before, warned = contents(folder), manifest(folder)["warnings"]
    result, ran, resumed, _ = follow(running(photo, folder, Settings(**SMALL)))
    assert (ran, resumed) == (["report"], ["orbit", "splats", "mesh", "formats"])
    assert torch.equal(result.video.frames, finished_run[2].video.frames)
    assert torch.equal(result.video.orbit.azimuths, finished_run[2].video.orbit.azimuths)
    after = contents(folder)
    changed = {str(path) for path in after if after[path] != before.get(path)}
    assert changed <= {"manifest.json", "report.html"}  # seconds; the preview is the same, bit for bit
    assert manifest(folder)["stages"]["mesh"]["resumed"] is True
    assert manifest(folder)["warnings"] == warned


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"target_faces": 200}, ["mesh", "formats", "report"]),
        ({"texture_resolution": 128}, ["mesh", "formats", "report"]),
        ({"decode_chunk_size": 3}, ["report"]),
        ({"seed": 1}, list(PLAN)),
    ],
)
def test_only_what_depends_on_a_setting_is_made_again(copied_run, change, redone):
    photo, folder = copied_run
    _, ran, resumed, _ = follow(running(photo, folder, Settings(**(SMALL | change))))
    assert ran == redone
    assert resumed == [name for name in PLAN if name not in redone]
    assert list(manifest(folder)["stages"]) == list(PLAN)


@pytest.mark.parametrize("what", ["photo", "version", "elevation", "steps", "foreground_ratio", "dtype"])
def test_the_orbit_is_made_again_and_nothing_old_remains(copied_run, what, monkeypatch):
    photo, folder = copied_run
    settings = SMALL
    if what == "photo":
        blob(photo, color=(20, 160, 40, 255))
    elif what == "version":
        monkeypatch.setattr("sv3d_fast.stages.__version__", "0.0.1")
    else:
        value = {"elevation": 20.0, "steps": 2, "foreground_ratio": 0.5, "dtype": "bfloat16"}[what]
        settings = SMALL | {what: value}
    old = contents(folder / "images")
    _, ran, resumed, _ = follow(orbiting(photo, folder, Settings(**settings)))
    assert (ran, resumed) == (["orbit"], [])
    assert {p.name for p in folder.iterdir()} == {"manifest.json", *PLAN["orbit"]}
    assert list(manifest(folder)["stages"]) == ["orbit"]
    if what != "version":
        assert contents(folder / "images") != old


def test_a_changed_model_file_is_noticed(copied_run, tmp_path):
    photo, folder = copied_run
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED_WEIGHTS, model)
    settings = Settings(**SMALL, model=str(model))
    assert follow(orbiting(photo, folder, settings))[1] == ["orbit"]  # another place than the embedded one's
    assert follow(orbiting(photo, folder, settings))[1] == []
    weights = next(model.glob("unet/*.safetensors"))
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 10**9))
    assert follow(orbiting(photo, folder, settings))[1] == ["orbit"]


def test_overwrite_starts_anew(copied_run):
    photo, folder = copied_run
    _, ran, resumed, _ = follow(running(photo, folder, Settings(**SMALL), overwrite=True))
    assert (ran, resumed) == (list(PLAN), [])


def test_orbit_alone_leaves_a_finished_run_as_it_is(copied_run):
    photo, folder = copied_run
    before = contents(folder)
    assert follow(orbiting(photo, folder, Settings(**SMALL)))[2] == ["orbit"]
    assert contents(folder) == before


@pytest.mark.parametrize("damage", ["frame", "splats", "mesh"])
def test_damaged_files_are_made_again_with_a_warning(copied_run, damage):
    photo, folder = copied_run
    path = {"frame": folder / "images" / "0003.png", "splats": folder / "splats.ply", "mesh": folder / "mesh.glb"}
    path[damage].write_bytes(path[damage].read_bytes()[:100])
    _, ran, _, events = follow(running(photo, folder, Settings(**SMALL)))
    # the orbit comes back bit for bit, but what was made from it went with it
    assert ran == {"frame": list(PLAN), "splats": list(PLAN)[1:], "mesh": list(PLAN)[2:]}[damage]
    stage = {"frame": "orbit", "splats": "splats", "mesh": "mesh"}[damage]
    assert any(e.stage == stage and "damaged" in e.message for e in events if isinstance(e, Warned))


def test_a_missing_file_is_made_again(copied_run):
    photo, folder = copied_run
    (folder / "mesh.mtl").unlink()
    assert follow(running(photo, folder, Settings(**SMALL)))[1] == ["formats", "report"]
    assert (folder / "mesh.mtl").is_file()


def test_an_interrupted_run_goes_on_from_its_finished_stages(finished_run, tmp_path, monkeypatch):
    photo, folder = finished_run[0], tmp_path / "out"

    def interrupted(*args, **kwargs):
        yield Progress("fit", 1, 20)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "fitting", interrupted)
        with pytest.raises(KeyboardInterrupt):
            follow(running(photo, folder, Settings(**SMALL)))
    assert {p.name for p in folder.iterdir()} == {"manifest.json", *PLAN["orbit"]}
    frames = contents(folder / "images")
    monkeypatch.setattr(orbit_stage, "load_model", no_model)
    result, ran, resumed, _ = follow(running(photo, folder, Settings(**SMALL)))
    assert (ran, resumed) == (list(PLAN)[1:], ["orbit"])
    assert contents(folder / "images") == frames == contents(finished_run[1] / "images")
    assert torch.equal(result.mesh.vertices, finished_run[2].mesh.vertices)  # as if it had never stopped


def test_an_earlier_result_stays_until_there_is_a_new_one(copied_run, monkeypatch):
    photo, folder = copied_run
    before = contents(folder)

    def interrupted(*args, **kwargs):
        yield Progress("orbit", 1, 4)
        raise KeyboardInterrupt

    monkeypatch.setattr(orbit_stage, "planned", interrupted)
    with pytest.raises(KeyboardInterrupt):
        follow(running(photo, folder, Settings(**(SMALL | {"seed": 5}))))
    assert contents(folder) == before


def test_a_full_disk_leaves_nothing_half_written(finished_run, tmp_path, monkeypatch):
    photo, folder = finished_run[0], tmp_path / "out"
    replace = os.replace

    def full(source, target):
        if str(target).endswith("mesh.obj"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OutputError, match=r"mesh\.obj: No space left"):
            follow(running(photo, folder, Settings(**SMALL)))
    assert not [p for p in folder.iterdir() if "partial" in p.name]
    assert not (folder / "mesh.obj").exists()
    assert list(manifest(folder)["stages"]) == ["orbit", "splats", "mesh"]
    assert follow(running(photo, folder, Settings(**SMALL)))[2] == ["orbit", "splats", "mesh"]
