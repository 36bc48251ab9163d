"""Registration by splines: against displacements that are known in closed form."""

import math

import pytest
import torch

from sv3d_fast.scene.flow import KNOTS, field, registered, resampled, spline


def positions(size):
    """(2, S, S) x and y of pixel centres, in parts of the side."""
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"))


def pattern(at):
    """(3, ...) smooth colours of places (2, ...)."""
    x, y = at
    waves = [torch.sin(a * x + b * y + c) for a, b, c in ((19, 5, 0), (-8, 21, 1), (13, -15, 2))]
    return 0.5 + 0.3 * torch.stack(waves)


def sway(at, amount):
    """(2, ...) a displacement of up to `amount` that turns and grows smoothly."""
    x, y = at
    return amount * torch.stack([torch.sin(3 * y + x), torch.cos(4 * x - 2 * y)])


@pytest.mark.parametrize("size", [37, 64])
def test_a_known_displacement_is_found(size):
    at, amount = positions(size), 2.5 / size
    goal, frame = pattern(at)[None].float(), pattern(at - sway(at, amount))[None].float()
    knots, _ = registered(goal, frame)
    found = field(knots, size)[0].double()
    true = sway(at + found, amount)  # where the frame shows what the goal has at each pixel
    inside = (slice(None), slice(4, -4), slice(4, -4))
    assert (found - true)[inside].norm(dim=0).mean() * size < 0.15
    before, after = ((goal - f)[0][inside].square().mean() for f in (frame, resampled(frame, found[None].float())))
    assert after < 0.02 * before


def test_each_picture_has_its_own_displacement_and_equal_ones_have_none():
    at = positions(40)
    goal = pattern(at).float()[None].repeat(3, 1, 1, 1)
    frames = torch.stack([pattern(at - step).float() for step in (0.0, 1.5 / 40, -1.0 / 40)])
    found = 40 * field(registered(goal, frames)[0], 40)[..., 8:-8, 8:-8]
    for displacement, step in zip(found, (0.0, 1.5, -1.0), strict=True):
        assert (displacement - step).abs().max() < 0.25
    assert found[0].abs().max() < 1e-3


@pytest.mark.parametrize("size", [1, 3, 21])
def test_pictures_without_contrast_stay_in_place(size):
    flat = torch.full((2, 4, size, size), 0.3)
    knots, metric = registered(flat, flat + 0.2)
    assert knots.shape == (2, 2, KNOTS, KNOTS)
    assert knots.abs().max() < 1e-6
    assert metric.shape == (2, 2, 2, size, size)


def test_the_metric_tells_along_which_axis_a_picture_resists():
    x, _ = positions(32)
    stripes = (0.5 + 0.4 * torch.sin(40 * x)).float()[None, None]
    (xx, xy), (yx, yy) = registered(stripes, stripes)[1][0]
    assert xx.mean() > 1
    assert max(v.abs().max() for v in (xy, yx, yy)) < 1e-3


def test_splines_add_up_to_one_and_reach_both_ends():
    weights = spline(torch.linspace(0, 1, 97))
    assert weights.shape == (97, KNOTS)
    assert (weights.sum(1) - 1).abs().max() < 1e-5
    assert (weights >= 0).all()
    assert ((weights > 0).sum(1) <= 4).all()
    line = (torch.arange(KNOTS) - 1.0) / (KNOTS - 3)
    assert (spline(torch.linspace(0, 1, 97)) @ line - torch.linspace(0, 1, 97)).abs().max() < 1e-5


def test_resampling_by_whole_pixels_shifts():
    picture = torch.rand(2, 3, 11, 11, generator=torch.Generator().manual_seed(0))
    by = torch.zeros(2, 2, 11, 11)
    by[0, 0], by[1, 1] = 2 / 11, -1 / 11
    moved = resampled(picture, by)
    assert (moved[0, :, 2:-2, 2:-4] - picture[0, :, 2:-2, 4:-2]).abs().max() < 1e-5
    assert (moved[1, :, 3:-2, 2:-2] - picture[1, :, 2:-3, 2:-2]).abs().max() < 1e-5
    assert math.isclose(float(resampled(picture, torch.zeros_like(by)).sum()), float(picture.sum()), rel_tol=1e-5)
