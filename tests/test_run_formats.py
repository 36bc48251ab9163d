"""The formats of a run's result, and results for print and for the web."""

from pathlib import Path

import pytest
import torch
import trimesh
from small_run import PLAN, SMALL, contents, follow, manifest

from sv3d_fast import pipeline
from sv3d_fast.events import FileWritten
from sv3d_fast.pipeline import reconstructing, running
from sv3d_fast.settings import Settings

MORE = ("mesh.usdz", "mesh.stl", "mesh.3mf", "mesh.ply", "splats.splat", "splats.spz")

pytestmark = pytest.mark.usefixtures("quick_fit")


def manifest_files(folder):
    return manifest(folder)["stages"]["formats"]["files"]


def test_further_formats_are_written_from_what_is_there(copied_run):
    photo, folder = copied_run
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


def test_a_result_for_print(copied_run):
    photo, folder = copied_run
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


def test_open_edges_are_an_error_where_they_must_not_be(copied_run, monkeypatch):
    photo, folder = copied_run
    monkeypatch.setattr(pipeline, "is_closed", lambda mesh: False)
    with pytest.raises(ValueError, match=r"^watertight: expected a closed mesh.*--no-watertight"):
        follow(running(photo, folder, Settings.of(purpose="print", **SMALL)))
    assert (folder / "mesh.glb").is_file()
    assert not (folder / "mesh.stl").exists()
    result, *_ = follow(running(photo, folder, Settings.of(purpose="print", watertight=False, **SMALL)))
    assert (folder / "mesh.stl").is_file()
    assert result.figures["Watertight"] is False


def test_a_result_for_the_web_is_judged_as_it_stands_in_its_file(copied_run):
    photo, folder = copied_run
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


def test_reconstruct_writes_further_formats_and_says_so(copied_run, tmp_path):
    _, folder = copied_run
    settings = Settings(**SMALL, mesh_formats=("stl",), splat_formats=("spz",))
    follow(reconstructing(folder, tmp_path / "new", settings))
    assert {"mesh.glb", "mesh.stl", "splats.spz"} <= {p.name for p in (tmp_path / "new").iterdir()}
    assert manifest(tmp_path / "new")["settings"]["mesh_formats"] == ["stl"]
    assert manifest(tmp_path / "new")["settings"]["height_mm"] == 100
