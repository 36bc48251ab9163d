"""The flags of the command line: what reaches the pipeline of them, and what is refused before anything is written."""

import pytest
import torch
from command_line import complaint, forbid_stages
from small_run import blob

from sv3d_fast import cli, pipeline
from sv3d_fast.settings import Settings


@pytest.fixture
def photo(tmp_path):
    return blob(tmp_path / "photo.png")


@pytest.fixture(autouse=True)
def no_stage(monkeypatch):
    forbid_stages(monkeypatch)


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
        (["--device", "cpu", "--dtype", "float16"], "dtype: expected float32 or bfloat16 on a CPU"),
        (["--dtype", "float32", "--max-memory", "6GiB"], "max_memory: contradicts dtype float32"),
        (["--device", "gpu"], "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--device", "cuda:999"], "device: cuda:999 is not there"),
    ],
)
def test_flags_that_can_not_be(photo, tmp_path, capsys, flags, reason):
    assert reason in complaint(capsys, "run", photo, "-o", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_budget_on_a_cpu_or_one_that_is_no_size_is_refused(photo, tmp_path, capsys):
    for command in ("run", "orbit"):
        given = (command, photo, "-o", tmp_path / "out", "--device", "cpu", "--max-memory")
        assert "max_memory: expected a run on a GPU" in complaint(capsys, *given, "6GiB")
        assert "max_memory: expected a size such as 6GiB" in complaint(capsys, *given, "6 apples")
    assert not (tmp_path / "out").exists()


def test_cuda_on_a_machine_without(photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = complaint(capsys, "run", photo, "-o", tmp_path / "out", "--device", "cuda")
    assert line == "device: cuda is not there; this machine has 0 CUDA devices"


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
