"""What the server answers with, as pydantic models: the schema that its OpenAPI tells, and that answers are held to."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .generation import Mode
from .jobs import State

EventKind = Literal["state", "stage", "progress", "frames", "warning", "end"]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Problem(_Answer):
    """Every refusal and error."""

    detail: str = Field(description="what is wrong, in one line")


class JobProgress(_Answer):
    """Of the stage that runs."""

    stage: str
    done: int
    total: int


class JobFile(_Answer):
    """One of the files of a job that is done."""

    name: str = Field(description="with its folder: images/0000.png")
    size: int = Field(description="bytes")
    url: str


class JobStatus(_Answer):
    """A job as its client sees it; times in seconds since 1970."""

    id: str
    mode: Mode
    state: State
    reason: str | None = Field(description="why it has failed, in one line")
    progress: JobProgress | None
    attempts: int = Field(description="starts so far: more than one where its worker died or its server ended")
    created: float
    started: float | None
    ended: float | None
    request: dict[str, Any] = Field(description="the fields that were given")
    files: list[JobFile]


class JobEvent(_Answer):
    """One event of a stream, as its lines say it."""

    id: str | None = Field(None, description="for Last-Event-ID")
    event: EventKind
    data: str = Field(description="JSON: of state and end the job, of the others what their names say")


class Health(_Answer):
    """The server answers."""

    status: str


class Readiness(_Answer):
    """Some worker is warm."""

    workers: int = Field(description="that are warm")
