"""What killed processes left unfinished is tidied away, and nothing else."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from sv3d_fast import files
from sv3d_fast.files import atomic_file, atomic_folder, tidy, write_text
from sv3d_fast.stages import Record

KILLED = """
import os, signal, sys
from pathlib import Path
from sv3d_fast.files import atomic_file, atomic_folder
folder = Path(sys.argv[1])
with atomic_file(folder / "mesh.v2.glb") as file, atomic_folder(folder / "images") as images:
    file.write_bytes(b"half")
    (images / "0000.png").write_bytes(b"half")
    if sys.argv[2] == "replacing":
        replace = os.replace
        def once(source, target):
            replace(source, target)
            os.kill(os.getpid(), signal.SIGKILL)
        os.replace = once
    else:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def kill(folder, when):
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), when])
    assert done.returncode == -signal.SIGKILL


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def output(tmp_path):
    """A folder that holds an earlier result."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0000.png").write_bytes(b"whole")
    (tmp_path / "mesh.v2.glb").write_bytes(b"whole")
    return tmp_path


@pytest.mark.parametrize("when", ["writing", "replacing"])
def test_a_killed_writer(output, when):
    kill(output, when)
    assert sum(name.startswith(".") for name in names(output)) == (2 if when == "writing" else 3)
    assert (output / "images").exists() == (when == "writing")
    tidy(output)
    assert names(output) == ["images", "mesh.v2.glb"]
    assert (output / "images" / "0000.png").read_bytes() == (output / "mesh.v2.glb").read_bytes() == b"whole"


def test_a_run_tidies_its_folder_first(output):
    kill(output, "writing")
    Record.open(output, torch.device("cpu"), {}, {})
    assert names(output) == ["images", "mesh.v2.glb"]


def test_what_is_being_written_stays(output):
    with atomic_file(output / "a.glb") as file, atomic_folder(output / "images") as images:
        file.write_bytes(b"a")
        tidy(output)
        assert file.exists()
        assert images.exists()
    assert names(output) == ["a.glb", "images", "mesh.v2.glb"]


def test_names_that_are_not_ours_stay(tmp_path):
    kept = [".a.b-c.d.partial", ".mesh.1a2b3c4d.partial.glb", ".git", "a.00-1-1-00.partial", ".x.00-1-1-00.other.glb"]
    for name in kept:
        (tmp_path / name).write_text("")
    tidy(tmp_path)
    assert names(tmp_path) == sorted(kept)


def test_another_machine_has_a_day(tmp_path, monkeypatch):
    left = tmp_path / ".mesh.0badcafe-2147483646-1-00ff00ff.partial.glb"
    left.write_text("")
    tidy(tmp_path)
    assert left.exists()
    monkeypatch.setattr(files.time, "time", lambda: os.stat(left).st_ctime + files.ABANDONED + 1)
    tidy(tmp_path)
    assert names(tmp_path) == []


def test_a_process_number_that_was_given_anew(tmp_path):
    """This process has the number of one that wrote here, and began at another time."""
    with atomic_file(tmp_path / "mesh.glb") as file:
        file.write_text("")
        place, pid, began, end = file.name.split(".")[2].split("-")
        assert (int(pid), int(began) > 0) == (os.getpid(), True)
        before = file.with_name(f".mesh.{place}-{pid}-{int(began) - 1}-{end}.partial.glb")
        before.write_text("")
        tidy(tmp_path)
        assert file.exists()
        assert not before.exists()


def test_links_are_not_followed(output, tmp_path_factory):
    kill(output, "writing")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_text(elsewhere / "kept", "")
    (left,) = output.glob(".images.*")
    (left / "0000.png").unlink()
    left.rmdir()
    left.symlink_to(elsewhere)
    tidy(output)
    assert names(output) == ["images", "mesh.v2.glb"]
    assert names(elsewhere) == ["kept"]


def test_a_folder_that_is_not_there(tmp_path):
    tidy(tmp_path / "nowhere")
    assert names(tmp_path) == []
