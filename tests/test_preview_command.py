"""`sv3d-fast preview`: photos to meshes by a small TripoSR of random weights."""

import json
import math
import subprocess
import sys
import zipfile

import av
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image, ImageDraw

from sv3d_fast import cli, triposr_pipeline
from sv3d_fast.image import ImageError
from sv3d_fast.preview_settings import PreviewSettings
from sv3d_fast.triposr import TripoSR, prepare, system
from sv3d_fast.triposr.config import TripoSRConfig, ViTConfig
from sv3d_fast.triposr_pipeline import find_photos

TINY = TripoSRConfig(
    image_size=32,
    vit=ViTConfig(width=24, layers=1, heads=3, mlp_width=20, image_size=48),
    plane_size=3,
    channels=16,
    heads=2,
    head_width=12,
    layers=2,
    groups=4,
    plane_channels=5,
    neurons=8,
    hidden_layers=3,
    samples=16,
)
RESOLUTION = 21


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a model of random weights, biased such that about half of the cube is dense."""
    torch.manual_seed(3)
    model = TripoSR(TINY).requires_grad_(False)
    model.image_tokenizer.model.embeddings.cls_token.normal_()
    for layer in model.decoder.layers[::2]:
        layer.weight.normal_()
    codes = model([np.full((32, 32, 3), 90, np.uint8)])
    raw, _ = model.renderer.field(model.decoder, codes[0]).query(torch.rand(500, 3) - 0.5)
    model.decoder.layers[-1].bias[0] += 1 + math.log(25) - raw.median()
    folder = tmp_path_factory.mktemp("triposr")
    model.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "model.ckpt")
    return folder


def draw(path, color=(200, 60, 40, 255), mode="RGBA"):
    image = Image.new("RGBA", (61, 50), (0, 0, 0, 0) if mode == "RGBA" else "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((14, 8, 40, 43), fill=color)
    pen.rectangle((30, 20, 48, 29), fill=(40, 80, 200, 255))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert(mode).save(path)
    return path


@pytest.fixture
def photo(tmp_path):
    return draw(tmp_path / "cup.png")


@pytest.fixture
def preview(tmp_path, checkpoint):
    """Runs the command into tmp_path/out; returns its exit status."""

    def call(*arguments):
        fixed = ["--model", checkpoint, "-o", tmp_path / "out", "--mc-resolution", RESOLUTION, "--device", "cpu"]
        return cli.main([str(a) for a in ("preview", *arguments, *fixed)])

    return call


def raw_mesh(path) -> trimesh.Trimesh:
    """As the file holds it, without this package's readers."""
    return trimesh.load(path, force="mesh", process=False)


def names(folder):
    return {p.name for p in folder.iterdir()} if folder.is_dir() else set()


FILES = {"input.png", "manifest.json", "mesh.glb", "preview.png", "report.html"}


def test_writes_what_the_library_makes(photo, preview, checkpoint, tmp_path, capsys):
    assert preview(photo) == 0
    folder = tmp_path / "out" / "cup"
    assert names(folder) == FILES
    assert "1 of 1 pictures" in capsys.readouterr().out
    model = TripoSR.from_pretrained(checkpoint, "config.yaml", "model.ckpt")
    square = prepare(Image.open(photo))
    (mesh,) = model.extract_mesh(model([square], "cpu"), True, resolution=RESOLUTION)
    written = raw_mesh(folder / "mesh.glb")
    np.testing.assert_allclose(written.vertices, mesh.vertices.numpy()[:, [1, 2, 0]], atol=1e-6)
    np.testing.assert_array_equal(written.faces, mesh.faces.numpy())
    assert np.array_equal(np.asarray(Image.open(folder / "input.png")), np.asarray(square))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["input"] == "cup.png"
    assert manifest["settings"]["mc_resolution"] == RESOLUTION
    assert manifest["figures"]["Faces"] == len(mesh.faces)
    assert manifest["stages"]["mesh"]["batch"] == 1
    assert manifest["stages"]["mesh"]["network"] == "plain"  # on a CPU
    assert set(manifest["stages"]) == {"mesh", "report"}
    page = (folder / "report.html").read_text()
    assert 'id="glb"' in page
    assert "Input and mesh" in page
    assert "A mesh from one picture" in page


