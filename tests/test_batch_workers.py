"""Processes that reconstruct: what becomes of a picture whose process dies, and of a process whose batch dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from sv3d_fast.batch_picture import FAILED, Made, Outcome
from sv3d_fast.batch_source import Job
from sv3d_fast.batch_workers import TRIES, Fitter, usual_workers
from sv3d_fast.camera import Orbit
from sv3d_fast.settings import Settings
from sv3d_fast.stages import Product, Record
from sv3d_fast.video import OrbitVideo


def made(folder: Path) -> Made:
    generator = torch.Generator().manual_seed(3)
    frames = torch.randint(0, 256, (21, 24, 24, 3), generator=generator, dtype=torch.uint8)
    record = Record.open(folder, torch.device("cpu"), {"orbit": ("orbit.mp4",)}, {"input": "a"})
    orbit = Product("orbit", OrbitVideo(frames, Orbit.sine(7.5)), {"fingerprint": "f", "seconds": 1.5})
    return Made(Job(folder / "a.png", "a", Settings(seed=5)), orbit, record, time.time())


def describe(one: Made) -> Outcome:
    """What arrived, and where."""
    video = one.orbit.value
    row = {"entry": one.orbit.entry, "seed": one.job.settings.seed, "input": one.record.manifest["input"]}
    row |= {"sum": int(video.frames.long().sum()), "elevations": video.orbit.elevations.tolist()}
    return Outcome(row | {"process": os.getpid()}, [])


@pytest.mark.parametrize(("gigabytes", "expected"), [(16, 1), (25.4, 2), (80, 2)])
def test_two_reconstruct_where_a_gpu_has_room_for_them(monkeypatch, gigabytes, expected):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Mock(total_memory=int(gigabytes * 1e9)))
    assert usual_workers(torch.device("cuda", 0)) == expected
    assert usual_workers(torch.device("cpu")) == 1


def die(one: Made) -> Outcome:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def die_once(one: Made) -> Outcome:
    mark = one.record.folder / "mark"
    if not mark.exists():
        mark.touch()
        die(one)
    return describe(one)


def wait_long(one: Made) -> Outcome:
    (one.record.folder / "mark").write_text(str(os.getpid()))
    threading.Event().wait(600)
    raise AssertionError


def appeared(path: Path) -> str:
    """The text of a file, as soon as it has some."""
    end = time.monotonic() + 480
    while not path.exists() or not path.read_text():
        assert time.monotonic() < end
        threading.Event().wait(0.02)
    return path.read_text()


def test_a_picture_arrives_as_it_was_and_a_process_that_dies_is_replaced(tmp_path):
    fitter, one = Fitter(die_once), made(tmp_path)
    try:
        row = fitter.reconstruct(one).row
        again = fitter.reconstruct(one).row
    finally:
        fitter.close()
    expected = describe(one).row
    assert row["process"] != os.getpid()
    assert row == again == expected | {"process": row["process"]}


def test_a_picture_that_ends_every_process_fails_alone(tmp_path):
    fitter = Fitter(die)
    try:
        row = fitter.reconstruct(made(tmp_path)).row
    finally:
        fitter.close()
    assert (row["name"], row["state"]) == ("a", FAILED)
    assert f"ended {TRIES} times, at last with status -9" in row["reason"]


def test_closing_ends_a_picture_in_flight(tmp_path):
    fitter, ended = Fitter(wait_long), []

    def follow():
        with pytest.raises(InterruptedError):
            fitter.reconstruct(made(tmp_path))
        ended.append(True)

    thread = threading.Thread(target=follow)
    thread.start()
    appeared(tmp_path / "mark")
    fitter.close()
    thread.join(240)
    assert ended


def test_a_process_ends_with_its_batch(tmp_path):
    """Killed, so that nobody could tell it to end."""
    script = (
        "import sys; from pathlib import Path; from test_batch_workers import *\n"
        "if __name__ == '__main__': Fitter(wait_long).reconstruct(made(Path(sys.argv[1])))"
    )
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    batch = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": here})
    process = int(appeared(tmp_path / "mark"))
    batch.kill()
    batch.wait()
    end = time.monotonic() + 480
    while Path(f"/proc/{process}").exists() and "zombie" not in Path(f"/proc/{process}/status").read_text():
        assert time.monotonic() < end
        threading.Event().wait(0.02)
