"""Clients of a server for bench.serve: what they send, how long they wait, and what they were told."""

import base64
import http.client
import itertools
import json
import random
import threading
import time
from dataclasses import dataclass, field

SMALL = {"frame_size": 64, "steps": 1}
LONG = SMALL | {"steps": 200}  # still running when it is cancelled
MESH = SMALL | {"mc_resolution": 32, "target_faces": 500, "texture_resolution": 128}
SEEDS = 5  # different ones, so that many jobs ask for the same
SHARES = {"bad": 0.15, "waiting": 0.05, "stopped": 0.05, "mesh": 0.02}  # of the requests; the others are orbits
URL, JSON = "/v1/3d/generations", "application/json"
PATIENCE = 300.0  # seconds within which every job must have begun, and a cancelled one must have ended
TOO_LARGE = 40_000_000  # bytes; the server's limit is 32 million
UNDECIDED = ("queued", "running")


@dataclass
class Figures:
    """status: seconds of each status call made while the job ran or waited; jobs: by path, as its client last saw them;
    done: files of the finished ones, by path."""

    status: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    jobs: dict[str, dict] = field(default_factory=dict)
    done: dict[str, dict[str, bytes]] = field(default_factory=dict)
    answered: int = 0
    full: int = 0


class Client:
    """One connection that is kept open."""

    def __init__(self, port: int):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def call(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> tuple[int, bytes, dict]:
        """Status, body and headers. Raises OSError or http.client.HTTPException for a connection that breaks."""
        try:
            self.connection.request(method, path, body, {"Content-Type": kind} if kind else {})
            answer = self.connection.getresponse()
            return answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}
        except (OSError, http.client.HTTPException):
            self.connection.close()
            raise


def form(image: bytes, **fields) -> tuple[bytes, str]:
    """A multipart body and its type."""
    parts = [f'--b\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()]
    parts.append(b'--b\r\nContent-Disposition: form-data; name="image"; filename="../../x"\r\n\r\n' + image)
    return b"".join(parts) + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"


def as_json(image: bytes, **fields) -> tuple[bytes, str]:
    """A JSON body and its type."""
    return json.dumps(fields | {"image": base64.b64encode(image).decode()}).encode(), JSON


def malformed(image: bytes) -> list[tuple[bytes, str]]:
    """Requests that are to be refused."""
    return [
        form(b"no picture"), form(image[: len(image) // 2], mode="orbit"), form(image, steps=0),
        form(image, model="/etc/passwd"), form(image, mode="preview"), form(bytes(TOO_LARGE)), (image, "image/png"),
        (b"{", JSON), (b'{"image": "***"}', JSON), (b"[" * 100_000, JSON), (image, "multipart/form-data; boundary=b"),
    ]  # fmt: skip


class Load:
    """The requests of all clients, in a random order that a seed fixes."""

    def __init__(self, port: int, requests: int, image: bytes):
        self.port, self.total, self.image = port, requests, image
        kinds = [kind for kind, share in SHARES.items() for _ in range(round(share * requests))]
        self.kinds = kinds + ["orbit"] * (requests - len(kinds))
        self.random = random.Random(0)
        self.random.shuffle(self.kinds)
        self.bad = itertools.cycle(malformed(image))
        self.figures, self.lock = Figures(), threading.Lock()

    def client(self) -> None:
        """Takes requests until there are none."""
        client = Client(self.port)
        while True:
            with self.lock:
                if not self.kinds:
                    return
                kind, number = self.kinds.pop(), self.total - len(self.kinds)
                wait, bad = self.random.random(), next(self.bad)
            try:
                wrong = self._refused(client, *bad) if kind == "bad" else self._job(client, kind, number, wait)
            except (OSError, http.client.HTTPException) as error:
                wrong = f"the connection broke: {error!r}"
            with self.lock:
                self.figures.answered += 1
                if wrong:
                    self.figures.wrong.append(f"request {number}, {kind}: {wrong}")

    def _post(self, client: Client, body: bytes, kind: str) -> tuple[int, bytes, dict]:
        """The answer, after as many attempts as a full queue asks for."""
        while (answer := client.call("POST", URL, body, kind))[0] == 429:
            with self.lock:
                self.figures.full += 1
            time.sleep(min(float(answer[2]["retry-after"]), 2.0))
        return answer

    def _refused(self, client: Client, body: bytes, kind: str) -> str:
        """A request that must be answered with what is wrong with it."""
        try:
            code, text, _ = self._post(client, body, kind)
        except OSError:  # a body that is too large may be cut off before the answer is read
            if len(body) > TOO_LARGE:
                return ""
            raise
        return "" if 400 <= code < 500 and json.loads(text)["detail"] else f"status {code}"

    def _job(self, client: Client, kind: str, number: int, wait: float) -> str:
        """A job to its end; what was wrong, or nothing."""
        fields = {"mesh": MESH, "stopped": LONG}.get(kind, SMALL)
        fields = fields | {"mode": "mesh" if kind == "mesh" else "orbit", "seed": number % SEEDS}
        code, text, headers = self._post(client, *(as_json, form)[number % 2](self.image, **fields))
        if code != 202:
            return f"not accepted: {code} {text[:200]!r}"
        path, cancelled = headers["location"], False
        with self.lock:
            self.figures.jobs[path] = json.loads(text)
        if kind == "waiting":
            time.sleep(wait)
        if kind == "stopped":
            self._follow(client, path, lambda job: job["state"] != "queued" and job["progress"])
        if kind in ("waiting", "stopped"):
            code = client.call("DELETE", path)[0]
            cancelled = code in (200, 202)
            if kind == "stopped" and code != 202:
                return f"answered {code} to the cancellation of a job that runs"
        if number % 4 == 0 and b"event: end" not in client.call("GET", f"{path}/events")[1]:
            return "the events did not end"
        job = self._follow(client, path, lambda job: job["state"] not in UNDECIDED)
        if cancelled:
            return "" if job["state"] == "cancelled" and not job["files"] else f"cancelled, but {job['state']}"
        if job["state"] != "done":
            return f"{job['state']}: {job['reason']}"
        answers = {f["name"]: (f["size"], *client.call("GET", f["url"])) for f in job["files"]}
        if any(code != 200 or len(body) != size for size, code, body, _ in answers.values()):
            return "a file that is listed is not there, or of another size"
        with self.lock:
            self.figures.done[path] = {name: answer[2] for name, answer in answers.items()}
        return ""

    def _follow(self, client: Client, path: str, until) -> dict:
        """Asks for a job every tenth of a second until a condition holds; every answer counts among the figures."""
        end = time.monotonic() + PATIENCE
        while True:
            began = time.perf_counter()
            code, text, _ = client.call("GET", path)
            seconds, job = time.perf_counter() - began, json.loads(text)
            if code != 200:
                raise OSError(f"status {code} for {path}")
            with self.lock:
                self.figures.jobs[path] = job
                self.figures.status.append(seconds)
            if until(job):
                return job
            if time.monotonic() > end:
                raise OSError(f"{path} is still {job['state']} after {PATIENCE:g} s")
            time.sleep(0.1)