@pytest.mark.parametrize(
    ("axes", "order"), [("gltf", {"glb": [1, 2, 0], "obj": [1, 2, 0], "ply": [0, 1, 2]}), ("upstream", {})]
)
def test_axes_of_every_format(photo, preview, checkpoint, tmp_path, axes, order):
    kinds = ("glb", "obj", "ply", "stl")
    assert preview(photo, "--axes", axes, "--model-save-format", *kinds, "--quiet") == 0
    model = TripoSR.from_pretrained(checkpoint)
    (mesh,) = model.extract_mesh(model([prepare(Image.open(photo))]), resolution=RESOLUTION)
    folder = tmp_path / "out" / "cup"
    assert names(folder) == FILES | {"mesh.obj", "mesh.ply", "mesh.stl"}
    for kind in kinds:
        written = raw_mesh(folder / f"mesh.{kind}")
        expected = mesh.vertices.numpy()[:, order.get(kind, [0, 1, 2])]
        np.testing.assert_allclose(written.bounds, [expected.min(0), expected.max(0)], atol=1e-5)
        if kind != "stl":
            np.testing.assert_allclose(written.vertices, expected, atol=1e-5)
    if axes == "gltf":
        line = (folder / "mesh.obj").read_text().splitlines()[1].split()
        np.testing.assert_allclose([float(v) for v in line[4:]], mesh.colors[0].numpy() / 255, atol=1e-4)


def test_formats_for_printers_and_phones(photo, preview, tmp_path):
    assert preview(photo, "--model-save-format", "3mf", "usdz", "--quiet") == 0
    folder = tmp_path / "out" / "cup"
    assert names(folder) == (FILES - {"mesh.glb"}) | {"mesh.3mf", "mesh.usdz"}
    assert zipfile.is_zipfile(folder / "mesh.3mf")
    assert b"primvars:displayColor" in (folder / "mesh.usdz").read_bytes()


def test_a_photo_that_fails_fails_alone(preview, tmp_path, capsys):
    good = [draw(tmp_path / "a.png"), draw(tmp_path / "more" / "b.jpg", mode="RGB")]
    draw(tmp_path / "more" / "c.png", (20, 200, 40, 255))
    (tmp_path / "more" / "notes.txt").write_text("no picture, and not asked for")
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGBA", (20, 20)).save(tmp_path / "blank.png")
    bad = [tmp_path / "missing.png", tmp_path / "text.png", tmp_path / "blank.png"]
    assert preview(bad[0], good[0], bad[1], bad[2], tmp_path / "more", "--quiet", "--batch-size", 4) == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 3
    for line, path, reason in zip(lines, bad, ("no such file", "not a picture", "no object"), strict=True):
        assert line.startswith("sv3d-fast: warning: ")
        assert line.count(str(path)) == 1
        assert reason in line
    assert {n for n in names(tmp_path / "out") if FILES <= names(tmp_path / "out" / n)} == {"a", "b", "c"}


def test_a_batch_is_its_photos(preview, tmp_path):
    colors = [(200, 60, 40, 255), (10, 200, 40, 255), (0, 0, 0, 255)]
    photos = [draw(tmp_path / f"{n}.png", color) for n, color in enumerate(colors)]
    vertices = []
    for arguments in (["--batch-size", 3], ["--batch-size", 1, "--overwrite"]):
        assert preview(*photos, *arguments, "--quiet") == 0
        vertices.append([raw_mesh(tmp_path / "out" / str(n) / "mesh.glb").vertices for n in range(3)])
    for together, alone in zip(*vertices, strict=True):
        np.testing.assert_allclose(together, alone, atol=1e-4)
    assert vertices[0][0].shape != vertices[0][2].shape or not np.allclose(vertices[0][0], vertices[0][2], atol=1e-4)


