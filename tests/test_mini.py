"""The embedded model as it ships: what it weighs, and that it turns an object it is shown."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sv3d_fast.mini
from sv3d_fast.camera import Orbit
from sv3d_fast.events import finish
from sv3d_fast.generation import generating
from sv3d_fast.image import load_subject
from sv3d_fast.mini.config import MINI
from sv3d_fast.mini.geometry import fit_to_frame, shade_smoothly
from sv3d_fast.mini.pack import Object
from sv3d_fast.mini.scenes import Stage
from sv3d_fast.mini.shapes import make_shape
from sv3d_fast.model.weights import load_model

WEIGHTS = Path(sv3d_fast.mini.__file__).parent / "weights"
OBJECT_BELOW = 230  # of 255, in any channel: the object, not the white around it


@pytest.fixture(scope="module")
def model():
    return load_model(WEIGHTS)


@pytest.fixture(scope="module")
def table():
    """(RGBA picture, truth (21, 128, 128, 3) uint8) of a long table seen from its broad side, elevation 10."""
    shape = make_shape(np.random.default_rng(5), "table")
    vertices, faces, normals = shade_smoothly(fit_to_frame(shape.vertices), shape.faces)
    thing = Object("", "", "", "", "", "", "train", vertices, faces, shape.uvs, shape.texture, normals)
    views = Stage([thing], 128, torch.device("cpu")).standard([0], Orbit.static(10.0))
    rgb, alpha = views.frames[0, -1].numpy(), views.alpha[0, -1].numpy()
    return Image.fromarray(np.dstack([rgb, alpha])), views.frames[0]


@pytest.fixture(scope="module")
def made(model, table):
    image = load_subject(table[0], size=MINI.image_size).image.permute(2, 0, 1)[None] * 2 - 1
    return finish(generating(model, image, [Orbit.static(10.0)], model.config.sampler, [0], chunk=21))[0]


def silhouettes(frames):
    return frames.amin(-1) < OBJECT_BELOW


def test_loads_without_a_network_as_it_is_configured(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the embedded model reached for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    loaded = load_model(str(WEIGHTS))
    assert loaded.config == MINI
    assert loaded.notice is None


def test_weighs_little():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 28e6
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


def test_knows_poses(model):
    assert model.config.unet.variant == "p"
    assert model.config.frames == 21


def test_orbit_shows_the_object_in_every_frame(made):
    assert made.shape == (21, 128, 128, 3)
    share = silhouettes(made).float().mean((1, 2))
    assert float(share.min()) > 0.02
    assert float(share.max()) < 0.9


def width(mask):
    """Columns of a frame that hold some of the object."""
    return int((mask.sum(0) > 2).sum())


def test_a_broad_object_is_narrow_from_its_sides_and_broad_from_its_back(made, table):
    masks, truth = silhouettes(made), silhouettes(table[1])
    assert width(truth[4]) < 0.75 * width(truth[-1])
    for side in (4, 15):  # about 90 degrees to either side of the input view
        assert width(masks[side]) < 0.85 * width(masks[-1])
        assert float((masks[side] & masks[-1]).sum() / (masks[side] | masks[-1]).sum()) < 0.8
    for back in (9, 10):
        assert width(masks[back]) > 0.85 * width(masks[-1])


def test_frames_next_to_the_input_resemble_it(made):
    error = (made.float() - made[-1].float()).square().mean((1, 2, 3))
    assert float(error[[0, 19]].mean()) < float(error[[4, 15]].mean())


def test_background_is_white(made):
    corners = torch.stack([made[:, y, x] for y in (0, -1) for x in (0, -1)]).float()
    assert float(corners.mean()) > 240
