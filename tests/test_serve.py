"""The server over HTTP, on a pipeline that does what a job's seed says: what is taken, refused, shown and ended how."""

import base64
import contextlib
import dataclasses
import io
import json
import os
import signal
import sqlite3
import struct
import time
import zlib

import pytest

pytest.importorskip("fastapi")

import serve_fakes as fakes
from fastapi.testclient import TestClient
from PIL import Image

from sv3d_fast.serve.app import create_app
from sv3d_fast.serve.execution import open_pipeline
from sv3d_fast.serve.jobs import ENDED
from sv3d_fast.serve.keys import new_key
from sv3d_fast.serve.settings import ServeSettings
from sv3d_fast.settings import Settings

URL = "/v1/3d/generations"


def until(condition, seconds=480.0):
    """The first true value of a condition; fails after a bounded wait."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def png(size=(33, 21), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 60, 40)).save(buffer, kind)
    return buffer.getvalue()


def bomb():
    """Some bytes of PNG whose header says 60000 x 60000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    )


@contextlib.contextmanager
def serving(folder, opening=fakes.open_fake, **settings):
    app = create_app(ServeSettings(data_dir=folder, devices=("cpu",), **settings), opening)
    with TestClient(app, raise_server_exceptions=False) as client:
        client.service = app.state.service
        yield client


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("serve"), max_body=100_000, max_pixels=10_000) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        yield client


def post(client, seed=fakes.QUICK, image=None, headers=None, **fields):
    return client.post(
        URL, data={"seed": seed, **fields}, files={"image": ("x.gif", image or png())}, headers=headers or {}
    )


def queued(client, seed=fakes.QUICK):
    answer = post(client, seed)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    return answer.headers["location"]


def ended(client, job):
    return until(lambda: (now := client.get(job).json())["state"] in ENDED and now)


def test_a_form_to_files(client):
    job = queued(client)
    done = ended(client, job)
    assert done["state"] == "done"
    assert done["attempts"] == 1
    assert [f["name"] for f in done["files"]] == ["frames/0000.png", "report.html"]
    file = client.get(done["files"][0]["url"])
    assert file.headers["content-type"] == "image/png"
    assert "attachment" in file.headers["content-disposition"]
    assert Image.open(io.BytesIO(file.content)).size == (33, 21)
    assert client.delete(job).status_code == 409


def test_a_job_that_ended_while_it_was_described(client):
    """Its state and its files are of one moment: files belong to jobs that are done."""
    job = client.service.store.get(ended(client, queued(client))["id"])
    assert client.service.describe(job)["files"]
    assert client.service.describe(dataclasses.replace(job, state="running"))["files"] == []


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_json(client, prefix):
    image = prefix + base64.b64encode(png(kind="WEBP")).decode()
    answer = client.post(URL, json={"image": image, "mode": "orbit", "seed": 0, "elevation": -5.5})
    assert answer.status_code == 202
    assert answer.json()["request"] == {"seed": 0, "elevation": -5.5}
    assert ended(client, answer.headers["location"])["state"] == "done"


def test_events_to_the_end_and_from_the_middle(client):
    job = queued(client)
    ended(client, job)

    def stream(**headers):
        blocks = client.get(f"{job}/events", headers=headers).text.strip().split("\n\n")
        return [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]

    events = stream()
    assert [e["event"] for e in events] == ["stage", "progress", "frames", "end"]
    frame = json.loads(events[2]["data"])["frames"][0].partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(frame))).size == (20, 20)
    assert json.loads(events[-1]["data"])["state"] == "done"
    assert [e["event"] for e in stream(**{"Last-Event-ID": "2"})] == ["frames", "end"]


