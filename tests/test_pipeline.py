"""The whole path at its smallest: what is written, what a second run takes up, and what it makes again."""

import errno
import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from analytic_scene import ASYMMETRIC, render
from PIL import Image, ImageDraw
from tiny_sv3d import FRAMES as TINY_FRAMES
from tiny_sv3d import make_folder as make_tiny

import sv3d_fast
from sv3d_fast import orbit_stage, pipeline
from sv3d_fast.camera import Orbit
from sv3d_fast.devices import pick_device
from sv3d_fast.events import FileWritten, Progress, StageFinished, StageResumed, Warned
from sv3d_fast.files import OutputError
from sv3d_fast.formats import plan_of
from sv3d_fast.mini.config import WEIGHTS as EMBEDDED_WEIGHTS
from sv3d_fast.model import weights
from sv3d_fast.orbit_io import load_orbit
from sv3d_fast.orbit_stage import make_orbit, orbiting
from sv3d_fast.pipeline import reconstructing, running
from sv3d_fast.preview import write_preview
from sv3d_fast.scene.fit import FitConfig
from sv3d_fast.settings import Settings

PLAN = {k: v for k, v in plan_of(("glb", "obj"), ("ply",)).items() if k != "other"}  # of the default formats
SMALL = {"steps": 1, "frame_size": 64, "mc_resolution": 24, "target_faces": 300, "texture_resolution": 64}


@pytest.fixture(autouse=True, scope="module")
def _quick_fit():
    with pytest.MonkeyPatch.context() as patch:
        small = FitConfig(size=32, count=300, steps=20, views_per_step=1)
        patch.setattr(FitConfig, "of", classmethod(lambda cls, device, size: small))
        patch.setattr(pipeline, "write_preview", functools.partial(write_preview, tile=32))
        yield


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


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished run: its photo, folder, result and events. Never written to; `again` copies it."""
    folder = tmp_path_factory.mktemp("first")
    photo = blob(folder / "blob.png")
    result, ran, resumed, events = follow(running(photo, folder / "out", Settings(**SMALL)))
    assert (ran, resumed) == (list(PLAN), [])
    return photo, folder / "out", result, events


@pytest.fixture
def again(first, tmp_path):
    """The photo and a copy of the finished run's folder."""
    photo, folder, *_ = first
    shutil.copy2(photo, tmp_path / photo.name)
    shutil.copytree(folder, tmp_path / "out")
    return tmp_path / photo.name, tmp_path / "out"


def no_model(*args, **kwargs):
    raise AssertionError("the model was opened")


def test_everything_is_written_and_announced(first):
    _, folder, result, events = first
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


def test_the_glb_is_closed_and_textured(first):
    _, folder, result, _ = first
    mesh = trimesh.load(folder / "mesh.glb", force="mesh", process=False)
    assert mesh.visual.material.baseColorTexture.size == (64, 64)
    assert mesh.visual.material.metallicFactor == 0
    assert np.asarray(mesh.visual.material.baseColorTexture.convert("RGB")).std() > 1
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    assert mesh.is_watertight
    assert len(mesh.faces) == len(result.mesh.faces) == result.figures["Faces"]
    assert result.figures["Watertight"] is True


def test_the_manifest_tells_how(first):
    _, folder, result, events = first
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
    assert told["figures"] == result.figures
    assert [w["message"] for w in told["warnings"]] == [e.message for e in events if isinstance(e, Warned)]


def test_a_second_run_takes_everything_up_without_the_model(first, again, monkeypatch):
    photo, folder = again
    monkeypatch.setattr(orbit_stage, "load_model", no_model)
    before, warned = contents(folder), manifest(folder)["warnings"]
    result, ran, resumed, _ = follow(running(photo, folder, Settings(**SMALL)))
    assert (ran, resumed) == (["report"], ["orbit", "splats", "mesh", "formats"])
    assert torch.equal(result.video.frames, first[2].video.frames)
    assert torch.equal(result.video.orbit.azimuths, first[2].video.orbit.azimuths)
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
def test_only_what_depends_on_a_setting_is_made_again(again, change, redone):
    photo, folder = again
    _, ran, resumed, _ = follow(running(photo, folder, Settings(**(SMALL | change))))
    assert ran == redone
    assert resumed == [name for name in PLAN if name not in redone]
    assert list(manifest(folder)["stages"]) == list(PLAN)


