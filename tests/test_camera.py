"""Orbit: where the cameras stand, what they see, and what is refused."""

import json
import math

import pytest
import torch

from sv3d_fast.camera import Orbit


def projected(orbit, size, point):
    """Pixel (T, 2) of a world point, by the matrices."""
    views, intrinsics = orbit.world_to_camera().double(), orbit.intrinsics(size).double()
    position = views[:, :3, :3] @ torch.tensor(point, dtype=torch.float64) + views[:, :3, 3]
    pixel = (intrinsics @ position[..., None])[..., 0]
    return pixel[:, :2] / pixel[:, 2:]


def test_cameras_stand_counter_clockwise_around_the_vertical_axis():
    orbit = Orbit(torch.tensor([0.0, 0.0, 30.0, -45.0]), torch.tensor([0.0, 90.0, 180.0, 270.0]))
    r, c, s = 2.0, math.cos(math.radians(30)), math.sin(math.radians(30))
    h = math.sqrt(0.5)
    expected = torch.tensor([[r, 0, 0], [0, r, 0], [-r * c, 0, r * s], [0, -r * h, -r * h]])
    torch.testing.assert_close(orbit.camera_to_world()[:, :3, 3], expected, atol=1e-6, rtol=0)


def test_matrices_are_rigid_inverse_and_look_at_the_origin():
    orbit = Orbit.sine(10.0, 30.0, 21)
    pose, view = orbit.camera_to_world().double(), orbit.world_to_camera().double()
    eye = torch.eye(4, dtype=torch.float64).expand(21, 4, 4)
    torch.testing.assert_close(pose @ view, eye, atol=1e-6, rtol=0)
    rotation = pose[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, eye[:, :3, :3], atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(21, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(view[:, :3, 3], torch.tensor([[0, 0, 2.0]]).double().expand(21, 3), atol=1e-6, rtol=0)


def test_up_is_up_and_right_is_right_in_every_picture():
    orbit, size = Orbit.sine(20.0, 30.0, 9), 101
    centre = torch.full((9, 2), size / 2, dtype=torch.float64)
    torch.testing.assert_close(projected(orbit, size, (0, 0, 0)), centre, atol=1e-4, rtol=0)
    up = projected(orbit, size, (0, 0, 0.2))
    assert (up[:, 1] < size / 2 - 1).all()
    torch.testing.assert_close(up[:, 0], centre[:, 0], atol=1e-4, rtol=0)
    front = projected(Orbit.static(10.0, 4), size, (0, 0.2, 0))[-1]  # seen from +x, +y is on the right
    assert front[0] > size / 2 + 1


def test_field_of_view_reaches_the_border():
    orbit = Orbit(torch.zeros(1), torch.zeros(1), radius=3.0, fov=50.0)
    reach = 3.0 * math.tan(math.radians(25))
    torch.testing.assert_close(projected(orbit, 64, (0, reach, -reach))[0], torch.tensor([64.0, 64.0]).double())
    matrices = orbit.intrinsics(64)
    assert matrices.shape == (1, 3, 3)
    assert matrices[0, 0, 0].item() == pytest.approx(orbit.focal(64))
    assert orbit.focal(128) == pytest.approx(2 * orbit.focal(64))


@pytest.mark.parametrize("frames", [1, 2, 7, 21])
def test_static_turn_ends_at_the_input(frames):
    orbit = Orbit.static(12.5, frames)
    assert len(orbit) == frames
    assert orbit.azimuths[-1] == 0
    expected = torch.arange(1, frames + 1).double() * 360 / frames % 360
    torch.testing.assert_close(orbit.azimuths, expected.float())
    assert orbit.elevations.tolist() == [12.5] * frames
    torch.testing.assert_close(orbit.azimuths_rad, torch.deg2rad(expected).float(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(orbit.polars_rad, torch.full((frames,), math.radians(77.5)))


def test_sine_swings_once_around_the_input_elevation():
    orbit = Orbit.sine(10.0, 30.0, 20)
    assert orbit.elevations[-1].item() == pytest.approx(10, abs=1e-4)
    assert orbit.elevations.max().item() == pytest.approx(40, abs=1e-4)
    assert int(orbit.elevations.argmax()) == 4  # a quarter of the turn
    assert orbit.elevations.min().item() == pytest.approx(-20, abs=1e-4)
    assert int(orbit.elevations.argmin()) == 14
    assert Orbit.sine(80.0, 30.0, 8).elevations.max() == 89


def test_from_poses_is_relative_to_the_last():
    poses = [{"elevation": 5, "azimuth": 350.0}, {"elevation": -5.5, "azimuth": -10}, {"elevation": 0, "azimuth": 20.0}]
    orbit = Orbit.from_poses(poses)
    torch.testing.assert_close(orbit.azimuths, torch.tensor([330.0, 330.0, 0.0]))
    assert orbit.elevations.tolist() == [5.0, -5.5, 0.0]


def test_angles_of_the_network_are_relative_and_wrapped():
    orbit = Orbit(torch.zeros(3), torch.tensor([-30.0, 400.0, 90.0]))
    torch.testing.assert_close(orbit.azimuths_rad, torch.deg2rad(torch.tensor([240.0, 310.0, 0.0])))
    assert orbit.azimuths_rad.dtype == orbit.polars_rad.dtype == torch.float32


def test_dict_round_trip_through_json():
    orbit = Orbit(torch.tensor([-12.25, 0.1]), torch.tensor([123.456, 0.0]), radius=2.5, fov=40.0)
    again = Orbit(**json.loads(json.dumps(orbit.to_dict())))
    torch.testing.assert_close(again.elevations, orbit.elevations)
    torch.testing.assert_close(again.azimuths, orbit.azimuths)
    assert (again.radius, again.fov) == (2.5, 40.0)
    turn = Orbit.sine(10.0, 30.0, 21)
    torch.testing.assert_close(Orbit(**turn.to_dict()).azimuths, turn.azimuths, atol=1e-6, rtol=1e-6)


def test_select_keeps_cameras():
    orbit = Orbit.sine(10.0, 30.0, 8)
    for index in (slice(1, 6, 2), [1, 3, 5]):
        assert torch.equal(orbit.select(index).camera_to_world(), orbit.camera_to_world()[[1, 3, 5]])


def test_lists_become_float32_tensors():
    orbit = Orbit([1, 2], torch.tensor([3, 4]))
    assert orbit.elevations.dtype == orbit.azimuths.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0], [0.0, 1.0]), "elevations and azimuths: expected the same number of frames"),
        (([], []), "at least one"),
        (([90.0], [0.0]), r"elevations: expected degrees in \(-90, 90\)"),
        (([-90.0], [0.0]), "elevations"),
        (([math.nan], [0.0]), "elevations: expected finite"),
        (([0.0], [math.inf]), "azimuths: expected finite"),
        (([0.0], [0.0], 0.0), "radius"),
        (([0.0], [0.0], math.nan), "radius"),
        (([0.0], [0.0], 2.0, 180.0), "fov"),
        (([0.0], [0.0], 2.0, 0.0), "fov"),
    ],
)
def test_what_is_no_orbit(arguments, message):
    with pytest.raises(ValueError, match=message) as info:
        Orbit(*arguments)
    assert "\n" not in str(info.value)


def test_what_are_no_poses():
    with pytest.raises(ValueError, match=r"poses\[1\]: expected the keys elevation and azimuth, got \['elevation'\]"):
        Orbit.from_poses([{"elevation": 0, "azimuth": 0}, {"elevation": 1}])
    with pytest.raises(ValueError, match="at least one"):
        Orbit.from_poses([])
