"""The server under fire: mixed, malformed and cancelled requests from many clients while its worker is killed.

python -m bench.serve [--requests 200] [--clients 16]

Orbits of the embedded model at 64² in one step, so that the worker has no rest and the whole takes minutes; one request
in fifty is a mesh. A frame is right if it is what the same seed gives in this process, without a server. At the end
every job is asked for again: what its client was told must stand, and no job may be there that nobody was told of.
"""

import argparse
import io
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import trimesh
from PIL import Image

from sv3d_fast.events import finish
from sv3d_fast.orbit_stage import open_model, orbiting
from sv3d_fast.settings import Settings

from .results import record
from .serve_clients import SEEDS, SHARES, SMALL, Client, Figures, Load

ISSUE = "production"
PHOTO = Path(__file__).parent.parent / "examples" / "armchair.png"
NEAR = 1  # levels of 255 by which a frame may differ from its reference
KILLS = (0.1, 0.25, 0.4)  # of the requests answered: what comes after is one worker's life, in which leaks would show
HALF = 0.5  # of the requests, from which on the memory is to be flat


def references() -> list[np.ndarray]:
    """Frames (21, 64, 64, 3) of each seed, made in this process."""
    model, found = open_model(Settings(device="cpu")), []
    for seed in range(SEEDS):
        with tempfile.TemporaryDirectory() as place:
            video, *_ = finish(orbiting(PHOTO, place, Settings(device="cpu", seed=seed, **SMALL), model=model))
            found.append(video.frames.numpy())
    return found


