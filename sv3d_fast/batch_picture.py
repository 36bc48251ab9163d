"""One picture of a batch in two halves, which may run in processes of their own, and the row that it ends as."""

import hashlib
import json
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .batch_source import Job
from .events import Event, T, Warned
from .model.weights import SV3DModel
from .orbit_stage import making, open_model, writing
from .pipeline import reconstructing_orbit
from .settings import Settings
from .stages import Product, Record
from .video import OrbitVideo

DONE, FAILED = "done", "failed"


@dataclass(frozen=True)
class Outcome:
    """How a picture ended: its row for results.jsonl, and its warnings, the picture's name in front."""

    row: dict[str, Any]
    warnings: list[Warned]


@dataclass(frozen=True)
class Made:
    """A picture whose orbit is made; writing and reconstruction are to come. started: seconds since the epoch."""

    job: Job
    orbit: Product[OrbitVideo]
    record: Record
    started: float
    warnings: list[Warned] = field(default_factory=list)


class Maker:
    """Makes orbits with models that are opened once.

    Several threads may call `make`: the networks serve one of them at a time, while others read their pictures.
    """

    def __init__(self):
        self._models: dict[tuple[str, str, str], SV3DModel] = {}
        self._turn = threading.Lock()
        self._stopped = threading.Event()

    def open(self, settings: Sequence[Settings]) -> None:
        """Opens every model that these name. Raises ValueError for weights or devices that can't be used."""
        for one in settings:
            self._model(one)

    def make(self, job: Job, folder: Path) -> Made | Outcome:
        """The picture's orbit, to be written below `folder`, or how it failed.

        Raises InterruptedError once stopped, and torch's AcceleratorError, after which no picture of this process could
        be made.
        """
        started, warnings = time.time(), []  # type: ignore[var-annotated]
        try:
            model = self._model(job.settings)
            running = making(job.picture, folder / job.name, job.settings, model=model, turn=self._turn)
            orbit, record = _followed(running, job, warnings, self._stopped)
        except (InterruptedError, torch.AcceleratorError):
            raise
        except Exception as error:
            return failed(job, error, started, warnings)
        return Made(job, orbit, record, started, warnings)

    def stop(self) -> None:
        """Ends every `make` at its next event."""
        self._stopped.set()

    def _model(self, settings: Settings) -> SV3DModel:
        key = (settings.model, settings.device, settings.dtype)
        if key not in self._models:  # else nobody waits here: the next picture is read while others' networks run
            with self._turn:
                if key not in self._models:
                    self._models[key] = open_model(settings)
        return self._models[key]


def reconstruct(made: Made) -> Outcome:
    """The second half: the orbit's files, splats, mesh and report, or how they failed. Raises torch's AcceleratorError
    as `make` does."""
    warnings = list(made.warnings)
    try:
        video = _followed(writing(made.orbit, made.record), made.job, warnings)
        result = _followed(reconstructing_orbit(video, made.job.settings, made.record), made.job, warnings)
    except torch.AcceleratorError:
        raise
    except Exception as error:
        return failed(made.job, error, made.started, warnings)
    return Outcome(_row(made.job, DONE, made.started) | {"figures": result.figures}, warnings)


def failed(job: Job, error: Exception, started: float, warnings: list[Warned]) -> Outcome:
    """The end of a picture that raised."""
    known = isinstance(error, ValueError | OSError | MemoryError | RuntimeError)
    reason = " ".join((str(error) or type(error).__name__).split())
    row = _row(job, FAILED, started) | {"reason": reason if known else f"{type(error).__name__}: {reason}"}
    return Outcome(row, warnings)


def key_of(job: Job) -> str:
    """What tells whether a row still speaks of this picture with these settings."""
    try:
        state = job.picture.stat()
        of_file = [state.st_size, state.st_mtime_ns]
    except OSError:
        of_file = []
    text = json.dumps([str(job.picture.resolve()), of_file, job.settings.to_dict()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _row(job: Job, state: str, started: float) -> dict[str, Any]:
    seconds = round(time.time() - started, 2)
    return {"name": job.name, "picture": str(job.picture), "state": state, "key": key_of(job), "seconds": seconds}


def _followed(
    running: Generator[Event, None, T], job: Job, warnings: list[Warned], stopped: threading.Event | None = None
) -> T:
    """Runs a stage to its end, keeping its warnings under the picture's name; returns its value."""
    while True:
        if stopped is not None and stopped.is_set():
            running.close()
            raise InterruptedError("the batch was stopped")
        try:
            event = next(running)
        except StopIteration as end:
            return end.value
        if isinstance(event, Warned):
            warnings.append(Warned(event.stage, f"{job.name}: {event.message}"))
