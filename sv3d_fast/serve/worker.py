"""A worker process: takes jobs from the store, runs them, and looks between two events whether to go on.

It talks to its server through a pipe: messages go up (Ready, Refused, Finished), commands come down (WAKE, DRAIN,
STOP). When the pipe closes the server is gone, and the worker ends at once; the next server takes its job up.
"""

import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Generator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from sv3d_fast.events import Event, Progress, StageFinished, StageStarted, Warned

from .execution import Execute, Opening, gpu_memory
from .jobs import Job, JobStore, result_files
from .settings import ServeSettings
from .thumbnails import thumbnails

WAKE, DRAIN, STOP = "wake", "drain", "stop"
PICTURE, RESULT = "result.png", "result"  # in a job's folder; `previewing` names its folder after the picture
IDLE = 1.0  # seconds after which a worker looks for jobs unasked
EVERY = 0.1  # seconds between two reports of progress of a stage
NICE = 10  # of a worker on the CPU, so that the server answers while it computes
UNTRUSTED = 3  # exit status after an error of our own: who knows what it left in the process

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """The models are open and warm."""


@dataclass(frozen=True)
class Refused:
    """The settings can't work, however often they are tried: the reason, for the operator."""

    reason: str


@dataclass(frozen=True)
class Finished:
    """A job is off this worker, for whatever reason: what it took, and the GPU's memory in bytes."""

    mode: str
    waited: float
    seconds: float
    stages: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)


class _DeadlineError(Exception):
    pass


class _GivenUpError(Exception):
    """The job was cancelled, or is no longer this worker's."""


class _StoppedError(Exception):
    """The server ends, and has no more time for this job."""


def work(connection: Connection, settings: ServeSettings, name: str, device: str, opening: Opening) -> None:
    """The whole life of a worker; the target of its process."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the server, which says what to do
        signal.signal(number, signal.SIG_IGN)
    if device == "cpu":
        os.nice(NICE)
    orders = _Orders(connection)
    store = JobStore(settings.database)
    try:
        execute = opening(settings, device)
    except ValueError as error:
        connection.send(Refused(str(error)))
        return
    connection.send(Ready())
    while not orders.drain.is_set():
        orders.wake.clear()
        job = store.claim(name)
        if job is None:
            orders.wake.wait(IDLE)
            continue
        trusted, stages, began = True, {}, time.time()  # type: ignore[var-annotated]
        try:
            trusted = _run(job, store, settings, execute, orders, stages)
        finally:
            seconds = time.time() - began
            connection.send(Finished(job.mode, began - job.created, seconds, stages, gpu_memory(device)))
        if not trusted:
            os._exit(UNTRUSTED)


class _Orders:
    """Listens to the server in a thread."""

    def __init__(self, connection: Connection):
        self.wake, self.drain, self.stop = threading.Event(), threading.Event(), threading.Event()
        threading.Thread(target=self._listen, args=(connection,), daemon=True).start()

    def _listen(self, connection: Connection) -> None:
        while True:
            try:
                order = connection.recv()
            except (EOFError, OSError):
                os._exit(1)
            if order != WAKE:
                self.drain.set()
            if order == STOP:
                self.stop.set()
            self.wake.set()


def _run(
    job: Job, store: JobStore, settings: ServeSettings, execute: Execute, orders: _Orders, stages: dict[str, float]
) -> bool:
    """Brings a job to its end and fills in seconds by stage; returns whether this process can be trusted with more."""
    folder = settings.jobs_dir / job.id
    running = execute(job, folder / PICTURE, folder / RESULT)
    try:
        _follow(running, job, store, settings.deadline, orders, stages)
        store.finish(job, result_files(folder / RESULT))
    except _GivenUpError:
        store.cancelled(job)
    except _StoppedError:
        store.release(job)
    except _DeadlineError:
        store.fail(job, f"the deadline of {settings.deadline:g} s has passed")
    except Exception as error:
        reason, ours = _reason(error, folder)
        if ours:
            log.error("job %s: %s", job.id, traceback.format_exc())
        store.fail(job, reason)
        return not ours
    finally:
        running.close()
    return True


def _follow(
    running: Generator[Event, None, None],
    job: Job,
    store: JobStore,
    deadline: float,
    orders: _Orders,
    stages: dict[str, float],
) -> None:
    end, shown = time.monotonic() + deadline, _Throttle()
    while True:
        if orders.stop.is_set():
            raise _StoppedError
        if time.monotonic() > end:
            raise _DeadlineError
        if not store.is_held(job):
            raise _GivenUpError
        try:
            event = next(running)
        except StopIteration:
            return
        if isinstance(event, StageStarted):
            store.report(job, "stage", {"stage": event.stage})
        elif isinstance(event, StageFinished):
            stages[event.stage] = event.seconds
        elif isinstance(event, Warned):
            store.report(job, "warning", {"stage": event.stage, "message": event.message})
        elif isinstance(event, Progress) and shown.lets(event):
            store.report(job, "progress", {"stage": event.stage, "done": event.done, "total": event.total})
        if frames := thumbnails(event):
            store.report(job, "frames", {"frames": frames})


class _Throttle:
    """The first and the last step of a stage, and of the others one in a while."""

    def __init__(self):
        self.stage, self.last = "", 0.0

    def lets(self, event: Progress) -> bool:
        now = time.monotonic()
        if event.stage == self.stage and event.done < event.total and now - self.last < EVERY:
            return False
        self.stage, self.last = event.stage, now
        return True


def _reason(error: Exception, folder: Path) -> tuple[str, bool]:
    """A line for the client, without paths of this machine; and whether the error is our own."""
    text = " ".join(str(error).split())
    for path in (folder / PICTURE, folder):
        text = text.replace(str(path), "the picture")
    out_of_memory = isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
    if isinstance(error, RuntimeError | MemoryError) and out_of_memory:
        return "out of memory; smaller sizes need less", False
    if isinstance(error, ValueError) or type(error).__name__ == "NonFiniteError":
        return text or type(error).__name__, False
    if isinstance(error, OSError):
        return f"the server can't write its files: {error.strerror or type(error).__name__}", False
    return f"internal error ({type(error).__name__})", True
