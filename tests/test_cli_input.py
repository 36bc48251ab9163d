"""Photos, models, poses, orbits and output folders that are no such thing: one line, status 2, nothing written."""

import json
import pickle
import shutil
import struct
import sys
import zlib

import pytest
import torch
from command_line import complaint, forbid_stages, written
from PIL import Image
from safetensors.torch import load_file, save_file
from small_run import blob

from sv3d_fast.camera import Orbit
from sv3d_fast.mini.config import WEIGHTS as EMBEDDED_WEIGHTS
from sv3d_fast.orbit_io import save_orbit
from sv3d_fast.video import OrbitVideo


@pytest.fixture
def photo(tmp_path):
    return blob(tmp_path / "photo.png")


@pytest.fixture(autouse=True)
def no_stage(monkeypatch):
    forbid_stages(monkeypatch)


def bomb(path):
    """A PNG of some kilobytes that says it holds 60000 x 60000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1 << 20))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def bad_photo(folder, kind):
    path = folder / "bad.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "truncated":
        Image.effect_noise((200, 200), 50).save(path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "text":
        path.write_text("I am no picture\n" * 100)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "bomb":
        bomb(path)
    elif kind == "blank":
        Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(path)
    elif kind == "uniform":
        Image.new("RGB", (64, 64), (90, 90, 90)).save(path)
    elif kind == "white":
        Image.new("RGB", (64, 64), "white").save(path)
    return path


@pytest.mark.parametrize("command", ["run", "orbit"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file"), ("folder", "not a file"), ("truncated", "damaged"), ("text", "not a picture"),
        ("empty", "not a picture"), ("bomb", "megapixels"), ("blank", "no object"), ("uniform", "one uniform colour"),
        ("white", "one uniform colour"),
    ],
)  # fmt: skip
def test_bad_photos(tmp_path, capsys, command, kind, reason):
    line = complaint(capsys, command, bad_photo(tmp_path, kind), "-o", tmp_path / "out")
    assert "bad.png" in line
    assert reason in line
    assert written(tmp_path / "out") == []


def test_a_photo_with_a_background_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "noise.png")
    assert "rembg" in complaint(capsys, "run", tmp_path / "noise.png", "-o", tmp_path / "out")
    assert written(tmp_path / "out") == []


def bad_model(folder, kind):
    path = folder / "model"
    if kind == "NaN":
        shutil.copytree(EMBEDDED_WEIGHTS, path)
        file = next(path.glob("unet/*.safetensors"))
        tensors = load_file(file)
        name = sorted(tensors)[0]
        tensors[name].view(-1)[0] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
        return path, name
    if kind == "pickle":
        path = folder / "model.ckpt"
        path.write_bytes(pickle.dumps({"weights": [1.0]}))
        return path, "pickle"
    if kind == "renamed pickle":
        path = folder / "model.safetensors"
        torch.save({"weights": torch.ones(2)}, path)
        return path, "pickle"
    if kind == "picture":
        path = folder / "model.png"
        Image.new("RGB", (8, 8)).save(path)
        return path, "model.png"
    if kind == "other weights":
        path = folder / "model.safetensors"
        save_file({"a": torch.ones(2)}, path)
        return path, "not an official SV3D checkpoint"
    if kind == "empty folder":
        path.mkdir()
        return path, "no model here"
    if kind == "no config":
        shutil.copytree(EMBEDDED_WEIGHTS, path)
        (path / "unet" / "config.json").unlink()
        return path, "config.json"
    return folder / "missing.safetensors", "no such file"


@pytest.mark.parametrize(
    "kind",
    ["NaN", "pickle", "renamed pickle", "picture", "other weights", "empty folder", "no config", "missing"],
)
def test_bad_models(photo, tmp_path, capsys, kind):
    model, reason = bad_model(tmp_path, kind)
    line = complaint(capsys, "run", photo, "-o", tmp_path / "out", "--model", model)
    assert reason in line
    assert written(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("poses", "reason"),
    [
        ("[{", "poses.json"), ("{}", "list of"), ("[]", "list of"), ("3", "list of"), ('"text"', "list of"),
        ("[1, 2, 3, 4]", "poses[0]"), ('[{"elevation": 1}]', "poses[0]"),
        ('[{"elevation": "a", "azimuth": 0}]', "poses[0]: elevation"),
        ('[{"elevation": null, "azimuth": 0}]', "poses[0]: elevation"),
        ('[{"elevation": 0, "azimuth": 180}, {"elevation": 0, "azimuth": 0}]', "expected 4 to 1000 poses, got 2"),
        (json.dumps([{"elevation": float("nan"), "azimuth": a} for a in (90, 180, 270, 0)]), "finite degrees"),
        (json.dumps([{"elevation": 0, "azimuth": a} for a in (90, float("inf"), 270, 0)]), "finite degrees"),
        (json.dumps([{"elevation": 91, "azimuth": a} for a in (90, 180, 270, 0)]), "(-90, 90)"),
        (json.dumps([{"elevation": 0, "azimuth": a} for a in (0, 90, 180, 270, 0)]), "which is the input view"),
        (json.dumps([{"elevation": 0, "azimuth": a} for a in (90, 180, 270, 300)]), "expected the input view"),
        ("[" * 100_000, "poses.json"), ("\udcff\udcfe", "poses.json"),
    ],
)  # fmt: skip
def test_bad_poses(photo, tmp_path, capsys, poses, reason):
    (tmp_path / "poses.json").write_text(poses, errors="surrogateescape")
    line = complaint(capsys, "run", photo, "-o", tmp_path / "out", "--orbit", tmp_path / "poses.json")
    assert reason in line
    assert "poses.json" in line
    assert not (tmp_path / "out").exists()


def a_video(frames=8, empty=False):
    pictures = torch.full((frames, 32, 32, 3), 255, dtype=torch.uint8)
    if not empty:
        pictures[:, 8:24, 10:22] = torch.tensor([200, 40, 40], dtype=torch.uint8)
    return OrbitVideo(pictures, Orbit.static(10, frames))


def bad_orbit(folder, kind):
    path = folder / "orbit"
    if kind == "missing":
        return path, "no such file or folder"
    if kind == "empty folder":
        path.mkdir()
        return path, "at least 4 frames, got 0"
    if kind == "short":
        path.mkdir()
        for k in range(3):
            Image.new("RGB", (32, 32), "red").save(path / f"{k}.png")
        return path, "at least 4 frames, got 3"
    if kind == "text":
        path = folder / "orbit.mp4"
        path.write_text("no video")
        return path, "can't be decoded"
    save_orbit(a_video(empty=kind == "blank"), path)
    if kind == "truncated":
        path = path / "orbit.mp4"
        path.write_bytes(path.read_bytes()[:-300])
        return path, "orbit.mp4"
    told = json.loads((path / "transforms.json").read_text())
    if kind == "traversal":
        Image.new("RGB", (32, 32)).save(folder / "secret.png")
        told["frames"][2]["file_path"] = "../secret.png"
    elif kind == "absolute":
        told["frames"][2]["file_path"] = "/etc/hostname"
    elif kind == "NaN":
        told["frames"][0]["transform_matrix"][0][0] = float("nan")
    elif kind == "missing frame":
        (path / "images" / "0002.png").unlink()
    (path / "transforms.json").write_text(json.dumps(told))
    reasons = {"traversal": "inside its folder", "absolute": "inside its folder", "NaN": "finite", "blank": "object"}
    return path, reasons.get(kind, "is missing")


@pytest.mark.parametrize(
    "kind",
    ["missing", "empty folder", "short", "text", "truncated", "traversal", "absolute", "NaN", "missing frame", "blank"],
)
def test_bad_orbits(tmp_path, capsys, kind):
    orbit, reason = bad_orbit(tmp_path, kind)
    assert reason in complaint(capsys, "reconstruct", orbit, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_elevation_beside_cameras(tmp_path, capsys):
    save_orbit(a_video(), tmp_path / "orbit")
    line = complaint(capsys, "reconstruct", tmp_path / "orbit", "-o", tmp_path / "out", "--elevation", "10")
    assert "brings its own cameras" in line
    line = complaint(capsys, "reconstruct", tmp_path / "orbit", "-o", tmp_path / "out", "--elevation", "100")
    assert line.startswith("elevation: expected")


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_where_the_output_folder_should_be(photo, tmp_path, capsys, below):
    (tmp_path / "out").write_text("mine")
    line = complaint(capsys, "run", photo, "-o", tmp_path / "out" / below)
    assert str(tmp_path / "out") in line
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("text", ["{not json", "[]", '{"stages": {"orbit": 1}}', ""])
def test_a_damaged_manifest_in_the_output_folder(photo, tmp_path, capsys, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(text)
    assert "--overwrite" in complaint(capsys, "run", photo, "-o", tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_text() == text
