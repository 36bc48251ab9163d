"""A job as server-sent events: what its worker reported, each change of its state, and its end."""

import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
from anyio.to_thread import run_sync

from .jobs import ENDED, Job, JobStore

LOOK = 0.2  # seconds between two looks into the store
ALIVE = 15.0  # seconds of silence after which a comment keeps proxies from closing the connection


async def job_events(
    store: JobStore, job: str, after: int, describe: Callable[[Job], dict[str, Any]], is_closing: Callable[[], bool]
) -> AsyncIterator[str]:
    """Text of the stream, from behind event number `after`; it ends with the job, or with the server."""
    state, spoke = None, time.monotonic()
    while not is_closing():
        now = await run_sync(store.get, job)  # before the events, so that none is behind the end
        for number, kind, data in await run_sync(store.events, job, after):
            after, spoke = number, time.monotonic()
            yield f"id: {number}\nevent: {kind}\ndata: {data}\n\n"
        if now is None:
            return
        if now.state != state:
            state, spoke = now.state, time.monotonic()
            kind = "end" if state in ENDED else "state"
            late = await run_sync(store.events, job, after)
            if kind == "end" and late:
                state = None  # more than one answer's worth of events: the end comes after them
                continue
            yield f"event: {kind}\ndata: {json.dumps(await run_sync(describe, now))}\n\n"
            if kind == "end":
                return
        if time.monotonic() - spoke > ALIVE:
            spoke = time.monotonic()
            yield ": alive\n\n"
        await anyio.sleep(LOOK)
