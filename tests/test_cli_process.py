"""The command line as whole processes: nobody reads the output, and a run that is interrupted and goes on."""

import json
import os
import signal
import subprocess

import pytest
import trimesh
from command_line import COMMAND
from PIL import Image, ImageDraw
from small_run import PLAN


@pytest.mark.parametrize(("arguments", "status"), [(["info"], 141), (["--help"], 0)])  # argparse passes over it
def test_nobody_reads_the_output(arguments, status):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, *arguments], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == status
    assert done.stderr == ""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Everything with the embedded model and its own settings, interrupted once on the way."""
    folder = tmp_path_factory.mktemp("whole")
    image = Image.new("RGBA", (128, 128))
    draw = ImageDraw.Draw(image)
    draw.polygon([(40, 30), (88, 30), (96, 104), (32, 104)], fill=(180, 120, 60, 255))
    draw.rectangle((48, 52, 80, 84), fill=(240, 230, 200, 255))
    image.save(folder / "photo.png")
    command = [*COMMAND, "run", folder / "photo.png", "-o", folder / "out"]

    def heed_interrupts():  # a job that a shell started in the background inherits SIGINT as ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=heed_interrupts) as process:
        for line in process.stderr:
            if line.startswith("orbit "):
                break
        else:
            pytest.fail("the orbit was not finished")
        process.send_signal(signal.SIGINT)
        stopped = process.stderr.read()
        status = process.wait()
    frames = {p.name: p.read_bytes() for p in (folder / "out" / "images").iterdir()}
    done = subprocess.run(command, capture_output=True, text=True)
    return folder / "out", (status, stopped), done, frames


@pytest.mark.slow
def test_an_interrupted_process_ends_cleanly(whole):
    _, (status, stopped), *_ = whole
    assert status == 130
    assert "Traceback" not in stopped
    assert stopped.splitlines()[-1].startswith("sv3d-fast: interrupted")


@pytest.mark.slow
def test_the_whole_run_ends_with_every_file(whole):
    folder, _, done, frames = whole
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "orbit    taken from the earlier run"
    assert all(line.strip() and "\r" not in line for line in lines)
    assert {p.name for p in folder.iterdir()} == {"manifest.json", *(n for names in PLAN.values() for n in names)}
    assert {p.name: p.read_bytes() for p in (folder / "images").iterdir()} == frames
    assert done.stdout.startswith(f"{folder / 'mesh.glb'}: ")
    mesh = trimesh.load(folder / "mesh.glb", force="mesh", process=False)
    assert mesh.visual.material.baseColorTexture.size == (1024, 1024)
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    assert mesh.is_watertight
    figures = json.loads((folder / "manifest.json").read_text())["figures"]
    assert figures["PSNR of the splats against the frames (dB)"] > 20
    assert figures["Faces"] == len(mesh.faces) <= 20_000
