"""What the command line says and leaves: of success, errors, warnings and interruptions, a line each."""

import errno
import os

import pytest
import torch
from command_line import complaint, written
from small_run import PLAN, blob

from sv3d_fast import cli, orbit_stage
from sv3d_fast.engine import NonFiniteError
from sv3d_fast.events import Progress


@pytest.fixture
def photo(tmp_path):
    return blob(tmp_path / "photo.png")


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
