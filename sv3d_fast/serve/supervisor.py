"""Keeps one worker process per device alive: starts, hears, replaces and drains them, in a thread of the server."""

import itertools
import logging
import multiprocessing
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from .execution import Opening
from .jobs import JobStore
from .metrics import Metrics
from .settings import ServeSettings
from .worker import DRAIN, STOP, WAKE, Finished, Ready, Refused, work

TICK = 0.25  # seconds between two looks at the clock
RETRY = 1.0  # seconds after a look that failed
HUNG = 60.0  # seconds past its deadline after which a job's worker is killed
STUBBORN = 10.0  # seconds that a worker has to stop once it was told
SLOWEST_RESTART = 30.0  # seconds between two starts of a worker that dies before it is ready
PURGE_EVERY = 60.0

log = logging.getLogger(__name__)


@dataclass
class _Worker:
    name: str
    device: str
    process: BaseProcess
    connection: Connection
    ready: bool = False


@dataclass
class _Pause:
    """Before the next start on a device."""

    until: float = 0.0
    length: float = 0.0


class Supervisor:
    """on_refusal: called with the reason, in the supervisor's thread, if a worker finds that it can never start."""

    def __init__(
        self,
        settings: ServeSettings,
        store: JobStore,
        metrics: Metrics,
        devices: list[str],
        opening: Opening,
        on_refusal: Callable[[str], None],
    ):
        self.settings, self.store, self.metrics = settings, store, metrics
        self.devices, self.opening, self.on_refusal = devices, opening, on_refusal
        self.draining = threading.Event()
        self._deadline = self._purged = 0.0  # of the drain, and when old jobs last went; monotonic
        self._told = ""  # to the workers, while they drain
        self._numbers = itertools.count(1)
        self._workers: dict[int, _Worker] = {}
        self._pauses = [_Pause() for _ in devices]
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Takes up what an earlier server left, then starts the workers."""
        for job in self.store.recover(None, self.settings.max_attempts):
            log.warning("job %s was running when the last server ended: %s", job.id, job.state)
        known = self.store.ids()
        for folder in self.settings.jobs_dir.iterdir():
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)
        self._thread.start()

    @property
    def ready(self) -> int:
        """Workers whose models are open and warm."""
        return sum(worker.ready for worker in list(self._workers.values()))

    @property
    def alive(self) -> bool:
        """Whether the workers are looked after."""
        return self._thread.is_alive()

    def wake(self) -> None:
        """Tells the workers that there is a job."""
        for worker in list(self._workers.values()):
            _tell(worker, WAKE)

    def drain(self, seconds: float) -> None:
        """Lets running jobs end within `seconds` and puts them back then; returns once no worker is left."""
        self._deadline = time.monotonic() + seconds
        self.draining.set()
        self._thread.join()

    def _run(self) -> None:
        while not (self.draining.is_set() and not self._workers):
            try:
                self._look()
            except (OSError, sqlite3.Error):  # no process or no memory to be had, a full disk: it may pass
                log.exception("the workers could not be looked after")
                time.sleep(RETRY)

    def _look(self) -> None:
        self._listen()
        self._kill_hung()
        now = time.monotonic()
        if self.draining.is_set():
            order = STOP if now > self._deadline else DRAIN
            if order != self._told:
                self._told = order
                for worker in self._workers.values():
                    _tell(worker, order)
            if now > self._deadline + STUBBORN:
                for worker in self._workers.values():
                    worker.process.kill()
                    worker.process.join()
                    for job in self.store.running():  # it was told to stop: no fault of the job's
                        if job.worker == worker.name:
                            self.store.release(job)
        else:
            self._start_missing(now)
        if now - self._purged > PURGE_EVERY:
            self._purged = now
            for old in self.store.purge(time.time() - 3600 * self.settings.keep_hours):
                shutil.rmtree(self.settings.jobs_dir / old, ignore_errors=True)

    def _start_missing(self, now: float) -> None:
        for slot, device in enumerate(self.devices):
            if slot in self._workers or now < self._pauses[slot].until:
                continue
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            name = f"{device}-{next(self._numbers)}"
            process = multiprocessing.get_context("spawn").Process(
                target=work, args=(theirs, self.settings, name, device, self.opening), name=name, daemon=True
            )
            process.start()
            theirs.close()  # or else the end of the worker would not close the pipe
            self._workers[slot] = _Worker(name, device, process, ours)

    def _listen(self) -> None:
        slots = {worker.connection: slot for slot, worker in self._workers.items()}
        if not slots:
            time.sleep(TICK)
            return
        for connection in wait(list(slots), TICK):
            slot = slots[connection]  # type: ignore[index]
            worker = self._workers[slot]
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                self._bury(slot, worker)
                continue
            if isinstance(message, Ready):
                worker.ready, self._pauses[slot] = True, _Pause()
            elif isinstance(message, Finished):
                self.metrics.observe(message, worker.device)
            elif isinstance(message, Refused):
                self.on_refusal(message.reason)

    def _bury(self, slot: int, worker: _Worker) -> None:
        worker.process.kill()  # its pipe is closed: whatever is left of it can't be talked to
        worker.process.join()
        for job in self.store.recover(worker.name, self.settings.max_attempts):  # or else it is buried once more
            log.warning("worker %s died while it ran job %s: %s", worker.name, job.id, job.state)
        worker.connection.close()
        del self._workers[slot]
        if self.draining.is_set():
            return
        log.warning("worker %s ended with status %s and is replaced", worker.name, worker.process.exitcode)
        self.metrics.restarts.inc()
        if not worker.ready:
            pause = self._pauses[slot]
            pause.length = min(max(1.0, 2 * pause.length), SLOWEST_RESTART)
            pause.until = time.monotonic() + pause.length

    def _kill_hung(self) -> None:
        """A step that doesn't end never looks at the clock: the job has failed, and its worker goes."""
        latest = time.time() - self.settings.deadline - HUNG
        for job in self.store.running():
            if job.started is not None and job.started < latest:
                self.store.fail(job, f"the deadline of {self.settings.deadline:g} s has passed")
                for worker in self._workers.values():
                    if worker.name == job.worker:
                        worker.process.kill()


def _tell(worker: _Worker, order: str) -> None:
    try:
        worker.connection.send(order)
    except OSError:  # it has just died, which `_listen` will see
        return
