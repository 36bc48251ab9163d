"""Visual hulls against shapes whose inside is known."""

import math
from functools import cache

import pytest
import torch
from analytic_scene import ASYMMETRIC, Box, Sphere, contains, render

from sv3d_fast.camera import Orbit
from sv3d_fast.scene.hull import (
    Hull,
    azimuth_scores,
    consistency,
    estimate_elevation,
    silhouette_iou,
    surface_points,
    view_half_extent,
    visual_hull,
)

ELEVATION = 15.0


@cache
def seen(shapes=ASYMMETRIC, size=96):
    return render(shapes, Orbit.static(ELEVATION), size)


def inside(hull, shapes):
    c = hull.centers()
    return contains(shapes, torch.stack(torch.meshgrid(c, c, c, indexing="ij"), -1))


def test_the_cube_is_what_the_cameras_see_at_the_origin():
    assert view_half_extent(Orbit.static()) == pytest.approx(0.6076, abs=1e-4)
    hull = visual_hull(seen().alpha, seen().orbit, 33)
    assert hull.voxel == pytest.approx(2 * 0.6076 / 33, abs=1e-4)


@pytest.mark.parametrize("resolution", [33, 96])
def test_it_contains_the_object(resolution):
    video = seen()
    hull = visual_hull(video.alpha, video.orbit, resolution)
    assert not (inside(hull, ASYMMETRIC) & ~hull.occupancy).any()


def test_it_is_tight_around_a_sphere_and_ends_at_the_tangent_cones():
    sphere = (Sphere((0.05, -0.1, 0.02), 0.3, (0.5, 0.2, 0.2)),)
    video = seen(sphere, 128)
    hull = visual_hull(video.alpha, video.orbit, 64, tolerance=0)
    truth = inside(hull, sphere)
    assert not (truth & ~hull.occupancy).any()
    assert (truth & hull.occupancy).sum() / (truth | hull.occupancy).sum() > 0.85
    # half the horizontal width at the sphere's own height is the sphere's radius, within a voxel and a half
    row = hull.occupancy[:, :, int((0.02 / hull.half_extent + 1) * 32)].any(1).sum()
    assert float(row) * hull.voxel / 2 == pytest.approx(0.3, abs=1.5 * hull.voxel)


def test_skipping_blocks_changes_no_voxel():
    video = seen(size=48)
    hull = visual_hull(video.alpha, video.orbit, 30, tolerance=1, dilation=0.5)
    c = hull.centers().double()
    points = torch.cartesian_prod(c, c, c)
    outside = torch.zeros(len(points), dtype=torch.long)
    views, f = video.orbit.world_to_camera().double(), video.orbit.focal(48)
    mask = video.alpha >= 0.25
    sure_in = torch.zeros_like(outside)
    for view, m in zip(views, mask, strict=True):
        p = points @ view[:3, :3].T + view[:3, 3]
        x, y = (p[:, :2] / p[:, 2:] * f + 24).unbind(-1)
        near = torch.nn.functional.max_pool2d(m[None].float(), 5, 1, 2)[0] > 0  # within two pixels of the mask
        deep = torch.nn.functional.max_pool2d(1 - m[None].float(), 3, 1, 1)[0] == 0  # a pixel inside it
        x, y = x.floor().long().clamp(0, 47), y.floor().long().clamp(0, 47)
        outside += ~near[y, x]
        sure_in += deep[y, x]
    occupied = hull.occupancy.flatten()
    assert occupied[sure_in >= len(mask) - 1].all()
    assert not occupied[outside > 1].any()


def test_tolerance_keeps_what_one_view_denies():
    video = seen()
    alpha = video.alpha.clone()
    alpha[4] = 0
    with pytest.raises(ValueError, match="empty hull"):
        visual_hull(alpha, video.orbit, 32, tolerance=0)
    hull = visual_hull(alpha, video.orbit, 48, tolerance=1)
    assert not (inside(hull, ASYMMETRIC) & ~hull.occupancy).any()


def test_an_object_cut_off_by_the_frame_is_not_carved_there():
    wide = (Box((0.0, 0.0, 0.0), (0.1, 0.1, 0.7), (0.3, 0.3, 0.3)),)
    video = render(wide, Orbit.static(0), 64)
    hull = visual_hull(video.alpha, video.orbit, 48)
    column = hull.occupancy[24, 24]
    assert column.all()


def test_surface_points_lie_on_the_surface_and_their_normals_point_out():
    sphere = (Sphere((0.0, 0.0, 0.0), 0.3, (0.5, 0.2, 0.2)),)
    video = seen(sphere, 128)
    hull = visual_hull(video.alpha, video.orbit, 64)
    points, normals = surface_points(hull, 2000, torch.Generator().manual_seed(1))
    assert points.shape == normals.shape == (2000, 3)
    assert hull.sample(points).abs().max() < 0.2 * hull.voxel
    assert torch.allclose(normals.norm(dim=-1), torch.ones(2000), atol=1e-5)
    assert (hull.sample(points + hull.voxel * normals) < 0).float().mean() > 0.99
    seen_from_side = points[:, 2].abs() < 0.15  # the poles are cones
    assert ((normals * points / 0.3).sum(-1)[seen_from_side] > 0.95).float().mean() > 0.99
    again, _ = surface_points(hull, 2000, torch.Generator().manual_seed(1))
    assert torch.equal(points, again)
    assert len(surface_points(hull, 1)[0]) == 1
    assert (surface_points(hull, 100_000)[0].abs() <= hull.half_extent).all()


def test_silhouettes_agree_with_the_masks_and_an_empty_mask_counts_zero():
    video = seen()
    hull = visual_hull(video.alpha, video.orbit, 96)
    assert silhouette_iou(hull, video.alpha, video.orbit).min() > 0.88
    assert silhouette_iou(hull, torch.zeros_like(video.alpha), video.orbit).max() == 0


def test_turning_the_wrong_way_lowers_the_score():
    given, other = azimuth_scores(seen().alpha, seen().orbit)
    assert given > other + 0.05
    back, forth = azimuth_scores(seen().alpha, Orbit(seen().orbit.elevations, -seen().orbit.azimuths))
    assert (back, forth) == pytest.approx((other, given), abs=1e-6)


@pytest.mark.parametrize("guess", [9.0, 22.0])
def test_the_elevation_is_found(guess):
    elevation, score = estimate_elevation(seen().alpha, Orbit.static(guess))
    assert elevation == pytest.approx(ELEVATION, abs=2)
    assert score > consistency(seen().alpha, Orbit.static(guess))


def test_bad_inputs_are_named():
    video = seen()
    with pytest.raises(ValueError, match="alpha: expected"):
        visual_hull(video.alpha[:3], video.orbit)
    with pytest.raises(ValueError, match="tolerance"):
        visual_hull(video.alpha, video.orbit, tolerance=21)
    with pytest.raises(ValueError, match="empty hull"):
        visual_hull(torch.zeros_like(video.alpha), video.orbit, 16)
    with pytest.raises(ValueError, match="one elevation"):
        estimate_elevation(video.alpha, Orbit.sine())
    with pytest.raises(ValueError, match="count"):
        surface_points(visual_hull(video.alpha, video.orbit, 16), 0)
    with pytest.raises(ValueError, match="field"):
        Hull(torch.ones(2, 2, 2) > 0, torch.ones(2, 2, 3), math.pi)