@pytest.mark.parametrize(
    ("fields", "image", "code", "says"),
    [
        ({}, b"not a picture", 422, "not a picture"),
        ({}, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 422, "not a picture"),
        ({}, png()[:60], 422, "image: the picture is damaged"),
        ({}, bomb(), 422, "expected at most 10000 pixels, got many more"),
        ({}, png((101, 100)), 422, "got 101 x 100"),
        ({}, bytes(100_001), 413, "at most 100000 bytes"),
        ({"steps": "0"}, None, 422, "steps: "),
        ({"steps": "many"}, None, 422, "steps: "),
        ({"elevation": "nan"}, None, 422, "elevation: "),
        ({"mode": "run"}, None, 422, "mode: "),
        ({"model": "/etc/passwd"}, None, 422, "model: "),
        ({"matting_model": "/etc/passwd"}, None, 422, "matting_model: "),
        ({"orbit": "/etc/passwd"}, None, 422, "orbit: "),
        ({"mode": "orbit", "mc_resolution": "32"}, None, 422, "mc_resolution: mode orbit takes"),
        ({"mode": "preview", "seed": []}, None, 422, "no TripoSR checkpoint"),
    ],
)
def test_what_is_refused(client, fields, image, code, says):
    answer = post(client, image=image, **fields)
    assert answer.status_code == code, answer.text
    assert says in answer.json()["detail"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        (b"", "", 415),
        (png(), "image/png", 415),
        (b"{", "application/json", 422),
        (b"[" * 50_000, "application/json", 422),
        (b'{"image": "***"}', "application/json", 422),
        (b'{"image": 3}', "application/json", 422),
        (b'{"image": "", "seed": 1e400}', "application/json", 422),
        (b'{"\\ud800": 1}', "application/json", 422),
        (b"x", "multipart/form-data", 400),
        (b"x", "multipart/form-data; boundary=a", 400),
        (b"--a\r\n\r\nx\r\n--a--", "multipart/form-data; boundary=a", 400),
        (b"--a\r\nContent-Disposition: form-data; name=seed\r\n\r\n1\r\n--a--\r\n",
         "multipart/form-data; boundary=a; charset=nonsense", 422),
    ],
)  # fmt: skip
def test_bodies_that_are_none(client, body, kind, code):
    answer = client.post(URL, content=body, headers={"Content-Type": kind})
    assert answer.status_code == code, answer.text


def test_a_body_of_unannounced_length_is_cut(client):
    def endless():
        for _ in range(50):
            yield bytes(10_000)

    answer = client.post(URL, content=endless(), headers={"Content-Type": "multipart/form-data; boundary=a"})
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "name", ["../result.png", "%2e%2e/result.png", "..%2fresult.png", "/etc/passwd", "link", ".hidden", "frames",
             "frames/%2e%2e/report.html", "report.html%00", "REPORT.HTML", ""],
)  # fmt: skip
def test_names_that_no_job_wrote(client, name):
    job = queued(client)
    ended(client, job)
    assert client.get(f"{job}/files/{name}").status_code in (404, 405)


def test_jobs_that_are_not_there(client):
    for path in ("/v1/jobs/nope", "/v1/jobs/nope/events", "/v1/jobs/nope/files/a", "/v1/jobs/%00%ff"):
        assert client.get(path).status_code == 404
    assert client.delete("/v1/jobs/nope").status_code == 404


def test_cancel_between_steps_and_in_the_queue(client):
    running, waiting = queued(client, fakes.ENDLESS), queued(client)
    until(lambda: client.get(running).json()["state"] == "running")
    assert client.get(waiting).json()["state"] == "queued"
    assert client.delete(waiting).status_code == 200
    assert client.get(waiting).json()["state"] == "cancelled"
    assert client.delete(running).status_code == 202
    assert ended(client, running)["state"] == "cancelled"
    assert client.delete(running).status_code == 200
    assert ended(client, queued(client))["state"] == "done"


def test_reasons_of_failure_tell_no_paths(client):
    refused = ended(client, queued(client, fakes.REFUSES))
    assert (refused["state"], refused["reason"]) == ("failed", "the picture: no object in the picture")
    broken = ended(client, queued(client, fakes.BREAKS))
    assert (broken["state"], broken["reason"]) == ("failed", "internal error (ZeroDivisionError)")


def test_a_killed_worker_is_replaced_and_its_job_redone(client):
    job = queued(client, fakes.ENDLESS)
    until(lambda: client.get(job).json()["state"] == "running")
    (worker,) = client.service.supervisor._workers.values()
    os.kill(worker.process.pid, signal.SIGKILL)
    until(lambda: (now := client.get(job).json())["attempts"] == 2 and now["state"] == "running")
    client.delete(job)
    assert ended(client, job)["state"] == "cancelled"
    once = ended(client, queued(client, fakes.DIES_ONCE))
    assert (once["state"], once["attempts"]) == ("done", 2)
    always = ended(client, queued(client, fakes.DIES))
    assert always["state"] == "failed"
    assert always["reason"] == "the worker process died in each of 3 attempts"


def test_a_database_that_fails_for_a_while(client, monkeypatch):
    """The disk is full just when a worker has died: its job is redone once there is room."""
    supervisor, failures = client.service.supervisor, iter(range(2))
    recover = supervisor.store.recover

    def full(*arguments):
        if next(failures, None) is not None:
            raise sqlite3.OperationalError("database or disk is full")
        return recover(*arguments)

    monkeypatch.setattr(supervisor.store, "recover", full)
    once = ended(client, queued(client, fakes.DIES_ONCE))
    assert (once["state"], once["attempts"]) == ("done", 2)
    assert next(failures, None) is None
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("error", [sqlite3.OperationalError("database or disk is full"), OSError(28, "/secret")])
def test_a_full_disk_is_no_crash(client, monkeypatch, error):
    def full(*arguments):
        raise error

    kept = set((client.service.settings.jobs_dir).iterdir())
    monkeypatch.setattr(client.service.store, "submit", full)
    answer = post(client)
    assert (answer.status_code, answer.json()) == (503, {"detail": "the server can't read or write its files"})
    assert set((client.service.settings.jobs_dir).iterdir()) == kept


