"""The routes, and nothing else: each asks the store, and the workers do the rest."""

import contextlib
import math
import mimetypes
import secrets
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import anyio
from anyio.to_thread import run_sync
from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from sv3d_fast import __version__

from .execution import Opening, device_names, open_pipeline
from .generation import Generation
from .jobs import CANCELLED, ENDED, QUEUED, Job, JobStore, QueueFullError
from .keys import find_owner, read_hashes
from .metrics import Metrics
from .middleware import METHODS, BodyLimit, Measured
from .settings import ServeSettings
from .stream import job_events
from .supervisor import Supervisor
from .uploads import JSONGeneration, read_request, save_picture
from .worker import PICTURE, RESULT

DECODERS = 2  # uploads that are decoded at a time
GUESS = 10.0  # seconds that a job takes, before one was seen
BUSY: dict[int | str, dict[str, Any]] = {429: {"description": "The queue is full; Retry-After says when to come again"}}
REFUSALS: dict[int | str, dict[str, Any]] = {code: {"description": text} for code, text in (
    (400, "A body that can't be read"), (401, "No valid API key"), (413, "The body is too large"),
    (415, "Neither multipart nor JSON"), (422, "A bad field or picture"), (503, "The server drains"),
)}  # fmt: skip


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
        files = self.store.files(job.id)
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

    def owner(authorization: Annotated[str, Header()] = "", x_api_key: Annotated[str, Header()] = "") -> str | None:
        if service.hashes is None:
            return None
        scheme, _, token = authorization.partition(" ")
        found = find_owner(x_api_key or (token.strip() if scheme.lower() == "bearer" else None), service.hashes)
        if found is None:
            raise HTTPException(401, "expected an API key", headers={"WWW-Authenticate": "Bearer"})
        return found

    Owner = Annotated[str | None, Depends(owner)]

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
        "/v1/3d/generations", status_code=202, responses={**REFUSALS, **BUSY}, openapi_extra={"requestBody": _body()}
    )
    async def generate(request: Request, owner: Owner) -> JSONResponse:
        """Takes a picture and queues a job."""
        await run_sync(refuse_if_full)
        asked, picture = await read_request(request)
        if asked.mode == "preview" and settings.preview_model is None:
            raise HTTPException(422, "mode: this server has no TripoSR checkpoint for preview")
        job = await run_sync(accept, asked, picture, owner, limiter=service.decoders)
        return JSONResponse(service.describe(job), 202, headers={"Location": f"/v1/jobs/{job.id}"})

    @app.get("/v1/jobs/{job}", responses={404: {"description": "No such job"}})
    def status(job: OwnJob) -> dict[str, Any]:
        """State, progress and, once it is done, the files of a job."""
        return service.describe(job)

    @app.delete("/v1/jobs/{job}", status_code=202, responses={404: {}, 409: {"description": "It has ended already"}})
    def cancel(job: OwnJob) -> JSONResponse:
        """Cancels a job: at once if it waits, between two steps if it runs."""
        found = store.cancel(job.id)
        if found is None:
            raise HTTPException(404, "no such job")
        if found.state in ENDED and found.state != CANCELLED:
            raise HTTPException(409, f"the job is {found.state} already")
        return JSONResponse(service.describe(found), 200 if found.state == CANCELLED else 202)

    @app.get("/v1/jobs/{job}/events", response_class=StreamingResponse)
    def events(job: OwnJob, last_event_id: Annotated[str, Header()] = "") -> StreamingResponse:
        """Server-sent events: state, stage, progress, frames, warning, end. Last-Event-ID goes on from there."""
        after = int(last_event_id) if last_event_id.isascii() and last_event_id[:18].isdigit() else 0
        stream = job_events(store, job.id, min(after, 2**62), service.describe, lambda: service.closing)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @app.get("/v1/jobs/{job}/files/{name:path}", response_class=FileResponse, responses={404: {}})
    def file(job: OwnJob, name: str) -> FileResponse:
        """One of the files that the job lists."""
        known = {n: settings.jobs_dir / job.id / RESULT / n for n in store.files(job.id)}
        if name not in known or not known[name].is_file():
            raise HTTPException(404, "no such file")
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return FileResponse(known[name], media_type=kind, filename=Path(name).name)

    @app.get("/healthz", responses={503: {"description": "Nobody looks after the workers any more"}})
    def healthz() -> dict[str, str]:
        """The server answers."""
        if not supervisor.alive:
            raise HTTPException(503, "the supervisor has ended")
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"description": "No worker is warm, or the server drains"}})
    def readyz() -> dict[str, int]:
        """Some worker is warm, and jobs are taken."""
        if supervisor.draining.is_set() or not supervisor.ready:
            raise HTTPException(503, "no worker is ready")
        return {"workers": supervisor.ready}

    @app.get("/metrics", response_class=Response)
    def prometheus() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def _body() -> dict[str, Any]:
    """OpenAPI of a body that is read by hand: a form, or JSON."""
    json_schema, form = JSONGeneration.model_json_schema(), Generation.model_json_schema()
    form["properties"]["image"] = {"type": "string", "format": "binary"}
    form["required"] = ["image"]
    content = {"multipart/form-data": {"schema": form}, "application/json": {"schema": json_schema}}
    return {"required": True, "content": content}
