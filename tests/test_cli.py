"""The command line: one line and exit status 2 for whatever a user gets wrong, and nothing written."""

import errno
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
import trimesh
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from sv3d_fast import cli, orbit_stage, pipeline
from sv3d_fast.camera import Orbit
from sv3d_fast.engine import NonFiniteError
from sv3d_fast.events import Progress
from sv3d_fast.formats import plan_of
from sv3d_fast.mini.config import WEIGHTS as EMBEDDED_WEIGHTS
from sv3d_fast.orbit_io import save_orbit
from sv3d_fast.settings import Settings
from sv3d_fast.video import OrbitVideo

PLAN = {k: v for k, v in plan_of(("glb", "obj"), ("ply",)).items() if k != "other"}  # of the default formats
COMMAND = [sys.executable, "-m", "sv3d_fast.cli"]


@pytest.fixture
def photo(tmp_path):
    image = Image.new("RGBA", (96, 96))
    draw = ImageDraw.Draw(image)
    draw.ellipse((24, 18, 72, 78), fill=(200, 60, 40, 255))
    draw.rectangle((34, 40, 62, 56), fill=(40, 80, 200, 255))
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def no_stage(monkeypatch):
    """Fails the test if a stage would do its work."""

    def started(*args, **kwargs):
        pytest.fail("a stage was started")

    monkeypatch.setattr(orbit_stage, "planned", started)
    for name in ("fitting", "extracting"):
        monkeypatch.setattr(pipeline, name, started)


def complaint(capsys, *arguments):
    """The one line that `arguments` are refused with."""
    assert cli.main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sv3d-fast: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err.removeprefix("sv3d-fast: error: ").rstrip("\n")


def written(folder: Path):
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


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
def test_bad_photos(tmp_path, capsys, no_stage, command, kind, reason):
    line = complaint(capsys, command, bad_photo(tmp_path, kind), "-o", tmp_path / "out")
    assert "bad.png" in line
    assert reason in line
    assert written(tmp_path / "out") == []


def test_a_photo_with_a_background_says_what_to_install(tmp_path, capsys, no_stage, monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "noise.png")
    assert "rembg" in complaint(capsys, "run", tmp_path / "noise.png", "-o", tmp_path / "out")
    assert written(tmp_path / "out") == []


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_where_the_output_folder_should_be(photo, tmp_path, capsys, no_stage, below):
    (tmp_path / "out").write_text("mine")
    line = complaint(capsys, "run", photo, "-o", tmp_path / "out" / below)
    assert str(tmp_path / "out") in line
    assert (tmp_path / "out").read_text() == "mine"


def test_a_budget_on_a_cpu_or_one_that_is_no_size_is_refused(photo, tmp_path, capsys, no_stage):
    for command in ("run", "orbit"):
        given = (command, photo, "-o", tmp_path / "out", "--device", "cpu", "--max-memory")
        assert "max_memory: expected a run on a GPU" in complaint(capsys, *given, "6GiB")
        assert "max_memory: expected a size such as 6GiB" in complaint(capsys, *given, "6 apples")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "a/b"), "Read-only file system: a/b"),
        (OSError("odd"), "odd"),
        (MemoryError(), "out of memory; smaller values of --decode-chunk-size"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), "Tried to allocate 2 GiB"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 TB"), "out of memory"),
        (NonFiniteError("the latents are not finite after step 3 of 50"), "not finite after step 3"),
        (ValueError("two\nlines " + "x" * 5000), "two lines xxx"),
    ],
)
def test_errors_are_one_line(photo, tmp_path, capsys, monkeypatch, error, reason):
    def fails(*args, **kwargs):
        raise error
        yield

    monkeypatch.setattr(orbit_stage, "planned", fails)
    line = complaint(capsys, "run", photo, "-o", tmp_path / "out")
    assert reason in line
    assert "None" not in line
    assert len(line) < 1100
    assert written(tmp_path / "out") == []


def test_our_own_errors_keep_their_traceback(photo, tmp_path, monkeypatch):
    monkeypatch.setattr(orbit_stage, "planned", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["run", str(photo), "-o", str(tmp_path / "out")])


@pytest.fixture
def white_frames(monkeypatch):
    """The model's place is taken by something faster."""

    def frames(model, images, orbits, config, seeds, **options):
        yield Progress("orbit", 1, 1)
        return torch.full((1, len(orbits[0]), 128, 128, 3), 255, dtype=torch.uint8)

    monkeypatch.setattr(orbit_stage, "planned", frames)


