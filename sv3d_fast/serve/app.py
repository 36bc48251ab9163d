"""The routes, and nothing else: each asks the store, and the workers do the rest."""

import contextlib
import logging
import math
import mimetypes
import secrets
import shutil
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import anyio
from anyio.to_thread import run_sync
from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from sv3d_fast import __version__

from .answers import Health, JobEvent, JobStatus, Problem, Readiness
from .execution import Opening, device_names, open_pipeline
from .generation import Generation
from .jobs import CANCELLED, DONE, ENDED, QUEUED, Job, JobStore, QueueFullError
from .keys import find_owner, read_hashes
from .metrics import Metrics
from .middleware import METHODS, BodyLimit, Measured
from .settings import ServeSettings
from .stream import job_events
from .supervisor import Supervisor
from .uploads import JSONGeneration, read_request, save_picture
from .worker import PICTURE, RESULT

log = logging.getLogger(__name__)

DECODERS = 2  # uploads that are decoded at a time
GUESS = 10.0  # seconds that a job takes, before one was seen
REASONS = {
    400: "A body that can't be read", 401: "No valid API key", 404: "No such job, or no such file of it",
    409: "It has ended already", 413: "The body is too large", 415: "Neither multipart nor JSON",
    422: "A bad field or picture", 429: "The queue is full; Retry-After says when to come again",
    503: "The server drains, no worker is ready, or its disk is full",
}  # fmt: skip

EVENT = JobEvent.model_json_schema()


def _refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Of a route, for OpenAPI."""
    problem = {"application/json": {"schema": Problem.model_json_schema()}}
    found: dict[int | str, Any] = {code: {"description": REASONS[code], "content": problem} for code in codes}
    for code in {429, 503} & set(codes):
        found[code]["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return found


class Service:
    """What the routes share. Raises ValueError for settings that this machine can't serve."""

    def __init__(self, settings: ServeSettings, opening: Opening = open_pipeline):
        self.settings = settings
        self.hashes = read_hashes(settings.api_key_file) if settings.api_key_file else None
        settings.jobs_dir.mkdir(parents=True, exist_ok=True)
        self.store = JobStore(settings.database)
        self.metrics = Metrics(self.store, lambda: self.supervisor.ready)
        devices = device_names(settings.devices)
        self.refusal: str | None = None
        self.supervisor = Supervisor(settings, self.store, self.metrics, devices, opening, self._refuse)
        self.workers, self.closing = len(devices), False
        self.decoders = anyio.CapacityLimiter(DECODERS)

    def _refuse(self, reason: str) -> None:
        self.refusal = reason

    def retry_after(self) -> int:
        """Seconds until a place in the queue may be free."""
        return min(600, math.ceil((self.store.mean_seconds() or GUESS) / self.workers))

    def describe(self, job: Job) -> dict[str, Any]:
        """A job as its client sees it."""
        here = f"/v1/jobs/{job.id}"
        files = self.store.files(job.id) if job.state == DONE else {}  # it may have ended since it was read
        return {
            "id": job.id, "mode": job.mode, "state": job.state, "reason": job.reason, "progress": job.progress,
            "attempts": job.attempts, "created": job.created, "started": job.started, "ended": job.ended,
            "request": job.request,
            "files": [{"name": n, "size": s, "url": f"{here}/files/{n}"} for n, s in files.items()],
        }  # fmt: skip


