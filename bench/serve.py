"""The server under fire: mixed, malformed and cancelled requests from many clients while its worker is killed.

python -m bench.serve [--requests 200] [--clients 16]
"""

import argparse
import http.client
import io
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import av
import trimesh
from PIL import Image

from .results import record

ISSUE = "production"
PHOTO = Path(__file__).parent.parent / "examples" / "armchair.png"
SMALL = {"frame_size": 64, "steps": 1}
MESH = SMALL | {"mc_resolution": 32, "target_faces": 500, "texture_resolution": 128}
MALFORMED, CANCELLED, MESHES = 0.15, 0.1, 0.02  # shares of the requests
KILLS = (0.1, 0.25, 0.4)  # of the requests answered: what comes after is one worker's life, in which leaks would show
URL, JSON = "/v1/3d/generations", "application/json"


@dataclass
class Figures:
    """What the clients saw. status: seconds of each status call; memory: (requests answered, bytes)."""

    status: list[float] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=dict)
    answered: int = 0
    accepted: int = 0
    full: int = 0


class Client:
    """One connection that is kept open."""

    def __init__(self, port: int):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def call(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> tuple[int, bytes, dict]:
        """Status, body and headers."""
        for attempt in (0, 1):  # a server may close an idle connection just as a request is sent
            try:
                self.connection.request(method, path, body, {"Content-Type": kind} if kind else {})
                answer = self.connection.getresponse()
                return answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                self.connection.close()
                if attempt:
                    raise
        raise AssertionError


def form(image: bytes, **fields) -> tuple[bytes, str]:
    """A multipart body and its type."""
    parts = [f'--b\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()]
    parts.append(b'--b\r\nContent-Disposition: form-data; name="image"; filename="../../x"\r\n\r\n' + image)
    return b"".join(parts) + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"


def malformed(image: bytes) -> list[tuple[bytes, str]]:
    """Requests that are to be refused."""
    return [
        form(b"no picture"), form(image[: len(image) // 2], mode="orbit"), form(image, steps=0),
        form(image, model="/etc/passwd"), form(image, mode="preview"), form(bytes(40_000_000)), (image, "image/png"),
        (b"{", JSON), (b'{"image": "***"}', JSON), (b"[" * 100_000, JSON), (image, "multipart/form-data; boundary=b"),
    ]  # fmt: skip


def check(job: dict, fetched: dict[str, bytes]) -> str:
    """What is wrong with a job that is done; empty if nothing is."""
    if any(len(fetched[f["name"]]) != f["size"] for f in job["files"]):
        return "a file is not as large as it is said to be"
    frames = [name for name in fetched if name.startswith("frames/")]
    if len(frames) != 21 or any(Image.open(io.BytesIO(fetched[n])).convert("RGB").size != (64, 64) for n in frames):
        return "not 21 frames of 64 x 64"
    with av.open(io.BytesIO(fetched["orbit.mp4"])) as video:
        if sum(1 for _ in video.decode(video=0)) != 21:
            return "orbit.mp4 has not 21 frames"
    if job["mode"] == "mesh":
        mesh = trimesh.load(io.BytesIO(fetched["mesh.glb"]), file_type="glb", force="mesh")
        if len(mesh.faces) == 0 or "report.html" not in fetched:
            return "no mesh, or no report"
    return ""


class Load:
    """The requests of all clients, in a random order that a seed fixes."""

    def __init__(self, port: int, requests: int):
        self.port, self.total = port, requests
        self.image = PHOTO.read_bytes()
        bad, cancelled, meshes = (round(share * requests) for share in (MALFORMED, CANCELLED, MESHES))
        kinds = ["bad"] * bad + ["cancel"] * cancelled + ["mesh"] * meshes
        self.kinds = kinds + ["orbit"] * (requests - len(kinds))
        self.random = random.Random(0)
        self.random.shuffle(self.kinds)
        self.bad = itertools.cycle(malformed(self.image))
        self.figures, self.lock = Figures(), threading.Lock()
        self.done: list[tuple[dict, dict[str, bytes]]] = []

    def client(self) -> None:
        """Takes requests until there are none."""
        client = Client(self.port)
        while True:
            with self.lock:
                if not self.kinds:
                    return
                kind, number = self.kinds.pop(), self.total - len(self.kinds)
                wait, bad = self.random.random(), next(self.bad)
            wrong = self.refused(client, *bad) if kind == "bad" else self.job(client, kind, number, wait)
            with self.lock:
                self.figures.answered += 1
                if wrong:
                    self.figures.wrong.append(f"request {number}, {kind}: {wrong}")

    def refused(self, client: Client, body: bytes, kind: str) -> str:
        """A request that must be answered with what is wrong with it."""
        while True:
            try:
                code, text, _ = client.call("POST", URL, body, kind)
            except OSError:  # a body that is too large may be cut off before the answer is read
                client.connection.close()
                return "" if len(body) > 32_000_000 else "cut off"
            if code != 429:
                return "" if 400 <= code < 500 and json.loads(text)["detail"] else f"status {code}"
            self.figures.full += 1
            time.sleep(1)

    def job(self, client: Client, kind: str, number: int, wait: float) -> str:
        """A job to its end; what was wrong, or nothing."""
        fields = MESH | {"mode": "mesh"} if kind == "mesh" else SMALL | {"mode": "orbit"}
        while True:
            code, text, headers = client.call("POST", URL, *form(self.image, seed=number, **fields))
            if code != 429:
                break
            self.figures.full += 1
            time.sleep(min(float(headers["retry-after"]), 2.0))
        if code != 202:
            return f"not accepted: {code} {text[:200]!r}"
        self.figures.accepted += 1
        path, was_cancelled = headers["location"], False
        if kind == "cancel":
            time.sleep(2 * wait)
            was_cancelled = client.call("DELETE", path)[0] in (200, 202)
        if number % 5 == 0:
            _, text, _ = client.call("GET", f"{path}/events")
            if b"event: end" not in text:
                return "the events did not end"
        while True:
            began = time.perf_counter()
            code, text, _ = client.call("GET", path)
            self.figures.status.append(time.perf_counter() - began)
            job = json.loads(text)
            if code != 200 or job["state"] not in ("queued", "running"):
                break
            time.sleep(0.1)
        self.figures.ends[job["state"]] = self.figures.ends.get(job["state"], 0) + 1
        if was_cancelled:
            return "" if job["state"] == "cancelled" and not job["files"] else f"cancelled, but {job['state']}"
        if job["state"] != "done":
            return f"{job['state']}: {job['reason']}"
        answers = {f["name"]: client.call("GET", f["url"]) for f in job["files"]}
        if any(answer[0] != 200 for answer in answers.values()):
            return "a file that is listed is not there"
        with self.lock:
            self.done.append((job, {name: answer[1] for name, answer in answers.items()}))
        return ""


def processes(server: int) -> dict[int, str]:
    """The server's process and its children: command lines by number."""
    children = [int(p) for f in Path(f"/proc/{server}/task").glob("*/children") for p in f.read_text().split()]
    return {p: Path(f"/proc/{p}/cmdline").read_bytes().decode().replace("\0", " ") for p in (server, *children)}


def resident(pids: dict[int, str]) -> int:
    """Bytes of memory that processes have, pages they share counted in each."""
    pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def observe(load: Load, server: int, ended: threading.Event) -> None:
    """Takes the memory twice a second, and kills the worker at KILLS."""
    kills = [round(share * load.total) for share in KILLS]
    while not ended.wait(0.5):
        try:
            found = processes(server)
            load.figures.memory.append((load.figures.answered, resident(found)))
        except FileNotFoundError:  # a process has just ended
            continue
        workers = [pid for pid, command in found.items() if "spawn_main" in command]
        busy = json.loads(Client(load.port).call("GET", "/readyz")[1]).get("workers")
        if kills and workers and busy and load.figures.answered >= kills[0]:
            kills.pop(0)
            os.kill(workers[0], signal.SIGKILL)
    if kills:
        load.figures.wrong.append(f"the worker was killed {len(KILLS) - len(kills)} times instead of {len(KILLS)}")


def growth(memory: list[tuple[int, int]], total: int) -> float:
    """Percent by which the median of the last quarter of the requests lies above that of the quarter before it."""
    third = [size for answered, size in memory if 0.5 * total <= answered < 0.75 * total]
    last = [size for answered, size in memory if 0.75 * total <= answered]
    return 100 * (statistics.median(last) / statistics.median(third) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    args = parser.parse_args()
    with socket.socket() as free, tempfile.TemporaryDirectory() as scratch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, "-m", "sv3d_fast.cli", "serve", "--port", str(port), "--data-dir", scratch]
        server = subprocess.Popen([*command, "--devices", "cpu", "--queue-size", "10", "--max-attempts", "4"])
        try:
            wait_until_ready(server, port)
            load, ended, began = Load(port, args.requests), threading.Event(), time.perf_counter()
            with ThreadPoolExecutor(args.clients + 1) as pool:
                watching = pool.submit(observe, load, server.pid, ended)
                try:
                    for client in [pool.submit(load.client) for _ in range(args.clients)]:
                        client.result()
                finally:
                    ended.set()
            watching.result()
            seconds = time.perf_counter() - began
        finally:
            server.terminate()
            status = server.wait(120)
    figures = load.figures
    if status:
        figures.wrong.append(f"the server ended with status {status}")
    figures.wrong += [wrong for job, fetched in load.done if (wrong := check(job, fetched))]
    print("\n".join(figures.wrong))
    print(f"{seconds:.0f} s; {figures.accepted} accepted, {figures.full} times full, ends {figures.ends}")
    print(f"{len(figures.status)} status calls, median {1000 * statistics.median(figures.status):.1f} ms")
    print(f"at most {max(size for _, size in figures.memory) / 2**20:.0f} MiB")
    if args.requests < 200:
        print(f"growth {growth(figures.memory, args.requests):.2f} %, p99 {1000 * percentile(figures.status):.1f} ms")
        return
    what = f"server, {args.requests} requests, {args.clients} clients, worker killed {len(KILLS)} times"
    record(ISSUE, f"{what}: requests with a wrong end", len(figures.wrong), "requests", "<= 0")
    record(ISSUE, f"{what}: memory growth over the second half", growth(figures.memory, args.requests), "%", "<= 5")
    record(ISSUE, f"{what}: p99 of status calls", 1000 * percentile(figures.status), "ms", "<= 100")


def percentile(values: list[float]) -> float:
    """The 99th."""
    return statistics.quantiles(values, n=100)[98]


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


if __name__ == "__main__":
    main()
