"""Poses as users write them, and everything that can be wrong with them."""

import json

import pytest
import torch
from tiny_sv3d import even_turn

from sv3d_fast import Orbit
from sv3d_fast.orbit_stage import make_orbit
from sv3d_fast.poses import read_orbit
from sv3d_fast.settings import Settings

POSE = {"elevation": 0, "azimuth": 0}
COMFY = [{"elevation": 0, "azimuth": 18 * k} for k in range(21)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"poses": COMFY}, "first and the last are both at azimuth 0"),
        ({"poses": [{"elevation": 0, "azimuth": a} for a in (10, 90, 200)]}, "first or last, got 10 and 200"),
        ({"poses": []}, "poses: expected a list"),
        ({"poses": "static"}, "poses: expected a list"),
        ({"poses": [POSE, 3]}, r"poses\[1\]"),
        ({"poses": [{"elevation": 0}]}, r"poses\[0\]"),
        ({"poses": [POSE | {"azimuth": "east"}]}, r"poses\[0\]: azimuth"),
        ({"poses": [POSE | {"azimuth": float("nan")}]}, "finite"),
        ({"poses": [POSE | {"elevation": 90}]}, "elevations"),
        ({"poses": even_turn(), "elevation": 3}, "poses, elevation"),
        ({"polars_rad": [1.5], "azimuths_rad": [0.0], "orbit": Orbit.static()}, "expected one of them"),
        ({"polars_rad": [1.5] * 3}, "azimuths_rad"),
        ({"polars_rad": [1.5] * 3, "azimuths_rad": [1.0, 0.0]}, "same number"),
        ({"polars_rad": [[1.5]], "azimuths_rad": [[0.0]]}, "polars_rad"),
        ({"polars_rad": ["a"], "azimuths_rad": [0.0]}, "polars_rad"),
        ({"orbit": even_turn()}, "Orbit"),
        ({"orbit": Orbit.static(), "frames": 5}, "num_frames: expected 21"),
        ({"frames": 0}, "num_frames"),
    ],
)
def test_cameras_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message) as info:
        read_orbit(**{"frames": None, "default_frames": 21} | arguments)
    assert "\n" not in str(info.value)


def test_a_single_frame_and_whole_turns_off():
    orbit, shift = read_orbit(frames=None, default_frames=21, poses=[POSE | {"azimuth": -720.001}])
    assert (len(orbit), shift) == (1, 0)
    orbit, shift = read_orbit(
        frames=3, default_frames=21, poses=[{"elevation": 4, "azimuth": a} for a in (360, 480, -120)]
    )
    assert shift == 1
    assert torch.allclose(orbit.azimuths, torch.tensor([120.0, 240.0, 0.0]))


@pytest.mark.parametrize("first_view", [True, False])
def test_poses_from_a_file(tmp_path, first_view):
    azimuths = [0, 90, 180, 270] if first_view else [90, 180, 270, 0]
    path = tmp_path / "poses.json"
    path.write_text(json.dumps([{"elevation": a / 10, "azimuth": a} for a in azimuths]))
    orbit = make_orbit(Settings(orbit=path))
    assert orbit.azimuths.tolist() == [90, 180, 270, 0]
    assert orbit.elevations.tolist() == [9, 18, 27, 0]
