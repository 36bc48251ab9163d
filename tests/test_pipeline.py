"""The whole path at its smallest: what is written, what is told of it, and what a run from Python takes."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import trimesh
from small_run import PLAN, SMALL, follow, manifest
from tiny_sv3d import FRAMES as TINY_FRAMES
from tiny_sv3d import make_folder as make_tiny

import sv3d_fast
from sv3d_fast.events import FileWritten, Progress, Warned
from sv3d_fast.model import weights
from sv3d_fast.orbit_io import load_orbit
from sv3d_fast.orbit_stage import orbiting
from sv3d_fast.pipeline import running
from sv3d_fast.settings import Settings

pytestmark = pytest.mark.usefixtures("quick_fit")


def test_everything_is_written_and_announced(finished_run):
    _, folder, result, events = finished_run
    there = {p.name for p in folder.iterdir()}
    assert there == {"manifest.json", *(name for names in PLAN.values() for name in names)}
    announced = {e.path.name for e in events if isinstance(e, FileWritten)}
    assert announced == there - {"manifest.json"}
    assert sorted(p.name for p in (folder / "images").iterdir()) == [f"{k:04d}.png" for k in range(21)]
    assert torch.equal(load_orbit(folder).frames, result.video.frames)
    assert {e.stage for e in events if isinstance(e, Progress)} == {"orbit", "fit", "surface", "texture"}
    for stage in ("orbit", "fit", "surface", "texture"):
        steps = [(e.done, e.total) for e in events if isinstance(e, Progress) and e.stage == stage]
        assert steps[-1][0] == steps[-1][1]
        assert [done for done, _ in steps] == sorted({done for done, _ in steps})


def test_the_glb_is_closed_and_textured(finished_run):
    _, folder, result, _ = finished_run
    mesh = trimesh.load(folder / "mesh.glb", force="mesh", process=False)
    assert mesh.visual.material.baseColorTexture.size == (64, 64)
    assert mesh.visual.material.metallicFactor == 0
    assert np.asarray(mesh.visual.material.baseColorTexture.convert("RGB")).std() > 1
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    assert mesh.is_watertight
    assert len(mesh.faces) == len(result.mesh.faces) == result.figures["Faces"]
    assert result.figures["Watertight"] is True


def test_the_manifest_tells_how(finished_run):
    _, folder, result, events = finished_run
    told = manifest(folder)
    assert 0 < told["stages"]["mesh"]["decimation_error"] < 0.01
    assert told["input"] == "blob.png"
    assert told["tier"] == "exact"
    assert told["settings"] == json.loads(json.dumps(Settings(**SMALL).to_dict()))
    assert told["versions"]["sv3d-fast"] == sv3d_fast.__version__
    assert told["versions"]["torch"] == torch.__version__
    assert {"splat_raster", "tsdf_fuse", "ssim", "mesh_raster"} <= set(told["implementations"])
    assert list(told["stages"]) == list(PLAN)
    for name, entry in told["stages"].items():
        assert entry["seconds"] > 0
        assert entry["peak_memory_bytes"] > 2**20
        assert entry["files"] == list(PLAN[name])
    assert told["stages"]["orbit"]["sampler"]["steps"] == 1
    assert told["stages"]["orbit"]["unet"] == "plain"
    assert told["stages"]["orbit"]["dtype"] == "float32"
    assert told["figures"] == result.figures
    assert [w["message"] for w in told["warnings"]] == [e.message for e in events if isinstance(e, Warned)]


def test_a_folder_of_someone_elses_files_is_left_alone(finished_run, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds images but no manifest\.json"):
        follow(running(finished_run[0], tmp_path, Settings(**SMALL)))
    assert (tmp_path / "images" / "mine.txt").read_text() == "mine"


def test_sv3d_u_makes_its_static_orbit_and_says_so(finished_run, tmp_path):
    model = make_tiny(tmp_path / "u", 256)
    settings = Settings(**(SMALL | {"model": str(model), "orbit": "sine", "elevation": 5.0}))
    weights._print_once.cache_clear()  # another test of this process may have seen the notice
    with pytest.warns(UserWarning, match="Tiny notice"):
        (video, record), _, _, events = follow(orbiting(finished_run[0], tmp_path / "out", settings))
    assert video.orbit.elevations.tolist() == [5.0] * 21
    assert load_orbit(tmp_path / "out").orbit.elevations.tolist() == [5.0] * 21
    messages = [e.message for e in events if isinstance(e, Warned)]
    assert any("SV3D_u takes no cameras" in message for message in messages)
    assert any(f"orbits of {TINY_FRAMES} frames" in message for message in messages)
    assert record.manifest["stages"]["orbit"]["variant"] == "u"


def test_the_picture_of_a_name_that_is_no_text(finished_run, tmp_path):
    photo = os.path.join(os.fsencode(tmp_path), b"\xff.png")
    shutil.copy2(finished_run[0], photo)
    follow(running(os.fsdecode(photo), tmp_path / "out", Settings(**SMALL)))
    assert manifest(tmp_path / "out")["input"] == "?.png"
    assert "?.png" in (tmp_path / "out" / "report.html").read_text()


def test_run_names_a_setting_that_is_not_there(finished_run, tmp_path):
    with pytest.raises(TypeError, match="no setting 'stepz'"):
        sv3d_fast.run(finished_run[0], tmp_path / "out", stepz=3)
    with pytest.raises(ValueError, match="steps: expected"):
        sv3d_fast.run(finished_run[0], tmp_path / "out", steps="3")
    assert not (tmp_path / "out").exists()


def test_run_from_python(copied_run):
    photo, folder = copied_run
    result = sv3d_fast.run(str(photo), str(folder), **SMALL)
    assert result.folder == folder
    assert result.mesh.texture.shape == (64, 64, 3)