def test_quiet_says_nothing(photo, tmp_path, capsys, white_frames):
    arguments = ["orbit", str(photo), "-o", str(tmp_path / "out")]
    assert cli.main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert written(tmp_path / "out") == sorted(["manifest.json", *PLAN["orbit"]])
    assert cli.main(arguments) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'out' / 'orbit.mp4'}\n", "orbit    taken from the earlier run\n")


def test_a_run_on_frames_without_an_object(photo, tmp_path, capsys, white_frames):
    assert cli.main(["run", str(photo), "-o", str(tmp_path / "out"), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("sv3d-fast: error: frames: expected an object on a white background")
    assert written(tmp_path / "out") == sorted(["manifest.json", *PLAN["orbit"]])


def test_a_full_disk(photo, tmp_path, capsys, monkeypatch, white_frames):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert "No space left on device" in complaint(capsys, "run", photo, "-o", tmp_path / "out")
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
def test_bad_models(photo, tmp_path, capsys, no_stage, kind):
    model, reason = bad_model(tmp_path, kind)
    line = complaint(capsys, "run", photo, "-o", tmp_path / "out", "--model", model)
    assert reason in line
    assert written(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--matting-model", "m.onnx", "--no-remove-bg"], "matting_model: contradicts"),
        (["--elevation", "95"], "elevation: expected -89 to 89, got 95"),
        (["--elevation", "nan"], "elevation: expected"),
        (["--orbit", "spiral"], "orbit: expected static, sine or a JSON file of poses, got 'spiral'"),
        (["--frame-size", "100"], "frame_size: expected a multiple of 64"),
        (["--foreground-ratio", "0"], "foreground_ratio"),
        (["--steps", "0"], "steps"),
        (["--seed", "-1"], "seed"),
        (["--seed", "99999999999999999999"], "seed"),
        (["--target-faces", "3"], "target_faces"),
        (["--height-mm", "0"], "height_mm: expected 1 to 10000, got 0"),
        (["--device", "gpu"], "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--device", "cuda:999"], "device: cuda:999 is not there"),
    ],
)
def test_flags_that_can_not_be(photo, tmp_path, capsys, no_stage, flags, reason):
    assert reason in complaint(capsys, "run", photo, "-o", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def settings_of(monkeypatch, *arguments) -> Settings:
    """What reaches the pipeline of a command line."""
    given = []

    def take(source, output, settings, **kwargs):
        given.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr(pipeline, "reconstructing", take)
    assert cli.main(["reconstruct", "orbit", "-o", "out", *arguments]) == 2
    return given[0]


def test_flags_of_formats_and_purposes(monkeypatch):
    assert settings_of(monkeypatch) == Settings()
    assert settings_of(monkeypatch, "--for", "web") == Settings.of(purpose="web")
    chosen = settings_of(monkeypatch, "--for", "print", "--target-faces", "20000", "--mesh-format", "usdz", "stl",
                         "--no-watertight", "--height-mm", "35.5", "--splat-format", "spz")  # fmt: skip
    assert chosen == Settings.of(
        purpose="print", target_faces=20_000, mesh_formats=("usdz", "stl"), watertight=False, height_mm=35.5,
        splat_formats=("spz",),
    )  # fmt: skip
    other = settings_of(monkeypatch, "--unlit", "--texture-format", "jpeg", "--texture-resolution", "512")
    assert other == Settings(unlit=True, texture_format="jpeg", texture_resolution=512)


def test_cuda_on_a_machine_without(photo, tmp_path, capsys, no_stage, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = complaint(capsys, "run", photo, "-o", tmp_path / "out", "--device", "cuda")
    assert line == "device: cuda is not there; this machine has 0 CUDA devices"


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
def test_bad_poses(photo, tmp_path, capsys, no_stage, poses, reason):
    (tmp_path / "poses.json").write_text(poses, errors="surrogateescape")
    line = complaint(capsys, "run", photo, "-o", tmp_path / "out", "--orbit", tmp_path / "poses.json")
    assert reason in line
    assert "poses.json" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{not json", "[]", '{"stages": {"orbit": 1}}', ""])
def test_a_damaged_manifest_in_the_output_folder(photo, tmp_path, capsys, no_stage, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(text)
    assert "--overwrite" in complaint(capsys, "run", photo, "-o", tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_text() == text


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
def test_bad_orbits(tmp_path, capsys, no_stage, kind):
    orbit, reason = bad_orbit(tmp_path, kind)
    assert reason in complaint(capsys, "reconstruct", orbit, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_elevation_beside_cameras(tmp_path, capsys, no_stage):
    save_orbit(a_video(), tmp_path / "orbit")
    line = complaint(capsys, "reconstruct", tmp_path / "orbit", "-o", tmp_path / "out", "--elevation", "10")
    assert "brings its own cameras" in line
    line = complaint(capsys, "reconstruct", tmp_path / "orbit", "-o", tmp_path / "out", "--elevation", "100")
    assert line.startswith("elevation: expected")


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["run"], ["run", "x.png"], ["run", "x.png", "-o", "y", "--steps", "2.5"],
     ["run", "x.png", "-o", "y", "--for", "film"], ["batch", "x", "-o", "y", "--mesh-format", "fbx"],
     ["orbit", "x.png", "-o", "y", "--for", "web"], ["run", "x.png", "-o", "y", "--splat-format"],
     ["run", "x.png", "-o", "y", "--magic"], ["reconstruct", "x.mp4", "-o", "y", "--steps", "3"]],
)  # fmt: skip
def test_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.startswith("sv3d-fast ")


@pytest.mark.parametrize(("flags", "again"), [([], "the same command goes"), (["--overwrite"], "without --overwrite")])
def test_an_interruption_says_how_to_go_on(photo, tmp_path, capsys, monkeypatch, flags, again):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(orbit_stage, "planned", interrupted)
    assert cli.main(["run", str(photo), "-o", str(tmp_path / "out"), *flags]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert again in err
    assert err.count("\n") == 1


def test_warnings_are_one_line_each(photo, tmp_path, capsys, monkeypatch):
    import warnings

    def warns(settings):
        warnings.warn("of\nour own", stacklevel=1)
        raise ValueError("enough")

    monkeypatch.setattr(orbit_stage, "open_model", warns)
    assert cli.main(["run", str(photo), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "sv3d-fast: warning: of our own\nsv3d-fast: error: enough\n"


@pytest.mark.parametrize(("arguments", "status"), [(["info"], 141), (["--help"], 0)])  # argparse passes over it
def test_nobody_reads_the_output(arguments, status):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, *arguments], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == status
    assert done.stderr == ""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Everything with the embedded model and its own settings, interrupted once on the way."""
    folder = tmp_path_factory.mktemp("whole")
    image = Image.new("RGBA", (128, 128))
    draw = ImageDraw.Draw(image)
    draw.polygon([(40, 30), (88, 30), (96, 104), (32, 104)], fill=(180, 120, 60, 255))
    draw.rectangle((48, 52, 80, 84), fill=(240, 230, 200, 255))
    image.save(folder / "photo.png")
    command = [*COMMAND, "run", folder / "photo.png", "-o", folder / "out"]

    def heed_interrupts():  # a job that a shell started in the background inherits SIGINT as ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=heed_interrupts) as process:
        for line in process.stderr:
            if line.startswith("orbit "):
                break
        else:
            pytest.fail("the orbit was not finished")
        process.send_signal(signal.SIGINT)
        stopped = process.stderr.read()
        status = process.wait()
    frames = {p.name: p.read_bytes() for p in (folder / "out" / "images").iterdir()}
    done = subprocess.run(command, capture_output=True, text=True)
    return folder / "out", (status, stopped), done, frames


@pytest.mark.slow
def test_an_interrupted_process_ends_cleanly(whole):
    _, (status, stopped), *_ = whole
    assert status == 130
    assert "Traceback" not in stopped
    assert stopped.splitlines()[-1].startswith("sv3d-fast: interrupted")


@pytest.mark.slow
def test_the_whole_run_ends_with_every_file(whole):
    folder, _, done, frames = whole
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "orbit    taken from the earlier run"
    assert all(line.strip() and "\r" not in line for line in lines)
    assert {p.name for p in folder.iterdir()} == {"manifest.json", *(n for names in PLAN.values() for n in names)}
    assert {p.name: p.read_bytes() for p in (folder / "images").iterdir()} == frames
    assert done.stdout.startswith(f"{folder / 'mesh.glb'}: ")
    mesh = trimesh.load(folder / "mesh.glb", force="mesh", process=False)
    assert mesh.visual.material.baseColorTexture.size == (1024, 1024)
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    assert mesh.is_watertight
    figures = json.loads((folder / "manifest.json").read_text())["figures"]
    assert figures["PSNR of the splats against the frames (dB)"] > 20
    assert figures["Faces"] == len(mesh.faces) <= 20_000