@pytest.mark.parametrize("what", ["photo", "version", "elevation", "steps", "foreground_ratio"])
def test_the_orbit_is_made_again_and_nothing_old_remains(again, what, monkeypatch):
    photo, folder = again
    settings = SMALL
    if what == "photo":
        blob(photo, color=(20, 160, 40, 255))
    elif what == "version":
        monkeypatch.setattr("sv3d_fast.stages.__version__", "0.0.1")
    else:
        value = {"elevation": 20.0, "steps": 2, "foreground_ratio": 0.5}[what]
        settings = SMALL | {what: value}
    old = contents(folder / "images")
    _, ran, resumed, _ = follow(orbiting(photo, folder, Settings(**settings)))
    assert (ran, resumed) == (["orbit"], [])
    assert {p.name for p in folder.iterdir()} == {"manifest.json", *PLAN["orbit"]}
    assert list(manifest(folder)["stages"]) == ["orbit"]
    if what != "version":
        assert contents(folder / "images") != old


def test_a_changed_model_file_is_noticed(again, tmp_path):
    photo, folder = again
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED_WEIGHTS, model)
    settings = Settings(**SMALL, model=str(model))
    assert follow(orbiting(photo, folder, settings))[1] == ["orbit"]  # another place than the embedded one's
    assert follow(orbiting(photo, folder, settings))[1] == []
    weights = next(model.glob("unet/*.safetensors"))
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 10**9))
    assert follow(orbiting(photo, folder, settings))[1] == ["orbit"]


MORE = ("mesh.usdz", "mesh.stl", "mesh.3mf", "mesh.ply", "splats.splat", "splats.spz")


def test_further_formats_are_written_from_what_is_there(again):
    photo, folder = again
    formats = {"mesh_formats": ("stl", "3mf", "usdz", "ply"), "splat_formats": ["spz", "splat"], "height_mm": 40}
    _, ran, resumed, events = follow(running(photo, folder, Settings(**SMALL, **formats)))
    assert (ran, resumed) == (["formats", "report"], ["orbit", "splats", "mesh"])
    assert [e.path.name for e in events if isinstance(e, FileWritten)][: len(MORE)] == manifest_files(folder)
    assert sorted(manifest_files(folder)) == sorted(MORE)
    kept = {"manifest.json", *PLAN["orbit"], "splats.ply", "mesh.glb", *PLAN["report"]}
    assert {p.name for p in folder.iterdir()} == {*kept, *MORE}  # mesh.obj and its parts are gone
    page = (folder / "report.html").read_text()
    assert all(f"'{name}'" in page for name in MORE)
    assert trimesh.load(folder / "mesh.stl").bounds[:, 2].tolist() == pytest.approx([0, 40])
    assert trimesh.load(folder / "mesh.stl").is_watertight
    before = contents(folder)
    assert follow(running(photo, folder, Settings(**SMALL, **formats)))[1] == ["report"]
    assert {p for p in before if contents(folder)[p] != before[p]} <= {Path("manifest.json"), Path("report.html")}
    assert follow(running(photo, folder, Settings(**SMALL, **(formats | {"height_mm": 50.0}))))[1] == [
        "formats",
        "report",
    ]
    assert follow(running(photo, folder, Settings(**SMALL, mesh_formats=("glb",))))[1] == ["report"]
    assert {p.name for p in folder.iterdir()} == kept


def manifest_files(folder):
    return manifest(folder)["stages"]["formats"]["files"]


def test_a_result_for_print(again):
    photo, folder = again
    small = {k: v for k, v in SMALL.items() if k != "target_faces"}
    _, ran, *_ = follow(running(photo, folder, Settings.of(purpose="print", height_mm=75, **small)))
    assert ran == ["mesh", "formats", "report"]
    assert (folder / "mesh.3mf").is_file()
    solid = trimesh.load(folder / "mesh.stl")
    assert solid.is_watertight
    assert solid.extents[2] == pytest.approx(75)
    assert len(solid.faces) > 300
    told = manifest(folder)["settings"]
    assert (told["purpose"], told["watertight"], told["height_mm"]) == ("print", True, 75)
    assert told["mesh_formats"] == ["glb", "stl", "3mf"]
    assert told["target_faces"] == 100_000


def test_open_edges_are_an_error_where_they_must_not_be(again, monkeypatch):
    photo, folder = again
    monkeypatch.setattr(pipeline, "is_closed", lambda mesh: False)
    with pytest.raises(ValueError, match=r"^watertight: expected a closed mesh.*--no-watertight"):
        follow(running(photo, folder, Settings.of(purpose="print", **SMALL)))
    assert (folder / "mesh.glb").is_file()
    assert not (folder / "mesh.stl").exists()
    result, *_ = follow(running(photo, folder, Settings.of(purpose="print", watertight=False, **SMALL)))
    assert (folder / "mesh.stl").is_file()
    assert result.figures["Watertight"] is False


