"""`sv3d-fast info`: versions, devices, and why an implementation can't run here."""

import pytest
import tiny_sv3d
import torch

import sv3d_fast
from sv3d_fast import cli, info, memory
from sv3d_fast.kernels import native
from sv3d_fast.kernels.op import UnsupportedError
from sv3d_fast.model import config as model_config


def test_every_op_is_told_with_the_reasons():
    text = info.describe()
    assert text.startswith(f"sv3d-fast {sv3d_fast.__version__}, Python 3.")
    assert f"torch {torch.__version__}" in text
    chosen = info.chosen_implementations("cpu")
    assert {"splat_raster", "mesh_raster", "tsdf_fuse", "marching_cubes", "ssim"} <= set(chosen)
    if not torch.cuda.is_available():
        assert "no device" in text
        for name, implementation in chosen.items():
            assert f"{name:<20} {implementation}\n" in text + "\n"
        assert "not gsplat: needs CUDA tensors" in text


def test_versions_of_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("torch", "no-such-package"))
    assert info.versions() == {"torch": torch.__version__, "no-such-package": None}
    assert "no-such-package -" in info.describe()


def test_native_libraries_that_are_missing_or_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "folder", lambda: tmp_path)
    native.load.cache_clear()
    try:
        assert info._native("cpu") == "not built"
        (tmp_path / "libsv3d_fast_cpu.so").write_bytes(b"not a library")
        assert "does not load" in info._native("cpu")
    finally:
        native.load.cache_clear()


def test_a_forced_implementation_that_can_not_run_is_an_error(monkeypatch):
    monkeypatch.setenv("SV3D_FAST_BACKEND", "ssim=nothing")
    with pytest.raises(UnsupportedError, match="ssim has no implementation named 'nothing'"):
        info.chosen_implementations("cpu")


def test_the_plans_of_sv3d(capsys, monkeypatch):
    monkeypatch.setattr(model_config, "ModelConfig", tiny_sv3d.config)
    assert cli.main(["info", "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["plan", "conditioning", "denoising", "decoding", "peak,", "GiB"]
    plans = list(memory.candidates(tiny_sv3d.config(), memory.Shape(64, 5), 1))
    assert [line[:40].strip() for line in lines[1:5]] == [plan.name for plan in plans]
    assert [float(line.split()[-1]) for line in lines[1:5]] == [round(plan.peak / 2**30, 2) for plan in plans]
    assert cli.main(["info", "--max-memory", "40GiB"]) == 0
    assert "resident, 5 decoded at once, graph kept" in capsys.readouterr().out.splitlines()[1]
    assert cli.main(["info", "--max-memory", "1MB"]) == 2
    assert "the least that works is" in capsys.readouterr().err
