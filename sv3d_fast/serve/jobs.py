"""The jobs in SQLite: server and workers each open the file, and every change of a state is one statement.

A worker holds a job by the attempt it started. What it says of an attempt that is no longer running changes nothing,
so a worker that was given up can't overwrite what its successor does.
"""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

State = Literal["queued", "running", "done", "failed", "cancelled"]
QUEUED, RUNNING, DONE, FAILED, CANCELLED = STATES = get_args(State)
ENDED = (DONE, FAILED, CANCELLED)
RECENT = 20  # finished jobs whose mean time tells how long a queue takes
LAYOUT = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, owner TEXT, mode TEXT NOT NULL, request TEXT NOT NULL, state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, worker TEXT, cancel INTEGER NOT NULL DEFAULT 0, reason TEXT, progress TEXT,
    created REAL NOT NULL, started REAL, ended REAL);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, created);
CREATE TABLE IF NOT EXISTS files (
    job TEXT NOT NULL REFERENCES jobs ON DELETE CASCADE, name TEXT NOT NULL, size INTEGER NOT NULL,
    PRIMARY KEY (job, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    job TEXT NOT NULL REFERENCES jobs ON DELETE CASCADE, number INTEGER NOT NULL, kind TEXT NOT NULL,
    data TEXT NOT NULL, PRIMARY KEY (job, number)) WITHOUT ROWID;
"""


class QueueFullError(Exception):
    """As many jobs wait as may."""


@dataclass(frozen=True)
class Job:
    """A row. request: what the client asked for; progress: the latest {"stage", "done", "total"}; times: Unix."""

    id: str
    owner: str | None
    mode: str
    request: dict[str, Any]
    state: str
    attempts: int
    worker: str | None
    cancel: bool
    reason: str | None
    progress: dict[str, Any] | None
    created: float
    started: float | None
    ended: float | None


class JobStore:
    """Safe between threads and processes. Raises sqlite3.Error for a file that is none of ours."""

    def __init__(self, path: str | os.PathLike):
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        self._database.row_factory = sqlite3.Row
        self._database.execute("PRAGMA journal_mode = WAL")  # readers never wait for a writer
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("PRAGMA foreign_keys = ON")
        self._database.executescript(LAYOUT)

    def close(self) -> None:
        """Of this process; the jobs stay."""
        with self._lock:
            self._database.close()

    def submit(self, job: str, owner: str | None, mode: str, request: dict[str, Any], limit: int) -> None:
        """Queues a job unless `limit` wait already, which raises QueueFullError."""
        taken = self._run(
            "INSERT INTO jobs (id, owner, mode, request, state, created) SELECT ?, ?, ?, ?, ?, ? "
            "WHERE (SELECT count(*) FROM jobs WHERE state = ?) < ? RETURNING id",
            job, owner, mode, json.dumps(request), QUEUED, time.time(), QUEUED, limit,
        )  # fmt: skip
        if not taken:
            raise QueueFullError

    def get(self, job: str) -> Job | None:
        """None where there is none of this id."""
        rows = self._run("SELECT * FROM jobs WHERE id = ?", job)
        return _job(rows[0]) if rows else None

    def ids(self) -> set[str]:
        """Of all jobs."""
        return {row["id"] for row in self._run("SELECT id FROM jobs")}

    def claim(self, worker: str) -> Job | None:
        """The oldest job that waits, now running on `worker`; None where none waits."""
        rows = self._run(
            "UPDATE jobs SET state = ?, worker = ?, attempts = attempts + 1, started = ?, progress = NULL "
            "WHERE id = (SELECT id FROM jobs WHERE state = ? ORDER BY created, rowid LIMIT 1) RETURNING *",
            RUNNING, worker, time.time(), QUEUED,
        )  # fmt: skip
        return _job(rows[0]) if rows else None

    def report(self, job: Job, kind: str, data: dict[str, Any]) -> None:
        """Appends an event for those who follow the job; one of kind "progress" is also its latest progress."""
        text = json.dumps(data)
        held = "id = ? AND state = ? AND attempts = ?"
        self._run(
            "INSERT INTO events SELECT id, (SELECT coalesce(max(number), 0) + 1 FROM events WHERE job = id), ?, ? "
            f"FROM jobs WHERE {held}", kind, text, job.id, RUNNING, job.attempts,
        )  # fmt: skip
        if kind == "progress":
            self._run(f"UPDATE jobs SET progress = ? WHERE {held}", text, job.id, RUNNING, job.attempts)

    def events(self, job: str, after: int) -> list[tuple[int, str, str]]:
        """(number, kind, JSON) of what was reported since `after`, at most a hundred."""
        rows = self._run("SELECT * FROM events WHERE job = ? AND number > ? ORDER BY number LIMIT 100", job, after)
        return [(row["number"], row["kind"], row["data"]) for row in rows]

    def files(self, job: str) -> dict[str, int]:
        """Sizes in bytes of what a finished job wrote, by name."""
        return {r["name"]: r["size"] for r in self._run("SELECT * FROM files WHERE job = ? ORDER BY name", job)}

    def is_held(self, job: Job) -> bool:
        """Whether this attempt should go on: it is still the one that runs, and nobody has cancelled it."""
        return bool(
            self._run(
                "SELECT 1 FROM jobs WHERE id = ? AND state = ? AND attempts = ? AND NOT cancel",
                job.id, RUNNING, job.attempts,
            )
        )  # fmt: skip

    def finish(self, job: Job, files: Iterable[tuple[str, int]]) -> None:
        """The job is done and wrote these files; one whose cancellation was accepted is cancelled all the same."""
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            state = self._end(job, DONE, None)
            if state == DONE:
                rows = [(job.id, name, size) for name, size in files]
                self._database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", rows)

    def fail(self, job: Job, reason: str) -> None:
        """The job has failed for a reason that its client may read."""
        with self._lock:
            self._end(job, FAILED, reason)

    def cancelled(self, job: Job) -> None:
        """The worker has stopped a job that its client cancelled."""
        with self._lock:
            self._end(job, CANCELLED, None)

    def cancel(self, job: str) -> Job | None:
        """Cancels a job: at once if it waits, else its worker is asked to. Returns it as it now is."""
        self._run(
            "UPDATE jobs SET cancel = 1, ended = CASE state WHEN 'queued' THEN ? END, "
            "state = CASE state WHEN 'queued' THEN 'cancelled' ELSE state END WHERE id = ? AND state IN (?, ?)",
            time.time(), job, QUEUED, RUNNING,
        )  # fmt: skip
        return self.get(job)

    def release(self, job: Job) -> None:
        """Puts a job back that was stopped through no fault of its own: the attempt doesn't count."""
        self._run(
            "UPDATE jobs SET state = CASE WHEN cancel THEN 'cancelled' ELSE 'queued' END, attempts = attempts - 1, "
            "ended = CASE WHEN cancel THEN ? END, worker = NULL, progress = NULL "
            "WHERE id = ? AND state = ? AND attempts = ?",
            time.time(), job.id, RUNNING, job.attempts,
        )  # fmt: skip

    def recover(self, worker: str | None, max_attempts: int) -> list[Job]:
        """Jobs whose worker died (None: all workers) wait again, or have failed if that was their last attempt."""
        rows = self._run(
            "UPDATE jobs SET "
            "state = CASE WHEN cancel THEN 'cancelled' WHEN attempts >= ? THEN 'failed' ELSE 'queued' END, "
            "reason = CASE WHEN NOT cancel AND attempts >= ? "
            "THEN 'the worker process died in each of ' || attempts || ' attempts' END, "
            "ended = CASE WHEN cancel OR attempts >= ? THEN ? END, worker = NULL, progress = NULL "
            "WHERE state = ? AND (? IS NULL OR worker = ?) RETURNING *",
            max_attempts, max_attempts, max_attempts, time.time(), RUNNING, worker, worker,
        )  # fmt: skip
        return [_job(row) for row in rows]

    def running(self) -> list[Job]:
        """Jobs that some worker has."""
        return [_job(row) for row in self._run("SELECT * FROM jobs WHERE state = ?", RUNNING)]

    def counts(self) -> dict[str, int]:
        """Jobs in each state."""
        found = {row["state"]: row["n"] for row in self._run("SELECT state, count(*) AS n FROM jobs GROUP BY state")}
        return {state: found.get(state, 0) for state in STATES}

    def mean_seconds(self) -> float | None:
        """How long the latest finished jobs ran; None before the first."""
        rows = self._run(
            "SELECT avg(ended - started) AS mean FROM "
            "(SELECT * FROM jobs WHERE state = ? ORDER BY ended DESC LIMIT ?)", DONE, RECENT,
        )  # fmt: skip
        return rows[0]["mean"]

    def purge(self, before: float) -> list[str]:
        """Forgets jobs that ended before a time; returns their ids."""
        return [row["id"] for row in self._run("DELETE FROM jobs WHERE ended < ? RETURNING id", before)]

    def _end(self, job: Job, state: str, reason: str | None) -> str | None:
        """The state that a held job has ended in; None where the attempt is no longer the one that runs."""
        rows = self._database.execute(
            "UPDATE jobs SET state = CASE WHEN cancel THEN 'cancelled' ELSE ? END, "
            "reason = CASE WHEN cancel THEN NULL ELSE ? END, ended = ?, worker = NULL "
            "WHERE id = ? AND state = ? AND attempts = ? RETURNING state",
            (state, reason, time.time(), job.id, RUNNING, job.attempts),
        ).fetchall()
        return rows[0]["state"] if rows else None

    def _run(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._database.execute(statement, values).fetchall()


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    values["request"] = json.loads(values["request"])
    values["progress"] = values["progress"] and json.loads(values["progress"])
    values["cancel"] = bool(values["cancel"])
    return Job(**values)


def result_files(folder: Path) -> list[tuple[str, int]]:
    """Regular files below a folder by their names in it, with sizes; links and hidden files are left out."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not path.is_symlink() and not any(part.startswith(".") for part in name.parts):
            found.append((name.as_posix(), path.stat().st_size))
    return found