def test_a_result_for_the_web_is_judged_as_it_stands_in_its_file(again):
    photo, folder = again
    settings = Settings.of(purpose="web", unlit=True, **SMALL)
    result, ran, *_ = follow(running(photo, folder, settings))
    assert ran == ["mesh", "formats", "report"]
    assert b'"image/jpeg"' in (folder / "mesh.glb").read_bytes()
    assert b"KHR_materials_unlit" in (folder / "mesh.glb").read_bytes()
    assert {"mesh.usdz", "splats.spz"} <= {p.name for p in folder.iterdir()}
    again, ran, *_ = follow(running(photo, folder, settings))
    assert ran == ["report"]
    assert again.figures == result.figures
    assert torch.equal(again.mesh.texture, result.mesh.texture)
    assert torch.equal(again.mesh.vertices, result.mesh.vertices)


def test_reconstruct_writes_further_formats_and_says_so(again, tmp_path):
    _, folder = again
    settings = Settings(**SMALL, mesh_formats=("stl",), splat_formats=("spz",))
    follow(reconstructing(folder, tmp_path / "new", settings))
    assert {"mesh.glb", "mesh.stl", "splats.spz"} <= {p.name for p in (tmp_path / "new").iterdir()}
    assert manifest(tmp_path / "new")["settings"]["mesh_formats"] == ["stl"]
    assert manifest(tmp_path / "new")["settings"]["height_mm"] == 100


def test_overwrite_starts_anew(again):
    photo, folder = again
    _, ran, resumed, _ = follow(running(photo, folder, Settings(**SMALL), overwrite=True))
    assert (ran, resumed) == (list(PLAN), [])


def test_orbit_alone_leaves_a_finished_run_as_it_is(again):
    photo, folder = again
    before = contents(folder)
    assert follow(orbiting(photo, folder, Settings(**SMALL)))[2] == ["orbit"]
    assert contents(folder) == before


@pytest.mark.parametrize("damage", ["frame", "splats", "mesh"])
def test_damaged_files_are_made_again_with_a_warning(again, damage):
    photo, folder = again
    path = {"frame": folder / "images" / "0003.png", "splats": folder / "splats.ply", "mesh": folder / "mesh.glb"}
    path[damage].write_bytes(path[damage].read_bytes()[:100])
    _, ran, _, events = follow(running(photo, folder, Settings(**SMALL)))
    # the orbit comes back bit for bit, but what was made from it went with it
    assert ran == {"frame": list(PLAN), "splats": list(PLAN)[1:], "mesh": list(PLAN)[2:]}[damage]
    stage = {"frame": "orbit", "splats": "splats", "mesh": "mesh"}[damage]
    assert any(e.stage == stage and "damaged" in e.message for e in events if isinstance(e, Warned))


def test_a_missing_file_is_made_again(again):
    photo, folder = again
    (folder / "mesh.mtl").unlink()
    assert follow(running(photo, folder, Settings(**SMALL)))[1] == ["formats", "report"]
    assert (folder / "mesh.mtl").is_file()


def test_an_interrupted_run_goes_on_from_its_finished_stages(first, tmp_path, monkeypatch):
    photo, folder = first[0], tmp_path / "out"

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
    assert contents(folder / "images") == frames == contents(first[1] / "images")
    assert torch.equal(result.mesh.vertices, first[2].mesh.vertices)  # as if it had never stopped


def test_an_earlier_result_stays_until_there_is_a_new_one(again, monkeypatch):
    photo, folder = again
    before = contents(folder)

    def interrupted(*args, **kwargs):
        yield Progress("orbit", 1, 4)
        raise KeyboardInterrupt

    monkeypatch.setattr(orbit_stage, "planned", interrupted)
    with pytest.raises(KeyboardInterrupt):
        follow(running(photo, folder, Settings(**(SMALL | {"seed": 5}))))
    assert contents(folder) == before


def test_a_full_disk_leaves_nothing_half_written(first, tmp_path, monkeypatch):
    photo, folder = first[0], tmp_path / "out"
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


@pytest.mark.parametrize("kind", ["orbit.mp4", "orbit.gif", "images", "transforms.json", ""])
def test_reconstruct_takes_every_form_of_an_orbit(again, tmp_path, kind):
    _, folder = again
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


