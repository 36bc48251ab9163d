"""A pipeline for the server's tests: a job's seed tells what it does with it. Imported by worker processes."""

import os
import signal
import time

import numpy as np

from sv3d_fast.events import Progress, StageFinished, StageStarted

QUICK, ENDLESS, DIES_ONCE, DIES, REFUSES, BREAKS, HANGS = range(7)


class Frames:
    """As much of an OrbitVideo as the server looks at."""

    def __init__(self):
        self.frames = np.full((5, 20, 20, 3), 90, np.uint8)


def open_fake(settings, device):
    return execute


def open_broken(settings, device):
    raise ValueError("model: no such weights")


def execute(job, picture, folder):
    kind = job.request.get("seed", QUICK)
    folder.mkdir(exist_ok=True)
    yield StageStarted("orbit")
    yield Progress("orbit", 1, 2)
    if kind == DIES or (kind == DIES_ONCE and job.attempts == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == REFUSES:
        raise ValueError(f"{picture}: no object in the picture")
    if kind == BREAKS:
        raise ZeroDivisionError(str(folder))
    while kind == HANGS:
        time.sleep(0.01)  # within a step, where nobody hears of orders
    while kind == ENDLESS:
        time.sleep(0.01)  # a step that takes a while
        yield Progress("orbit", 1, 2)
    (folder / "frames").mkdir(exist_ok=True)
    (folder / "frames" / "0000.png").write_bytes(picture.read_bytes())
    (folder / "report.html").write_text("<p>done</p>")
    (folder / ".hidden").write_text("no")
    (folder / "link").unlink(missing_ok=True)
    (folder / "link").symlink_to("/etc/passwd")
    yield StageFinished("orbit", Frames(), 0.5, 0)
