"""Requests that schemathesis makes up from the server's own OpenAPI, well-formed and not, and what its answers break.

Every answer is held to the description: its status, its media type, its headers and its schema; no 5xx; a request that
the description forbids is refused. Jobs come from a pipeline that writes a file at once, so the server alone is tried.

python -m bench.openapi [--examples 1000]
"""

import argparse
import base64
import contextlib
import io
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import schemathesis
from fastapi import FastAPI
from PIL import Image
from schemathesis import Case, GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.openapi.checks import RejectedPositiveData
from schemathesis.python import asgi
from schemathesis.schemas import APIOperation

from sv3d_fast.events import Event, StageStarted
from sv3d_fast.serve.app import create_app
from sv3d_fast.serve.jobs import DONE
from sv3d_fast.serve.settings import ServeSettings

from .results import record

ISSUE = "production"
# What the description doesn't say of a good request: which fields a mode takes, and what a picture is.
UNDESCRIBED = re.compile(r"image: |\w+: mode |mode: this server")
SECONDS = 60.0  # that a worker may take to start, and the first job to end


def open_quick(settings: ServeSettings, device: str) -> Callable[..., Generator[Event, None, None]]:
    """A pipeline that has nothing to do; an Opening."""
    return quick


def quick(job, picture: Path, folder: Path) -> Generator[Event, None, None]:
    """A job whose result is a text."""
    yield StageStarted("orbit")
    folder.mkdir(exist_ok=True)
    (folder / "report.html").write_text("<p>done</p>")


def pictures() -> st.SearchStrategy[bytes]:
    """Bytes of pictures, whole and cut, and of none."""
    found = []
    for kind in ("PNG", "JPEG", "WEBP"):
        buffer = io.BytesIO()
        Image.new("RGB", (9, 7), (200, 60, 40)).save(buffer, kind)
        found += [buffer.getvalue(), buffer.getvalue()[:40]]
    return st.sampled_from(found) | st.binary(max_size=99)


class Trial:
    """Of a running application. answers: how many, by route with its media type and by status; faults: what they broke,
    with the request."""

    def __init__(self, app: FastAPI):
        self.faults: list[str] = []
        self.answers: Counter[tuple[str, int]] = Counter()
        schema = schemathesis.openapi.from_asgi("/openapi.json", app)
        self.service = app.state.service
        self.operations = [result.ok() for result in schema.get_all_operations()]

    def run(self, examples: int) -> None:
        """At most so many requests of each kind to every route: such as its description allows, with a path made up and
        with that of a job that is done; and such as it forbids, where it forbids any."""
        _until(lambda: self.service.supervisor.ready)
        for operation in sorted(self.operations, key=lambda o: o.path.count("{")):  # jobs are made before they are read
            self._try(operation, GenerationMode.POSITIVE, examples)
            if operation.body:
                self._try(operation, GenerationMode.NEGATIVE, examples)
            if "{job}" in operation.path:
                job = _until(self._done)
                self._try(operation, GenerationMode.POSITIVE, examples, path_parameters={"job": job})
            if "{name}" in operation.path:
                fixed = {"job": job, "name": "report.html"}
                self._try(operation, GenerationMode.POSITIVE, examples, path_parameters=fixed)

    def _done(self) -> str | None:
        jobs = (self.service.store.get(job) for job in self.service.store.ids())
        return next((job.id for job in jobs if job.state == DONE), None)

    def _try(self, operation: APIOperation, mode: GenerationMode, examples: int, **fixed: Any) -> None:
        def attempt(case: Case, picture: bytes) -> None:
            if case.media_type == "multipart/form-data" and isinstance(case.body, dict):
                hypothesis.assume([] not in case.body.values())  # which a form can't say: the field is left out
            if mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
                as_text = case.media_type == "application/json"
                case.body["image"] = base64.b64encode(picture).decode() if as_text else picture
            try:
                response = case.call()
                self.answers[f"{operation.label} {case.media_type or ''}".strip(), response.status_code] += 1
                case.validate_response(response)
            except FailureGroup as group:
                self.faults += [
                    f"{failure} {case.as_curl_command()} {response.status_code} {response.content[:300]!r}"
                    for failure in group.exceptions
                    if not isinstance(failure, RejectedPositiveData) or not UNDESCRIBED.match(response.json()["detail"])
                ]
            except Exception as error:  # the application's own
                self.faults.append(f"{case.as_curl_command()}: {error!r}")

        cases = operation.as_strategy(generation_mode=mode, **fixed)
        every = hypothesis.settings(
            max_examples=examples, derandomize=True, database=None, deadline=None, phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        every(hypothesis.given(case=cases, picture=pictures())(attempt))()


@contextlib.contextmanager
def application(folder: Path) -> Iterator[FastAPI]:
    """With one worker; it ends with the block."""
    yield create_app(ServeSettings(data_dir=folder, devices=("cpu",), queue_size=10_000), open_quick)
    asgi.shutdown_lifespans()


def _until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + SECONDS
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {SECONDS:g} s for the server")
        time.sleep(0.05)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1000, help="of each kind of request to a route")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, application(Path(scratch)) as app:
        trial = Trial(app)
        trial.run(args.examples)
    for (route, status), count in sorted(trial.answers.items()):
        print(f"{count:6} x {status} {route}")
    print("\n".join(trial.faults[:50]))
    requests = sum(trial.answers.values())
    record(
        ISSUE,
        f"answers against the OpenAPI, {requests:,} requests by schemathesis",
        len(trial.faults),
        "faults",
        "<= 0",
    )


if __name__ == "__main__":
    main()
