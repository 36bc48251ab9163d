"""What tests of the command line share: how it is called, what it complains of, and what it wrote."""

import sys
from pathlib import Path

import pytest

from sv3d_fast import cli, orbit_stage, pipeline

COMMAND = [sys.executable, "-m", "sv3d_fast.cli"]


def forbid_stages(monkeypatch):
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
