"""Many pictures: one open model, the next orbit made while the last becomes a mesh, and a record that outlives us."""

import hashlib
import html
import json
import os
import threading
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .batch_source import Job, read_jobs
from .events import Event, Progress, Warned
from .files import make_folder, write_text
from .pipeline import Result, make_orbit, open_model, orbiting, reconstructing_orbit
from .settings import Settings

RESULTS, PAGE, STAGE = "results.jsonl", "index.html", "batch"
AHEAD = 1  # orbits that may wait for their reconstruction: what bounds memory
DONE, FAILED = "done", "failed"


@dataclass(frozen=True)
class Summary:
    """How a batch ended. rows: the last line of results.jsonl for every picture, in order; failed: how many failed."""

    folder: Path
    rows: list[dict[str, Any]]

    @property
    def failed(self) -> int:
        return sum(row["state"] == FAILED for row in self.rows)


def batching(
    source: str | Path, output: str | Path, settings: Settings, *, retry_failed: bool = False
) -> Generator[Event, None, Summary]:
    """Every picture of a folder or CSV list (`batch_source`) to a folder of its own below `output`, as `run` fills it.

    Each picture leaves a line in results.jsonl when it is done or has failed; the same call later, after whatever end,
    goes on with those that have none, and takes up finished stages of those that were in flight. A picture that fails,
    fails alone; `retry_failed` tries those again. Yields a Progress per picture and their warnings.
    Raises ValueError for what concerns all pictures: the source, the settings, the model, the folder.
    """
    jobs, folder = read_jobs(Path(source), settings), make_folder(output)
    for job in jobs:
        make_orbit(job.settings)
    known = read_results(folder / RESULTS)
    rows: dict[str, dict[str, Any]] = {}
    for job in jobs:
        row = known.get(job.name)
        if row and row["key"] == _key(job) and not (row["state"] == FAILED and retry_failed):
            rows[job.name] = row
    todo = [job for job in jobs if job.name not in rows]
    began, before = time.monotonic(), len(rows)
    stop, warnings = threading.Event(), []  # type: ignore[var-annotated]
    models = {name: open_model(s) for name, s in {j.settings.model: j.settings for j in todo}.items()}

    def reconstruct(job: Job, made: tuple, started: float) -> dict[str, Any]:
        try:
            running = reconstructing_orbit(made[0], job.settings, made[1])
            while True:
                if stop.is_set():
                    running.close()
                    raise InterruptedError("the batch was stopped")
                try:
                    event = next(running)
                except StopIteration as end:
                    return _done(job, end.value, started)
                if isinstance(event, Warned):
                    warnings.append(Warned(event.stage, f"{job.name}: {event.message}"))
        except InterruptedError:
            raise
        except Exception as error:
            return _failed(job, error, started)

    def finished(row: dict[str, Any]) -> Generator[Event, None, None]:
        rows[row["name"]] = row
        _append(folder / RESULTS, row)
        while warnings:
            yield warnings.pop(0)
        if row["state"] == FAILED:
            yield Warned(STAGE, f"{row['picture']}: {row['reason']}")
        rate = 3600 * (len(rows) - before) / max(time.monotonic() - began, 1e-3)
        yield Progress(STAGE, len(rows), len(jobs), {"per hour": rate})

    waiting: list[Future] = []
    with ThreadPoolExecutor(1, thread_name_prefix="reconstruction") as pool:
        try:
            for job in todo:
                started = time.monotonic()
                try:
                    running = orbiting(
                        job.picture, folder / job.name, job.settings, model=models[job.settings.model]
                    )  # fmt: skip
                    made = yield from _warnings_of(running, job)
                except Exception as error:
                    yield from finished(_failed(job, error, started))
                    continue
                waiting.append(pool.submit(reconstruct, job, made, started))
                while len(waiting) > AHEAD:
                    yield from finished(waiting.pop(0).result())
            while waiting:
                yield from finished(waiting.pop(0).result())
        finally:
            stop.set()
    ordered = [rows[job.name] for job in jobs]
    write_text(folder / PAGE, _page(ordered))
    return Summary(folder, ordered)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The last line of every name, without lines that a kill cut short. Raises ValueError for other contents."""
    rows: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return rows
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line else None
        except json.JSONDecodeError:
            row = None  # cut short, and the next line began anew
        if row is not None:
            if not isinstance(row, dict) or not {"name", "key", "state"} <= row.keys():
                raise ValueError(f"{path}, line {number}: expected a line that a batch wrote")
            rows[row["name"]] = row
    return rows


def _key(job: Job) -> str:
    """What tells whether a line still speaks of this picture with these settings."""
    try:
        state = job.picture.stat()
        of_file = [state.st_size, state.st_mtime_ns]
    except OSError:
        of_file = []
    text = json.dumps([str(job.picture.resolve()), of_file, job.settings.to_dict()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _append(path: Path, row: dict[str, Any]) -> None:
    """A line that is on the disk when this returns; after a line that was cut short it begins anew."""
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _row(job: Job, state: str, started: float) -> dict[str, Any]:
    seconds = round(time.monotonic() - started, 2)
    return {"name": job.name, "picture": str(job.picture), "state": state, "key": _key(job), "seconds": seconds}


def _done(job: Job, result: Result, started: float) -> dict[str, Any]:
    return _row(job, DONE, started) | {"figures": result.figures}


def _failed(job: Job, error: Exception, started: float) -> dict[str, Any]:
    known = isinstance(error, ValueError | OSError | MemoryError | RuntimeError)
    reason = " ".join((str(error) or type(error).__name__).split())
    return _row(job, FAILED, started) | {"reason": reason if known else f"{type(error).__name__}: {reason}"}


def _warnings_of(running: Generator[Event, None, tuple], job: Job) -> Generator[Event, None, tuple]:
    """Runs a stage to its end, passing on its warnings with the picture's name; returns its value."""
    while True:
        try:
            event = next(running)
        except StopIteration as end:
            return end.value
        if isinstance(event, Warned):
            yield Warned(event.stage, f"{job.name}: {event.message}")


def _page(rows: list[dict[str, Any]]) -> str:
    """A page of all pictures, each with its preview and the way to its report."""
    cells = []
    for row in rows:
        name = html.escape(row["name"])
        if row["state"] == DONE:
            shown = f'<a href="{name}/report.html"><img src="{name}/preview.png" alt="" loading="lazy"></a>'
            more = f'{row["seconds"]:.0f} s, <a href="{name}/mesh.glb">mesh.glb</a>'
        else:
            shown, more = "", f"failed: {html.escape(row['reason'])}"
        cells.append(f"<figure>{shown}<figcaption><b>{name}</b> {more}</figcaption></figure>")
    done = sum(row["state"] == DONE for row in rows)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>sv3d-fast batch</title>'
        "<style>body{font:15px/1.4 system-ui,sans-serif;margin:2rem;color:#1c1e21}"
        "main{display:grid;grid-template-columns:repeat(auto-fill,minmax(26rem,1fr));gap:1rem}"
        "figure{margin:0;border:1px solid #e5e7eb;border-radius:6px;padding:.6rem}img{width:100%}"
        "figcaption{overflow-wrap:anywhere}</style>"
        f"<h1>{done} of {len(rows)} pictures</h1><main>{''.join(cells)}</main></html>\n"
    )