def test_metrics(client):
    ended(client, queued(client))
    client.request("NONSENSE", "/v1/x")
    text = until(lambda: (t := client.get("/metrics").text) and "sv3d_stage_seconds_count" in t and t)
    assert "sv3d_queue_depth 0.0" in text
    assert 'method="other"' in text
    assert "NONSENSE" not in text


def test_openapi_describes_both_bodies(client):
    content = client.get("/openapi.json").json()["paths"][URL]["post"]["requestBody"]["content"]
    assert content["multipart/form-data"]["schema"]["properties"]["image"]["format"] == "binary"
    assert "image" in content["application/json"]["schema"]["required"]
    assert client.get("/docs").status_code == 200


def test_cross_origin_is_off_until_asked_for(client, tmp_path):
    origin = {"Origin": "https://a.example"}
    assert "access-control-allow-origin" not in client.get("/healthz", headers=origin).headers
    with serving(tmp_path, cors_origins=("https://a.example",)) as other:
        answer = other.get("/healthz", headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        stranger = other.get("/healthz", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in stranger.headers


def test_keys_let_in_and_keep_jobs_apart(tmp_path):
    (key, line), (second, other) = new_key(), new_key()
    (tmp_path / "keys").write_text(f"# ours\n{line} first\n{other} second\n")
    with serving(tmp_path / "data", api_key_file=tmp_path / "keys", instance="a1") as client:
        for headers in ({}, {"X-API-Key": "x"}, {"Authorization": f"Basic {key}"}, {"X-API-Key": line}):
            assert post(client, headers=headers).status_code == 401
            assert client.get("/v1/jobs/x", headers=headers).status_code == 401
        job = post(client, headers={"Authorization": f"Bearer {key}"}).headers["location"]
        assert job.startswith("/v1/jobs/a1-")
        assert client.get(job, headers={"X-API-Key": key}).status_code == 200
        assert client.get(job, headers={"X-API-Key": second}).status_code == 404
        assert client.delete(job, headers={"X-API-Key": second}).status_code == 404
        assert client.get("/healthz").status_code == 200


def test_a_full_queue_the_deadline_and_what_is_taken_up_after_a_restart(tmp_path):
    with serving(tmp_path, queue_size=1) as client:
        running = queued(client, fakes.ENDLESS)
        until(lambda: client.get(running).json()["state"] == "running")
        waiting = queued(client)
        full = post(client)
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        assert len(list((tmp_path / "jobs").iterdir())) == 2
    with serving(tmp_path, deadline=3.0) as client:  # the stopped job comes first: it is the older one
        over = ended(client, running)
        assert (over["state"], over["attempts"]) == ("failed", 1)
        assert over["reason"] == "the deadline of 3 s has passed"
        assert ended(client, waiting)["state"] == "done"


def test_a_drain_that_has_to_kill_loses_no_attempt(tmp_path, monkeypatch):
    monkeypatch.setattr("sv3d_fast.serve.supervisor.STUBBORN", 0.5)
    with serving(tmp_path, max_attempts=1) as client:
        hanging = queued(client, fakes.HANGS)
        until(lambda: client.get(hanging).json()["state"] == "running")
        client.service.supervisor.drain(0)
        job = client.get(hanging).json()
        assert (job["state"], job["attempts"]) == ("queued", 0)


def test_the_networks_are_opened_as_the_server_was_told(monkeypatch):
    opened = []

    def take(settings):
        opened.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr("sv3d_fast.orbit_stage.open_model", take)
    with pytest.raises(ValueError, match="enough"):
        open_pipeline(ServeSettings(model="weights", dtype="bfloat16"), "cpu")
    assert opened == [Settings(model="weights", dtype="bfloat16", device="cpu")]
    with pytest.raises(ValueError, match=r"^dtype: expected auto or float16"):
        open_pipeline(ServeSettings(dtype="half"), "cpu")


def test_weights_that_cant_be_opened_end_the_server(tmp_path):
    with serving(tmp_path, fakes.open_broken) as client:
        assert until(lambda: client.service.refusal) == "model: no such weights"
        assert client.get("/readyz").status_code == 503
