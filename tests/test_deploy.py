"""What deploy/ says is what the command line takes, and what systemd understands."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sv3d_fast.serve.settings import ServeSettings
from sv3d_fast.serve.worker import UNTRUSTED
from sv3d_fast.serve_cli import add_serve

DEPLOY = Path(__file__).parent.parent / "deploy"
UNIT, DOCKERFILE = DEPLOY / "sv3d-fast.service", DEPLOY / "Dockerfile"


def parsed(words):
    """The arguments of a command line that begins with the program."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_serve(parser.add_subparsers())
    return parser.parse_args(words[1:])


def settings_of(unit):
    return dict(line.split("=", 1) for line in unit.splitlines() if re.match(r"[A-Za-z]+=", line))


def test_the_unit():
    settings = settings_of(UNIT.read_text())
    given = parsed(shlex.split(settings["ExecStart"]))
    assert given.data_dir == Path("/var/lib") / settings["StateDirectory"]
    assert int(settings["TimeoutStopSec"]) > ServeSettings().drain + 10  # or else jobs are cut off as they end
    assert settings["RestartPreventExitStatus"] == "2" != str(UNTRUSTED)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not there")
def test_systemd_understands_the_unit(tmp_path):
    text = UNIT.read_text().replace("/opt/sv3d-fast/bin/sv3d-fast", sys.executable)
    (tmp_path / UNIT.name).write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(tmp_path / UNIT.name)], capture_output=True, text=True)
    assert (done.returncode, [line for line in done.stderr.splitlines() if UNIT.name in line]) == (0, [])


def test_the_image():
    text = DOCKERFILE.read_text()
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[1])
    given = parsed(entry)
    assert (given.host, given.data_dir) == ("0.0.0.0", Path("/data"))
    (documented,) = re.findall(r"^# docker run .* sv3d-fast (--.*)$", text, re.MULTILINE)
    assert parsed([*entry, *shlex.split(documented)]).api_key_file == Path("/data/keys")
    for port in re.findall(r"EXPOSE (\d+)|127\.0\.0\.1:(\d+)", text):
        assert int("".join(port)) == given.port
    user = re.search(r"--uid (\d+)", text)[1]
    assert f"\nUSER {user}\n" in text
