"""Many pictures: one open model, the next orbit made while the last becomes a mesh, and a record that outlives us."""

import html
import json
import os
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .batch_picture import DONE, FAILED, Outcome, key_of
from .batch_source import Job, read_jobs
from .batch_workers import carrying, usual_workers
from .devices import pick_device
from .events import Event, Progress, Warned
from .files import make_folder, write_text
from .orbit_stage import make_orbit
from .settings import Settings

RESULTS, PAGE, STAGE = "results.jsonl", "index.html", "batch"
MAX_WORKERS = 16


@dataclass(frozen=True)
class Summary:
    """How a batch ended. rows: the last line of results.jsonl for every picture, in order; failed: how many failed."""

    folder: Path
    rows: list[dict[str, Any]]

    @property
    def failed(self) -> int:
        return sum(row["state"] == FAILED for row in self.rows)


def batching(
    source: str | Path,
    output: str | Path,
    settings: Settings,
    *,
    retry_failed: bool = False,
    workers: int | None = None,
    ray: str | None = None,
) -> Generator[Event, None, Summary]:
    """Every picture of a folder or CSV list (`batch_source`) to a folder of its own below `output`, as `run` fills it.

    Each picture leaves a line in results.jsonl when it is done or has failed; the same call later, after whatever end,
    goes on with those that have none, and takes up finished stages of those that were in flight. A picture that fails,
    fails alone; `retry_failed` tries those again. Yields a Progress per picture and their warnings.
    workers: processes for each GPU that reconstruct; None for `usual_workers`, and for one with Ray.
    ray: address of a Ray cluster that does the work ("local" starts one of this machine); None for one device without.
    Raises ValueError for what concerns all pictures: the source, the settings, the model, the folder, the cluster.
    """
    if workers is None:
        workers = usual_workers(pick_device(settings.device)) if ray is None else 1
    if not 1 <= workers <= MAX_WORKERS:
        raise ValueError(f"workers: expected 1 to {MAX_WORKERS}, got {workers}")
    jobs, folder = read_jobs(Path(source), settings), make_folder(output)
    for job in jobs:
        make_orbit(job.settings)
    known = read_results(folder / RESULTS)
    rows: dict[str, dict[str, Any]] = {}
    for job in jobs:
        row = known.get(job.name)
        if row and row["key"] == key_of(job) and not (row["state"] == FAILED and retry_failed):
            rows[job.name] = row
    todo = [job for job in jobs if job.name not in rows]
    began, before = time.monotonic(), len(rows)
    yield Progress(STAGE, before, len(jobs))
    with closing(_outcomes(todo, folder, workers, ray)) as outcomes:
        for outcome in outcomes:
            row = rows[outcome.row["name"]] = outcome.row
            _append(folder / RESULTS, row)
            yield from outcome.warnings
            if row["state"] == FAILED:
                yield Warned(STAGE, f"{row['picture']}: {row['reason']}")
            rate = 3600 * (len(rows) - before) / max(time.monotonic() - began, 1e-3)
            yield Progress(STAGE, len(rows), len(jobs), {"per hour": rate})
    ordered = [rows[job.name] for job in jobs]
    write_text(folder / PAGE, _page(ordered))
    return Summary(folder, ordered)


def _outcomes(jobs: list[Job], folder: Path, workers: int, ray: str | None) -> Generator[Outcome, None, None]:
    """How each of the pictures ended, as they end, wherever they are worked on."""
    if not jobs:
        return
    if ray is None:
        yield from carrying(jobs, folder, workers)
    else:
        from .batch_ray import carrying_on_ray

        yield from carrying_on_ray(jobs, folder, workers, ray)


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


def _page(rows: list[dict[str, Any]]) -> str:
    """A page of all pictures, each with its preview and the way to its report."""
    cells = []
    for row in rows:
        name, link = html.escape(row["name"]), quote(row["name"])
        if row["state"] == DONE:
            shown = f'<a href="{link}/report.html"><img src="{link}/preview.png" alt="" loading="lazy"></a>'
            more = f'{row["seconds"]:.0f} s, <a href="{link}/mesh.glb">mesh.glb</a>'
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