def test_the_same_call_later_takes_what_is_there(photo, preview, tmp_path, monkeypatch):
    folder = tmp_path / "out" / "cup"
    assert preview(photo, "--model-save-format", "glb", "obj", "--quiet") == 0
    before = {name: (folder / name).stat().st_mtime_ns for name in names(folder)}
    with monkeypatch.context() as patch:
        patch.setattr(TripoSR, "extract_mesh", lambda *_: pytest.fail("made again"))
        assert preview(photo, "--model-save-format", "glb", "obj", "--chunk-size", 500, "--quiet") == 0
    assert {name: (folder / name).stat().st_mtime_ns for name in names(folder)} == before
    assert preview(photo, "--foreground-ratio", 0.6, "--quiet") == 0
    assert names(folder) == FILES  # the OBJ was of another picture
    assert (folder / "mesh.glb").stat().st_mtime_ns != before["mesh.glb"]
    draw(photo, (0, 90, 0, 255))
    now = (folder / "mesh.glb").stat().st_mtime_ns
    assert preview(photo, "--foreground-ratio", 0.6, "--quiet") == 0
    assert (folder / "mesh.glb").stat().st_mtime_ns != now


def test_the_flags_of_the_official_script(photo, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(triposr_pipeline, "TURNTABLE_VIEWS", 6)
    arguments = [photo, "--pretrained-model-name-or-path", checkpoint, "--device", "cpu", "--chunk-size", 8192]
    arguments += ["--mc-resolution", RESOLUTION, "--no-remove-bg", "--foreground-ratio", 0.9, "--render"]
    arguments += [
        "--output-dir",
        tmp_path / "out",
        "--model-save-format",
        "obj",
        "--texture-resolution",
        512,
        "--quiet",
    ]
    assert cli.main(["preview", *map(str, arguments)]) == 0
    folder = tmp_path / "out" / "cup"
    assert names(folder) == FILES - {"mesh.glb"} | {"mesh.obj", "render.mp4"}
    whole = Image.new("RGBA", (61, 50), (127, 127, 127, 255))
    whole.alpha_composite(Image.open(photo))
    square = np.asarray(Image.open(folder / "input.png")).astype(int)
    assert np.abs(square - np.asarray(whole.convert("RGB"))).max() <= 1  # not moved, not cut out
    with av.open(str(folder / "render.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 6
    model = TripoSR.from_pretrained(checkpoint)
    (views,) = model.render(model([Image.open(folder / "input.png")]), 2, return_type="np")
    assert np.abs(views[0] - views[1]).mean() > 0.03
    for frame, view in ((0, views[0]), (3, views[1])):
        assert np.abs(frames[frame] / 255 - view).mean() < 0.02


def test_a_baked_texture_shows_the_field(photo, preview, checkpoint, tmp_path):
    size = 256
    assert preview(photo, "--bake-texture", "--texture-resolution", size, "--model-save-format", "glb", "obj") == 0
    folder = tmp_path / "out" / "cup"
    assert names(folder) == FILES | {"mesh.obj", "mesh.mtl", "mesh.png"}
    texture = np.asarray(Image.open(folder / "mesh.png"))
    assert texture.shape == (size, size, 3)
    solid = trimesh.load(folder / "mesh.obj", process=False)
    points, faces = trimesh.sample.sample_surface(solid, 2000, seed=0)
    barycentric = trimesh.triangles.points_to_barycentric(solid.triangles[faces], points)
    u, v = (solid.visual.uv[solid.faces[faces]] * barycentric[..., None]).sum(1).T
    column, row = (np.clip(t * size, 0, size - 1).astype(int) for t in (u, 1 - v))
    model = TripoSR.from_pretrained(checkpoint)
    code = model([Image.open(folder / "input.png")])[0]
    world = torch.from_numpy(points[:, [2, 0, 1]].copy()).float()  # from y up, front +z
    _, color = model.renderer.field(model.decoder, code).query(world)
    assert np.median(np.abs(texture[row, column] / 255 - color.numpy()).max(1)) < 0.02
    assert preview(photo, "--model-save-format", "obj") == 0
    assert names(folder) == FILES - {"mesh.glb"} | {"mesh.obj"}  # what the other settings wrote is gone


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ([], "no TripoSR checkpoint was given"),
        (["--model", "./nowhere"], "./nowhere is none"),
        (["--model", "mini"], "mini is none"),
        (["--model", "a/b/c"], "a/b/c is none"),
    ],
)
def test_a_missing_checkpoint_is_one_line_and_no_download(photo, tmp_path, capsys, monkeypatch, model, reason):
    monkeypatch.setattr(system.hub, "fetch", lambda *_: pytest.fail("downloads unasked"))
    assert cli.main(["preview", str(photo), "-o", str(tmp_path / "out"), *model]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert reason in err
    assert "stabilityai/TripoSR" in err
    assert "nothing is downloaded un" in err
    assert names(tmp_path / "out") == set()


def test_a_repository_is_fetched_when_it_is_named(checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(system.hub, "fetch", lambda *arguments: asked.append(arguments) or checkpoint)
    triposr_pipeline.open_triposr(PreviewSettings(model="stabilityai/TripoSR", device="cpu"))
    assert asked == [("stabilityai/TripoSR", ["config.yaml", "model.ckpt"])]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--mc-resolution", "8"], "mc_resolution: expected 16 to 1024, got 8"),
        (["--chunk-size", "-1"], "chunk_size: expected 0 to"),
        (["--batch-size", "0"], "batch_size: expected 1 to"),
        (["--foreground-ratio", "1.5"], "foreground_ratio: expected 0.1 to 1.0"),
        (["--no-remove-bg", "--matting-model", "x.onnx"], "matting_model: contradicts"),
        (["--device", "tpu"], "device: expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_settings_out_of_range(photo, checkpoint, tmp_path, capsys, arguments, reason):
    fixed = ["-o", str(tmp_path / "out"), "--model", str(checkpoint)]
    assert cli.main(["preview", str(photo), *fixed, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"sv3d-fast: error: {reason}")
    assert err.count("\n") == 1
    assert names(tmp_path / "out") == set()


def test_folders_of_others_are_left_alone(photo, preview, tmp_path, capsys):
    folder = tmp_path / "out" / "cup"
    folder.mkdir(parents=True)
    (folder / "mesh.glb").write_text("mine")
    assert preview(photo, "--quiet") == 1
    assert "holds mesh.glb but no manifest.json" in capsys.readouterr().err
    entry = {"fingerprint": "0", "warnings": []}
    (folder / "manifest.json").write_text(json.dumps({"stages": {"orbit": entry, "mesh": entry}}))
    assert preview(photo, "--quiet") == 1
    assert "holds orbit of another command" in capsys.readouterr().err
    assert (folder / "mesh.glb").read_text() == "mine"
    assert preview(photo, "--quiet", "--overwrite") == 0


def test_a_scene_without_a_surface_is_a_line(photo, preview, capsys, monkeypatch, tmp_path):
    whole = TripoSR.extract_mesh
    monkeypatch.setattr(TripoSR, "extract_mesh", lambda *a: whole(*a, threshold=1e30))
    assert preview(photo, "--quiet") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{photo}: threshold: expected a density that scene 0 crosses" in err
    assert not names(tmp_path / "out" / "cup") - {"manifest.json"}


def test_names_of_folders(tmp_path):
    photos = [draw(tmp_path / name) for name in ("a.png", "a.webp", "b.png")]
    assert find_photos(photos) == {"a.png": photos[0], "a.webp": photos[1], "b": photos[2]}
    assert list(find_photos([tmp_path])) == ["a.png", "a.webp", "b"]
    with pytest.raises(ValueError, match=r"'b\.png' is there twice"):
        find_photos([tmp_path, photos[2]])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="at least one picture"):
        find_photos([tmp_path / "empty"])


def test_reasons_name_their_photo_once(photo):
    assert triposr_pipeline._reason(photo, ImageError(f"{photo}: no such file")) == f"{photo}: no such file"
    assert triposr_pipeline._reason(photo, KeyError("x")) == f"{photo}: KeyError: 'x'"


def test_help_and_refusals_need_no_torch():
    program = (
        "import sys; from sv3d_fast.cli import main; assert main(['preview', 'x.png', '-o', 'y']) == 2;"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