def test_reconstruct_within_a_run_keeps_its_orbit(again):
    photo, folder = again
    orbit = {path: data for path, data in contents(folder).items() if path.parts[0] in PLAN["orbit"]}
    settings = Settings(**(SMALL | {"seed": 3}))
    assert follow(reconstructing(folder / "transforms.json", folder, settings))[1] == list(PLAN)[1:]
    assert orbit.items() <= contents(folder).items()
    assert follow(running(photo, folder, Settings(**SMALL)))[2] == ["orbit"]


def test_reconstruct_of_another_orbit_replaces_the_whole_run(again, tmp_path):
    _, folder = again
    other = tmp_path / "other.mp4"
    shutil.copy2(folder / "orbit.mp4", other)
    follow(reconstructing(other, folder, Settings(**SMALL), elevation=10.0))
    assert not any((folder / name).exists() for name in PLAN["orbit"])
    assert list(manifest(folder)["stages"]) == list(PLAN)[1:]
    assert manifest(folder)["settings"]["elevation"] == 10.0


def test_reconstruct_writes_no_pictures_among_the_frames(again):
    _, folder = again
    before = contents(folder)
    with pytest.raises(ValueError, match="another folder"):
        follow(reconstructing(folder / "images", folder / "images", Settings(**SMALL)))
    assert contents(folder) == before


def test_a_folder_of_someone_elses_files_is_left_alone(first, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds images but no manifest\.json"):
        follow(running(first[0], tmp_path, Settings(**SMALL)))
    assert (tmp_path / "images" / "mine.txt").read_text() == "mine"


def test_sv3d_u_makes_its_static_orbit_and_says_so(first, tmp_path):
    model = make_tiny(tmp_path / "u", 256)
    settings = Settings(**(SMALL | {"model": str(model), "orbit": "sine", "elevation": 5.0}))
    weights._print_once.cache_clear()  # another test of this process may have seen the notice
    with pytest.warns(UserWarning, match="Tiny notice"):
        (video, record), _, _, events = follow(orbiting(first[0], tmp_path / "out", settings))
    assert video.orbit.elevations.tolist() == [5.0] * 21
    assert load_orbit(tmp_path / "out").orbit.elevations.tolist() == [5.0] * 21
    messages = [e.message for e in events if isinstance(e, Warned)]
    assert any("SV3D_u takes no cameras" in message for message in messages)
    assert any(f"orbits of {TINY_FRAMES} frames" in message for message in messages)
    assert record.manifest["stages"]["orbit"]["variant"] == "u"


def test_the_picture_of_a_name_that_is_no_text(first, tmp_path):
    photo = os.path.join(os.fsencode(tmp_path), b"\xff.png")
    shutil.copy2(first[0], photo)
    follow(running(os.fsdecode(photo), tmp_path / "out", Settings(**SMALL)))
    assert manifest(tmp_path / "out")["input"] == "?.png"
    assert "?.png" in (tmp_path / "out" / "report.html").read_text()


def test_run_names_a_setting_that_is_not_there(first, tmp_path):
    with pytest.raises(TypeError, match="no setting 'stepz'"):
        sv3d_fast.run(first[0], tmp_path / "out", stepz=3)
    with pytest.raises(ValueError, match="steps: expected"):
        sv3d_fast.run(first[0], tmp_path / "out", steps="3")
    assert not (tmp_path / "out").exists()


def test_run_from_python(again):
    photo, folder = again
    result = sv3d_fast.run(str(photo), str(folder), **SMALL)
    assert result.folder == folder
    assert result.mesh.texture.shape == (64, 64, 3)


@pytest.mark.parametrize(
    "name", ["", "CPU", "cpu:3", "meta", "mps", "cuda:x", "cuda:-1", "cuda:999", "cuda:9999999999"]
)
def test_devices_that_are_not_there(name):
    with pytest.raises(ValueError, match=r"^device: "):
        pick_device(name)


@pytest.mark.parametrize("first_view", [True, False])
def test_poses_from_a_file(tmp_path, first_view):
    azimuths = [0, 90, 180, 270] if first_view else [90, 180, 270, 0]
    path = tmp_path / "poses.json"
    path.write_text(json.dumps([{"elevation": a / 10, "azimuth": a} for a in azimuths]))
    orbit = make_orbit(Settings(orbit=path))
    assert orbit.azimuths.tolist() == [90, 180, 270, 0]
    assert orbit.elevations.tolist() == [9, 18, 27, 0]


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
