"""The bend of a surface, on images made without the rasteriser and on rendered discs."""

import pytest
import torch
import torch.nn.functional as F

from sv3d_fast.camera import Orbit
from sv3d_fast.scene.shape_terms import bend, shape_channels, third_axes

SIZE, FOCAL, MIDDLE = 33, 40.0, 2.0


def plane_image(normal, through=(0.0, 0.0, 2.0)):
    """(1, S, S, 5) what an opaque plane through a point, with a unit normal in camera axes, renders as."""
    normal = F.normalize(torch.tensor(normal), dim=0)
    pixel = (torch.arange(SIZE) + 0.5 - SIZE / 2) / FOCAL
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], -1)
    depth = (torch.tensor(through) @ normal) / (rays @ normal)
    shape = torch.ones_like(depth), depth - MIDDLE, *normal.expand(SIZE, SIZE, 3).unbind(-1)
    return torch.stack(shape, -1)[None]


@pytest.mark.parametrize("normal", [(0.0, 0.0, -1.0), (0.5, -0.3, -0.8), (-0.7, 0.0, -0.7)])
def test_a_plane_with_its_own_normals_is_not_bent(normal):
    assert float(bend(plane_image(normal), FOCAL, MIDDLE)) == pytest.approx(0, abs=1e-4)


def test_turned_normals_cost_one_minus_their_cosine():
    image = plane_image((0.0, 0.0, -1.0))
    angle = torch.tensor(0.6)
    image[..., 2:] = torch.stack([angle.sin(), torch.tensor(0.0), -angle.cos()])
    inner = (SIZE - 2) ** 2 / SIZE**2  # pixels with neighbours on all sides
    assert float(bend(image, FOCAL, MIDDLE)) == pytest.approx(inner * float(1 - angle.cos()), rel=1e-3)


def test_pixels_beside_empty_ones_do_not_count():
    image = plane_image((0.0, 0.0, -1.0))
    image[..., 4] = 1.0  # away from the camera: as wrong as can be
    whole = float(bend(image, FOCAL, MIDDLE))
    image[:, :, 16:] = 0
    half = float(bend(image, FOCAL, MIDDLE))
    assert whole == pytest.approx(2 * 31 * 31 / SIZE**2, rel=1e-4)
    assert half == pytest.approx(2 * 31 * 14 / SIZE**2, rel=1e-4)


def test_gradients_turn_normals_towards_the_depth():
    image = plane_image((0.0, 0.0, -1.0))
    image[..., 2:] = F.normalize(torch.tensor([0.3, 0.0, -1.0]), dim=0)
    image.requires_grad_()
    bend(image, FOCAL, MIDDLE).sum().backward()
    assert image.grad[0, 16, 16, 4] > 0  # less of -z costs more
    assert image.grad.isfinite().all()


def test_channels_of_discs_are_in_camera_axes_and_leave_out_those_that_face_away():
    orbit = Orbit.static(0.0, 4).select([3])  # at azimuth 0: looks along -x
    means = torch.tensor([[0.3, 0.1, 0.0], [-0.3, 0.0, 0.2]])
    normals = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    channels = shape_channels(means, normals, orbit.world_to_camera(), orbit.radius)
    assert channels.shape == (1, 2, 5)
    assert channels[0, 0].tolist() == pytest.approx([1, -0.3, 0, 0, -1], abs=1e-5)
    assert not channels[0, 1].any()


def test_third_axes_are_those_of_rotations_of_any_length():
    half = torch.tensor(0.5).sqrt()
    quats = torch.stack(
        [torch.tensor([2.0, 0, 0, 0]), 3 * torch.tensor([half, half, 0, 0])]
    )  # none; 90 degrees about x
    assert torch.allclose(third_axes(quats), torch.tensor([[0.0, 0, 1], [0, -1, 0]]), atol=1e-6)
