"""Runs the pictures of a batch on this machine: the networks in this process, all that follows an orbit in others.

A fit launches thousands of small kernels and waits for the device in every step; in a thread of this process it would
stand behind whole denoising steps in the same queue and take turns with them at Python's lock. The GPU gives processes
slices of its time instead, and whichever has work, has the GPU.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from .batch_picture import Made, Maker, Outcome, failed, reconstruct
from .batch_source import Job

MAKING = 2  # pictures that are on their way to an orbit: one has the networks, one is read
ROOM = 24e9  # bytes of a GPU for two that reconstruct beside the networks: at 576² all three hold 18.3 GiB
TRIES = 2  # a picture may end its process once: the first time may have been another's fault


def carrying(jobs: Sequence[Job], folder: Path, workers: int) -> Generator[Outcome, None, None]:
    """Every picture through both halves, `workers` reconstructions at a time: yields how each ended, as they end.

    No more than MAKING + workers pictures are in flight, which bounds memory. Closing it stops them where they are.
    Raises ValueError for models that can't be opened.
    """
    fitters = [Fitter() for _ in range(workers)]
    maker, free = Maker(), queue.SimpleQueue()  # type: ignore[var-annotated]
    for fitter in fitters:
        free.put(fitter)

    def carry(job: Job) -> Outcome:
        made = maker.make(job, folder)
        if isinstance(made, Outcome):
            return made
        fitter = free.get()
        try:
            return fitter.reconstruct(made)
        finally:
            free.put(fitter)

    pool = ThreadPoolExecutor(MAKING + workers, thread_name_prefix="batch")
    try:
        maker.open([job.settings for job in jobs])
        for future in as_completed([pool.submit(carry, job) for job in jobs]):
            yield future.result()
    finally:
        maker.stop()
        for fitter in fitters:
            fitter.close()
        pool.shutdown(cancel_futures=True)


def usual_workers(device: torch.device) -> int:
    """Two where a GPU has room for them: while one writes files or simplifies a mesh, the other has work for it."""
    roomy = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory >= ROOM
    return 2 if roomy else 1


class Fitter:
    """A process that writes orbits and reconstructs, one picture at a time, and is made anew when it dies.

    work: what it does with a picture; a function of a module.
    """

    def __init__(self, work: Callable[[Made], Outcome] = reconstruct):
        self._work, self._closed = work, False
        self._start()

    def reconstruct(self, made: Made) -> Outcome:
        """The work over there. Raises InterruptedError once closed."""
        told = pickle.dumps(made)
        for _ in range(TRIES):
            try:
                self._connection.send_bytes(told)
                return pickle.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                if self._closed:
                    raise InterruptedError("the batch was stopped") from None
                self._process.join()
                status = self._process.exitcode
                self._start()
        error = RuntimeError(f"the process that reconstructed it ended {TRIES} times, at last with status {status}")
        return failed(made.job, error, made.started, made.warnings)

    def close(self) -> None:
        """Ends the process; files appear whole or not at all, so that no harm is done at any moment."""
        self._closed = True
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._work), daemon=True, name="reconstruction")
        self._process.start()
        theirs.close()


def _serve(connection: Connection, work: Callable[[Made], Outcome]) -> None:
    """The whole life of a Fitter's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the batch, which says what to do
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            told = connection.recv_bytes()
        except (EOFError, OSError):
            return
        connection.send_bytes(pickle.dumps(work(pickle.loads(told))))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the next batch may be at the same picture already