def fault(job: dict, files: dict[str, bytes], expected: list[np.ndarray]) -> str:
    """What is wrong with the files of a job that is done; empty if nothing is."""
    names = sorted(name for name in files if name.startswith("images/"))
    frames = np.stack([np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB")) for name in names] or [0])
    truth = expected[job["request"]["seed"]]
    if frames.shape != truth.shape or np.abs(frames.astype(int) - truth).max() > NEAR:
        return "the frames are not those of its seed"
    with av.open(io.BytesIO(files["orbit.mp4"])) as video:
        if sum(1 for _ in video.decode(video=0)) != len(truth):
            return "orbit.mp4 has not a frame for each view"
    if job["mode"] == "mesh":
        mesh = trimesh.load(io.BytesIO(files["mesh.glb"]), file_type="glb", force="mesh")
        if len(mesh.faces) == 0 or b"</html>" not in files["report.html"]:
            return "no mesh, or no report"
    return ""


class Watch:
    """Takes the memory twice a second and kills the worker at KILLS, until it is told to end."""

    def __init__(self, load: Load, server: int):
        self.load, self.server, self.ended = load, server, threading.Event()
        self.kills = 0
        self.memory: list[tuple[int, int, int]] = []  # requests answered, bytes of the server, of its worker

    def run(self) -> None:
        """To be run in a thread of its own."""
        client, due = Client(self.load.port), [round(share * self.load.total) for share in KILLS]
        while not self.ended.wait(0.5):
            answered = self.load.figures.answered
            try:
                worker = worker_of(self.server)
                if worker is None:
                    continue
                self.memory.append((answered, resident(self.server), resident(worker)))
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
            running = 'sv3d_jobs{state="running"} 1.0' in client.call("GET", "/metrics")[1].decode()
            if due and running and answered >= due[0]:
                due.pop(0)
                os.kill(worker, signal.SIGKILL)
                self.kills += 1

    def growth(self, of: int) -> float:
        """Percent by which the median of the last quarter of the requests lies above that of the quarter before it."""
        total, middle = self.load.total, (1 + HALF) / 2
        third = [sample[of] for sample in self.memory if HALF * total <= sample[0] < middle * total]
        last = [sample[of] for sample in self.memory if middle * total <= sample[0]]
        return 100 * (statistics.median(last) / statistics.median(third) - 1)


def worker_of(server: int) -> int | None:
    """The process that multiprocessing spawned for the server's one device."""
    children = [int(p) for f in Path(f"/proc/{server}/task").glob("*/children") for p in f.read_text().split()]
    found = [p for p in children if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    return found[0] if found else None


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def contradictions(port: int, figures: Figures, kills: int) -> list[str]:
    """Where the server's own account differs from what its clients were told."""
    client, wrong = Client(port), []
    for path, told in figures.jobs.items():
        now = json.loads(client.call("GET", path)[1])
        if now != told:
            wrong.append(f"{path}: was {told['state']}, is {now.get('state')}")
    redone = sum(max(0, job["attempts"] - 1) for job in figures.jobs.values())
    if redone != kills:  # each kill struck a job, which was then begun once more
        wrong.append(f"{redone} attempts were repeated for {kills} kills")
    if kills != len(KILLS):
        wrong.append(f"the worker was killed {kills} times instead of {len(KILLS)}")
    counts = dict(re.findall(r'sv3d_jobs\{state="(\w+)"\} (\d+)\.0', client.call("GET", "/metrics")[1].decode()))
    kept, seen = {k: int(v) for k, v in counts.items() if v != "0"}, Counter(j["state"] for j in figures.jobs.values())
    if kept != seen:
        wrong.append(f"the server counts {kept}, its clients {dict(seen)}")
    return wrong


def besiege(requests: int, clients: int) -> tuple[Load, Watch, float]:
    """Starts a server, sends it all requests and ends it; what was seen, and seconds under load."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as scratch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, "-m", "sv3d_fast.cli", "serve", "--port", str(port), "--data-dir", scratch]
        server = subprocess.Popen([*command, "--devices", "cpu", "--queue-size", "10", "--max-attempts", "4"])
        try:
            wait_until_ready(server, port)
            load = Load(port, requests, PHOTO.read_bytes())
            watch, began = Watch(load, server.pid), time.perf_counter()
            with ThreadPoolExecutor(clients + 1) as pool:
                watching = pool.submit(watch.run)
                try:
                    for client in [pool.submit(load.client) for _ in range(clients)]:
                        client.result()
                finally:
                    watch.ended.set()
            watching.result()
            seconds = time.perf_counter() - began
            load.figures.wrong += contradictions(port, load.figures, watch.kills)
        finally:
            server.terminate()
            status = server.wait(120)
    if status:
        load.figures.wrong.append(f"the server ended with status {status}")
    return load, watch, seconds


def wait_until_ready(server: subprocess.Popen, port: int) -> None:
    """Raises RuntimeError for a server that ends, or isn't ready within two minutes."""
    end = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < end:
        try:
            if Client(port).call("GET", "/readyz")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError("the server did not get ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    args = parser.parse_args()
    expected = references()
    load, watch, seconds = besiege(args.requests, args.clients)
    figures = load.figures
    for path, files in figures.done.items():
        if wrong := fault(figures.jobs[path], files, expected):
            figures.wrong.append(f"{path}: {wrong}")
    ends = Counter(job["state"] for job in figures.jobs.values())
    cancelled = round(SHARES["waiting"] * args.requests) + round(SHARES["stopped"] * args.requests)
    if ends["cancelled"] != cancelled:
        figures.wrong.append(f"{ends['cancelled']} jobs were cancelled instead of {cancelled}")
    print("\n".join(figures.wrong))
    print(f"{seconds:.0f} s; {len(figures.jobs)} accepted, {figures.full} times full, ends {dict(ends)}")
    print(f"{len(figures.status)} status calls, median {1000 * statistics.median(figures.status):.1f} ms")
    peak = [max(sample[of] for sample in watch.memory) / 2**20 for of in (1, 2)]
    print(f"at most {peak[0]:.0f} MiB of the server and {peak[1]:.0f} of its worker")
    tenths = [[m[1] for m in watch.memory if k <= 10 * m[0] / args.requests < k + 1] for k in range(10)]
    print("the server's, by tenths:", *(f"{statistics.median(tenth) / 2**20:.0f}" for tenth in tenths if tenth))
    p99 = 1000 * statistics.quantiles(figures.status, n=100)[98]
    grown = {"server": watch.growth(1), "worker": watch.growth(2)}
    if args.requests < 200:
        print(f"growth {grown}, p99 {p99:.1f} ms")
        return
    what = f"server, {args.requests} requests, {args.clients} clients, worker killed {len(KILLS)} times"
    record(ISSUE, f"{what}: requests with a wrong end", len(figures.wrong), "requests", "<= 0")
    for process, percent in grown.items():
        record(ISSUE, f"{what}: memory growth of the {process} over the second half", percent, "%", "<= 5")
    record(ISSUE, f"{what}: p99 of status calls", p99, "ms", "<= 100")


if __name__ == "__main__":
    main()
