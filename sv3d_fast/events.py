"""Typed progress: what the pipeline yields, and what the command line, servers and front ends consume."""

from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class StageStarted:
    """A stage begins; the stages inside it report their own Progress."""

    stage: str


@dataclass(frozen=True)
class Progress:
    """Step `done` of `total` of a stage is finished; `figures` are what the stage wants shown (loss, PSNR, ...)."""

    stage: str
    done: int
    total: int
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StageFinished:
    """A stage is done: its value, how long it took and the peak memory in bytes while it ran."""

    stage: str
    value: Any
    seconds: float
    peak_memory: int


@dataclass(frozen=True)
class StageResumed:
    """A stage was not run: its result was read back from what an earlier run wrote."""

    stage: str
    value: Any


@dataclass(frozen=True)
class Warned:
    """Something a user should know, that does not stop the run; it also stands in the manifest."""

    stage: str
    message: str


@dataclass(frozen=True)
class FileWritten:
    """A file appeared under its final name."""

    path: Path


Event = StageStarted | Progress | StageFinished | StageResumed | Warned | FileWritten


def finish(stage: Generator[Any, None, T]) -> T:
    """Runs a stage to its end without looking at its events; returns its value."""
    while True:
        try:
            next(stage)
        except StopIteration as stop:
            return stop.value
