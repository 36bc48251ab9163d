"""`sv3d-fast serve` as a process with the embedded model: killed and started again, drained, refused."""

import hashlib
import io
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from PIL import Image, ImageDraw

from sv3d_fast.cli import main
from sv3d_fast.orbit_io import load_orbit
from sv3d_fast.serve.keys import find_owner, read_hashes

pytest.importorskip("fastapi")


class Server:
    """A server on a free port; `start` may follow `kill`."""

    def __init__(self, folder):
        self.folder, self.process = folder, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self, *arguments):
        command = [sys.executable, "-m", "sv3d_fast.cli", "serve", "--port", str(self.port), "--devices", "cpu"]
        self.process = subprocess.Popen([*command, "--data-dir", str(self.folder), *arguments])
        self.until(lambda: self.call("/readyz"))

    def kill(self):
        self.process.kill()
        self.process.wait()

    def call(self, path, **options):
        """JSON of an answer; None where there is none yet."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", **options)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except (OSError, urllib.error.URLError):
            return None

    def submit(self, picture, **fields):
        lines = [
            f'--b\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()
        ]
        lines.append(b'--b\r\nContent-Disposition: form-data; name="image"; filename="../../x"\r\n\r\n' + picture)
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        body = b"".join(lines) + b"\r\n--b--\r\n"
        return f"/v1/jobs/{self.call('/v1/3d/generations', data=body, headers=headers)['id']}"

    def until(self, condition, seconds=480.0):
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert self.process.poll() is None, "the server has ended"
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.05)
        return value


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "data")
    yield server
    if server.process is not None:
        server.kill()


@pytest.fixture
def picture():
    image = Image.new("RGBA", (96, 96))
    ImageDraw.Draw(image).ellipse((24, 18, 72, 78), fill=(200, 60, 40, 255))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.slow
def test_a_killed_server_goes_on_and_a_drained_one_puts_back(server, picture, tmp_path):
    server.start()
    first = server.submit(picture, mode="orbit", steps=40)  # far longer than what follows takes
    second = server.submit(picture, mode="orbit", steps=1, frame_size=64)
    server.until(lambda: server.call(first)["state"] == "running" and server.call(first)["progress"])
    other = subprocess.run(
        [sys.executable, "-m", "sv3d_fast.cli", "serve", "--data-dir", str(server.folder)],
        capture_output=True, text=True, timeout=480,
    )  # fmt: skip
    assert other.returncode == 2
    assert "data_dir: another server uses" in other.stderr
    server.kill()
    server.start("--drain", "0")
    server.until(lambda: server.call(first)["state"] == "running" and server.call(first)["progress"])
    assert server.call(first)["attempts"] == 2
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(480) == 0
    server.start()
    server.until(lambda: server.call(first)["state"] == "running")
    assert server.call(first)["attempts"] == 2  # the drained attempt does not count
    server.call(first, method="DELETE")
    done = server.until(lambda: (now := server.call(second))["state"] not in ("queued", "running") and now)
    assert done["state"] == "done"
    assert server.call(first)["state"] == "cancelled"
    names = {file["name"] for file in done["files"]}
    assert {"orbit.mp4", "transforms.json", "images/0020.png", "manifest.json"} <= names
    orbit = load_orbit(server.folder / "jobs" / second.rpartition("/")[2] / "result")
    assert tuple(orbit.frames.shape) == (21, 64, 64, 3)


def test_weights_that_are_none_are_one_line(tmp_path):
    folder = tmp_path / "data"
    command = [
        sys.executable,
        "-m",
        "sv3d_fast.cli",
        "serve",
        "--data-dir",
        str(folder),
        "--model",
        str(tmp_path / "x.ckpt"),
    ]
    server = Server(folder)
    done = subprocess.run([*command, "--port", str(server.port)], capture_output=True, text=True, timeout=480)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("sv3d-fast: error: ")
    assert "Traceback" not in done.stderr


def test_without_the_extra_there_is_a_line(tmp_path, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.startswith(("sv3d_fast.serve.server", "sv3d_fast.serve.app"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--data-dir", str(tmp_path / "data")]) == 2
    err = capsys.readouterr().err
    assert err == 'sv3d-fast: error: serve needs uvicorn: pip install "sv3d-fast[serve]"\n'
    assert not (tmp_path / "data").exists()


def test_a_new_key_is_what_its_hash_says(tmp_path, capsys):
    assert main(["serve", "--new-key"]) == 0
    key, line = (text.split()[1] for text in capsys.readouterr().out.splitlines())
    assert line == hashlib.sha256(key.encode()).hexdigest()
    (tmp_path / "keys").write_text(f"{line} me\n\n# nobody\n")
    assert find_owner(key, read_hashes(tmp_path / "keys")) == line
    assert find_owner(None, [line]) is None
    for bad in (key, "", line.upper(), "# none"):
        (tmp_path / "keys").write_text(bad)
        with pytest.raises(ValueError, match=r"api_key_file: .*expected"):
            read_hashes(tmp_path / "keys")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--port", "70000"], "port: expected 1 to 65535"),
        (["--queue-size", "0"], "queue_size: expected 1 to"),
        (["--devices", "auto", "cpu"], "devices: expected auto alone"),
        (["--devices", "tpu"], "device: expected auto, cpu"),
        (["--instance", "../x"], "instance: expected up to 16 of a-z"),
        (["--api-key-file", "nowhere"], "api_key_file: can't read nowhere"),
    ],
)
def test_settings_out_of_range(tmp_path, capsys, arguments, reason):
    assert main(["serve", "--data-dir", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"sv3d-fast: error: {reason}")