def create_app(settings: ServeSettings, opening: Opening = open_pipeline) -> FastAPI:
    """The application; its workers live as long as its lifespan. `app.state.service` is its Service."""
    service = Service(settings, opening)
    store, supervisor, metrics = service.store, service.supervisor, service.metrics

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        supervisor.start()
        yield
        service.closing = True
        await run_sync(supervisor.drain, 0.0)
        store.close()

    app = FastAPI(title="sv3d-fast", version=__version__, lifespan=lifespan)
    app.state.service = service

    app.add_middleware(Measured, metrics=metrics)
    app.add_middleware(BodyLimit, limit=settings.max_body)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=METHODS,
            allow_headers=["Authorization", "Content-Type", "Last-Event-ID", "X-API-Key"],
            expose_headers=["Location", "Retry-After"],
        )  # fmt: skip

    @app.exception_handler(OSError)
    @app.exception_handler(sqlite3.Error)
    def unable(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s", request.method, request.url.path, exc_info=error)
        return JSONResponse({"detail": "the server can't read or write its files"}, 503, headers={"Retry-After": "10"})

    async def key_owner(
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
        key: Annotated[str | None, Depends(APIKeyHeader(name="X-API-Key", auto_error=False))],
    ) -> str:
        found = find_owner(key or (bearer.credentials.strip() if bearer else None), service.hashes or [])
        if found is None:
            raise HTTPException(401, "expected an API key", headers={"WWW-Authenticate": "Bearer"})
        return found

    async def everyone() -> None:
        return None

    Owner = Annotated[str | None, Depends(everyone if service.hashes is None else key_owner)]

    def own_job(job: str, owner: Owner) -> Job:
        found = store.get(job)
        if found is None or found.owner != owner:
            raise HTTPException(404, "no such job")
        return found

    OwnJob = Annotated[Job, Depends(own_job)]

    def refuse_if_full() -> None:
        if supervisor.draining.is_set():
            raise HTTPException(503, "the server drains", headers={"Retry-After": "10"})
        if store.counts()[QUEUED] >= settings.queue_size:
            raise HTTPException(429, "the queue is full", headers={"Retry-After": str(service.retry_after())})

    def accept(asked: Generation, picture: bytes, owner: str | None) -> Job:
        name = "-".join(filter(None, (settings.instance, secrets.token_hex(16))))
        folder = settings.jobs_dir / name
        folder.mkdir()
        try:
            save_picture(picture, folder / PICTURE, settings.max_pixels)
            store.submit(name, owner, asked.mode, asked.given(), settings.queue_size)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, QueueFullError):
                refuse_if_full()
            raise
        supervisor.wake()
        job = store.get(name)
        assert job is not None
        return job

    @app.post(
        "/v1/3d/generations", status_code=202, openapi_extra={"requestBody": _body()},
        responses={**_refusals(400, 401, 413, 415, 422, 429, 503), 202: {"model": JobStatus}},
    )  # fmt: skip
    async def generate(request: Request, owner: Owner) -> JSONResponse:
        """Takes a picture and queues a job."""
        await run_sync(refuse_if_full)
        asked, picture = await read_request(request)
        if asked.mode == "preview" and settings.preview_model is None:
            raise HTTPException(422, "mode: this server has no TripoSR checkpoint for preview")
        job = await run_sync(accept, asked, picture, owner, limiter=service.decoders)
        return JSONResponse(service.describe(job), 202, headers={"Location": f"/v1/jobs/{job.id}"})

    @app.get("/v1/jobs/{job}", response_model=JobStatus, responses=_refusals(401, 404))
    def status(job: OwnJob) -> dict[str, Any]:
        """State, progress and, once it is done, the files of a job."""
        return service.describe(job)

    @app.delete(
        "/v1/jobs/{job}", status_code=202,
        responses={
            **_refusals(401, 404, 409), 200: {"model": JobStatus, "description": "It is cancelled"},
            202: {"model": JobStatus, "description": "It will be, once its worker has made the step it is at"},
        },
    )  # fmt: skip
    def cancel(job: OwnJob) -> JSONResponse:
        """Cancels a job: at once if it waits, between two steps if it runs."""
        found = store.cancel(job.id)
        if found is None:
            raise HTTPException(404, "no such job")
        if found.state in ENDED and found.state != CANCELLED:
            raise HTTPException(409, f"the job is {found.state} already")
        return JSONResponse(service.describe(found), 200 if found.state == CANCELLED else 202)

    @app.get(
        "/v1/jobs/{job}/events", response_class=_EventStream,
        responses={**_refusals(401, 404), 200: {"content": {_EventStream.media_type: {"schema": EVENT}}}},
    )  # fmt: skip
    def events(job: OwnJob, last_event_id: Annotated[str, Header()] = "") -> StreamingResponse:
        """Server-sent events: state, stage, progress, frames, warning, end. Last-Event-ID goes on from there."""
        after = int(last_event_id) if last_event_id.isascii() and last_event_id[:18].isdigit() else 0
        stream = job_events(store, job.id, min(after, 2**62), service.describe, lambda: service.closing)
        return _EventStream(stream, headers={"Cache-Control": "no-cache"})

    @app.get("/v1/jobs/{job}/files/{name:path}", response_class=FileResponse, responses=_refusals(401, 404))
    def file(job: OwnJob, name: str) -> FileResponse:
        """One of the files that the job lists."""
        known = {n: settings.jobs_dir / job.id / RESULT / n for n in store.files(job.id)}
        if name not in known or not known[name].is_file():
            raise HTTPException(404, "no such file")
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return FileResponse(known[name], media_type=kind, filename=Path(name).name)

    @app.get("/healthz", responses=_refusals(503))
    def healthz() -> Health:
        """The server answers, and somebody looks after its workers."""
        if not supervisor.alive:
            raise HTTPException(503, "the supervisor has ended", headers={"Retry-After": "10"})
        return Health(status="ok")

    @app.get("/readyz", responses=_refusals(503))
    def readyz() -> Readiness:
        """Some worker is warm, and jobs are taken."""
        if supervisor.draining.is_set() or not supervisor.ready:
            raise HTTPException(503, "no worker is ready", headers={"Retry-After": "10"})
        return Readiness(workers=supervisor.ready)

    @app.get("/metrics", response_class=PlainTextResponse)
    def prometheus() -> PlainTextResponse:
        """For Prometheus."""
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    described = app.openapi
    app.openapi = lambda: _without_defaults(described())  # type: ignore[method-assign]
    return app


class _EventStream(StreamingResponse):
    media_type = "text/event-stream"


def _without_defaults(schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI adds a 422 of its own to every route with a parameter; these take any text, and never give it."""
    for operations in schema["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    return schema


def _body() -> dict[str, Any]:
    """OpenAPI of a body that is read by hand: a form, which has no null, or JSON."""
    json_schema, form = JSONGeneration.model_json_schema(), Generation.model_json_schema()
    for name, field in form["properties"].items():
        given = field.pop("anyOf", [{}])[0]  # the other one is null
        form["properties"][name] = {k: v for k, v in {**field, **given}.items() if k != "default" or v is not None}
    form["properties"]["image"] = {"type": "string", "format": "binary"}
    form["required"] = ["image"]
    content = {"multipart/form-data": {"schema": form}, "application/json": {"schema": json_schema}}
    return {"required": True, "content": content}
