"""The page of `sv3d-fast ui`, by a client of the server that it starts."""

import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import trimesh
from gradio_page import photo, serving
from PIL import Image
from small_run import FIT

from sv3d_fast import cli
from sv3d_fast.events import Progress

STATUS, ORBIT, MESH, FILES, EVERYTHING = range(5)  # the outputs


def test_a_missing_extra_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "sv3d_fast.frontends.gradio", raising=False)
    assert cli.main(["ui"]) == 2
    assert capsys.readouterr().err == "sv3d-fast: error: ui: gradio is not installed: pip install 'sv3d-fast[gradio]'\n"


def test_refusals_need_neither_torch_nor_gradio():
    program = (
        "import sys; from sv3d_fast.cli import main; assert main(['ui', '--port', '70000']) == 2;"
        "assert main(['ui', '--steps', '0']) == 2; assert not {'torch', 'gradio'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "port: expected 1 to 65535, got 70000" in done.stderr


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    pytest.importorskip("gradio", reason="the extra gradio is not installed")
    from gradio_client import Client

    with serving(tmp_path_factory.mktemp("gradio")) as address:
        yield Client(address, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def submit(client, path, *, elevation=10, seed=3, purpose=""):
    from gradio_client import handle_file

    job = client.submit(handle_file(str(path)), elevation, seed, purpose, api_name="/make")
    return job, list(job)


def value(output):
    """Of an update, where the client was sent one."""
    return output["value"] if isinstance(output, dict) and "value" in output else output


def test_a_picture_becomes_a_mesh_and_files(client, tmp_path):
    job, shown = submit(client, photo(tmp_path / "cup.png"))
    job.result()
    bars = [re.search(r'label>(\w+) <progress value="(\d+)" max="(\d+)"', str(value(s[STATUS]))) for s in shown]
    steps = [(b[1], int(b[2]), int(b[3])) for b in bars if b]
    assert {stage for stage, _, _ in steps} == {"orbit", "fit", "surface", "texture"}
    assert [done for stage, done, _ in steps if stage == "fit"][-1] == FIT.steps
    last = shown[-1]
    assert value(last[STATUS]) == "Done"
    with zipfile.ZipFile(value(last[EVERYTHING])) as archive:
        names = set(archive.namelist())
        glb = archive.read("mesh.glb")
        assert b'"seed": 3' in archive.read("manifest.json")
    assert {"images/0000.png", "sparse/0/images.txt", "orbit.mp4", "splats.ply", "report.html"} <= names
    files = {path.replace("\\", "/").rsplit("/", 1)[-1]: path for path in value(last[FILES])}
    assert set(files) == {name for name in names if "/" not in name}
    with open(files["mesh.glb"], "rb") as file:
        assert file.read() == glb
    mesh = next(value(s[MESH]) for s in shown if value(s[MESH]) and str(value(s[MESH])).endswith(".glb"))
    assert len(trimesh.load(mesh, force="mesh").faces) > 50
    gif = next(value(s[ORBIT]) for s in shown if value(s[ORBIT]) and str(value(s[ORBIT])).endswith(".gif"))
    with Image.open(gif) as moving:
        assert moving.n_frames == 21
        first = np.asarray(moving.convert("RGB")).astype(int)
        moving.seek(10)
        assert np.abs(np.asarray(moving.convert("RGB")) - first).max() > 20


def test_a_user_error_is_told(client, tmp_path):
    from gradio_client.exceptions import AppError

    job, _ = submit(client, photo(tmp_path / "empty.png", object_there=False))
    with pytest.raises(AppError, match="no object"):
        job.result()


def test_names_are_escaped():
    pytest.importorskip("gradio", reason="the extra gradio is not installed")
    from sv3d_fast.frontends.gradio import bar

    assert bar(Progress("<b>", 1, 2)) == '<label>&lt;b&gt; <progress value="1" max="2"></progress></label>'
