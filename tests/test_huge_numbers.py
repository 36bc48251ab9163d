"""Numbers that no network, camera or setting has, at every place of every file that holds some: a line, or a value."""

import copy
import json
import math

import pytest
import torch
import yaml
from test_triposr_weights import TINY
from tiny_sv3d import config

from sv3d_fast.camera import Orbit
from sv3d_fast.model.folder_config import CLASSES, JSONFile, check_index, configure, folder_files
from sv3d_fast.orbit_io import load_orbit, save_orbit
from sv3d_fast.poses import read_orbit
from sv3d_fast.triposr.config import config_yaml, read_config
from sv3d_fast.video import OrbitVideo

EXTREMES = [10**400, -(10**400), 2**62, 10**9, 0, -1, 1e308, 5e-324, math.inf, math.nan, True, None, "x", [], [10**400],
            {}, {"x": 10**400}]  # fmt: skip


def places(value, at=()):
    """The way to everything in a document."""
    yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from places(part, (*at, key))


def changed(document, at, value):
    if not at:
        return value
    document = copy.deepcopy(document)
    inside = document
    for key in at[:-1]:
        inside = inside[key]
    inside[at[-1]] = value
    return document


def try_all(document, read, *, least):
    """Reads the document with each extreme at each place: it is taken, or refused in one line."""
    refused = 0
    for at in places(document):
        for value in EXTREMES:
            said = ""
            try:
                read(changed(document, at, value))
            except ValueError as error:
                said, refused = str(error), refused + 1
            except Exception as error:
                raise AssertionError(f"{at} = {str(value)[:40]}: {error!r}") from error
            assert len(said.splitlines()) <= 1, (at, value)
    assert refused >= least


@pytest.mark.parametrize("name", ["model_index.json", *(f"{name}/config.json" for name in CLASSES)])
def test_a_models_folder(tmp_path, name):
    files = folder_files(config(), True, "a notice")

    def read(document):
        if not isinstance(document, dict):
            return
        parts = files | {name: document}
        check_index(JSONFile(tmp_path, parts["model_index.json"]))
        configure(*(JSONFile(tmp_path, parts[f"{part}/config.json"]) for part in CLASSES))

    try_all(files[name], read, least=20)


def test_triposrs_configuration(tmp_path):
    path = tmp_path / "config.yaml"

    def read(document):
        path.write_text(yaml.safe_dump(document))
        read_config(path)

    try_all(yaml.safe_load(config_yaml(TINY)), read, least=200)


def test_cameras_of_nerfstudio(tmp_path):
    frames = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
    save_orbit(OrbitVideo(frames, Orbit.static(10, 3), torch.ones(3, 8, 8)), tmp_path)
    path = tmp_path / "transforms.json"
    whole = json.loads(path.read_text())

    def read(document):
        path.write_text(json.dumps(document))
        load_orbit(tmp_path)

    try_all(whole, read, least=300)


def test_poses():
    poses = [{"elevation": 5.0, "azimuth": float(a)} for a in (120, 240, 0)]
    try_all(poses, lambda p: read_orbit(frames=None, default_frames=3, poses=p), least=20)


def test_radians():
    angles = [2.0, 4.0, 0.0]
    try_all(
        [[1.5] * 3, angles],
        lambda p: isinstance(p, list) and len(p) == 2 and read_orbit(
            frames=None, default_frames=3, polars_rad=p[0], azimuths_rad=p[1]
        ),
        least=20,
    )  # fmt: skip
