"""Frames that disagree with the splats of all of them: what is moved, and what stays."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from analytic_scene import ASYMMETRIC, render

from sv3d_fast.camera import Orbit
from sv3d_fast.scene import align
from sv3d_fast.scene import fit as fit_module
from sv3d_fast.scene.align import displacements, moved, straightened
from sv3d_fast.scene.fit import FitConfig, fit
from sv3d_fast.scene.flow import KNOTS, field, prior, spline
from sv3d_fast.scene.metrics import psnr
from sv3d_fast.scene.splats import Splats
from sv3d_fast.video import OrbitVideo

SIZE, ORBIT = 56, Orbit.sine(10, 25, 12)


@cache
def ball(shift=(0.0, 0.0, 0.0)):
    """Coloured discs all over a sphere of radius 0.35."""
    generator = torch.Generator().manual_seed(0)
    count = 1500
    normals = F.normalize(torch.randn(count, 3, generator=generator), dim=1)
    x, y, z = normals.unbind(1)
    quats = F.normalize(torch.stack([1 + z, -y, x, torch.zeros_like(z)], 1), dim=1)
    colors = 0.5 + 0.4 * torch.sin(normals @ torch.tensor([[9.0, 2, 1], [1, 8, 3], [3, 1, 10]]))
    scales = torch.tensor([0.025, 0.025, 0.005]).log().repeat(count, 1)
    return Splats(0.35 * normals + torch.tensor(shift), quats, scales, torch.full((count,), 3.0), colors)


def seen(splats):
    """The frames (T, S, S, 3) on white and masks (T, S, S, 1) of splats."""
    rgb, alpha = fit_module.render(splats, ORBIT, SIZE)
    return rgb.clamp(0, 1), alpha[..., None]


def random_knots(pixels):
    """Of displacements whose root mean square is `pixels` in frames of SIZE."""
    coarse = torch.randn(len(ORBIT), 2, 4, 4, generator=torch.Generator().manual_seed(5))
    knots = F.interpolate(coarse, (KNOTS, KNOTS), mode="bicubic", align_corners=True)
    return knots * (pixels / SIZE / field(knots, SIZE).square().mean().sqrt())


def size_of(knots, alpha):
    """Root mean square of the displacements of the object, pixels."""
    return float((SIZE * field(knots, SIZE)).square().sum(1)[alpha[..., 0] > 0.5].mean().sqrt())


def test_warped_frames_come_back_to_what_the_splats_show():
    images, alpha = seen(ball())
    warped, covers = moved(images, alpha, random_knots(0.8))
    knots = displacements(warped, covers, ball(), ORBIT, SIZE)
    straight, cover = moved(warped, covers, knots)
    assert size_of(knots, alpha) > 0.6
    assert psnr(straight, images) > psnr(warped, images) + 5
    assert (cover - alpha).abs().mean() < 0.55 * (covers - alpha).abs().mean()


def test_what_a_motion_of_the_splats_explains_moves_no_frame():
    images, alpha = seen(ball())
    aside = ball((0.012, -0.01, 0.012))  # more than a pixel
    assert size_of(displacements(images, alpha, aside, ORBIT, SIZE), alpha) < 0.12
    assert size_of(displacements(images, alpha, ball(), ORBIT, SIZE), alpha) < 0.01


def test_knots_are_those_of_the_whole_system_of_equations(monkeypatch):
    """Against the dense normal equations of knots and motions together, float64."""
    monkeypatch.setattr(align, "TURNS", 400)
    generator = torch.Generator().manual_seed(2)
    views, count = 4, 30
    x, y = spline(torch.rand(views, count, 2, generator=generator, dtype=torch.float64)).unbind(2)
    basis = (y[..., :, None] * x[..., None, :]).flatten(2)
    found = torch.randn(views, count, 2, generator=generator, dtype=torch.float64)
    motion = torch.randn(views, count, 2, 3, generator=generator, dtype=torch.float64)
    root = torch.randn(views, count, 2, 2, generator=generator, dtype=torch.float64)
    weight = 100 * root @ root.mT + torch.eye(2)
    own = align._own(found, basis, weight, motion)

    knots = basis.shape[-1]
    design = torch.zeros(views, count, 2, views * 2 * knots + 3 * count, dtype=torch.float64)
    for view in range(views):
        for axis in range(2):
            start = (2 * view + axis) * knots
            design[view, :, axis, start : start + knots] = basis[view]
        for splat in range(count):
            start = views * 2 * knots + 3 * splat
            design[view, splat, :, start : start + 3] = motion[view, splat]
    weighed = torch.einsum("tnab,tnbk->tnak", weight, design).flatten(0, 2)
    resistance = torch.einsum("tnac,tnab,tnbd->ncd", motion, weight, motion)
    ridge = align.RIDGE * resistance.diagonal(dim1=1, dim2=2).mean() * torch.eye(3 * count)
    held = torch.block_diag(*[prior(torch.device("cpu"))] * views, ridge)
    flat = design.flatten(0, 2)
    expected = torch.linalg.solve(flat.T @ weighed + held, weighed.T @ found.flatten())[: views * 2 * knots]
    torch.testing.assert_close(own.flatten(), expected, rtol=1e-5, atol=1e-6)


def test_exposure_moves_nothing():
    images, alpha = seen(ball())
    gains = 1 + 0.15 * torch.rand(len(ORBIT), 1, 1, 3, generator=torch.Generator().manual_seed(1))
    darker = images / gains + (1 - alpha) * (1 - 1 / gains)
    assert size_of(displacements(darker, alpha, ball(), ORBIT, SIZE), alpha) < 0.02


def test_large_frames_are_moved_by_what_smaller_ones_tell():
    images, alpha = seen(ball())
    warped, covers = moved(images, alpha, random_knots(0.8))
    coarse = displacements(warped, covers, ball(), ORBIT, SIZE // 2)
    straight, _ = moved(warped, covers, coarse)
    assert psnr(straight, images) > psnr(warped, images) + 3


def test_a_video_keeps_its_cameras_and_gets_masks():
    images, alpha = seen(ball())
    frames = (images * 255).round().to(torch.uint8)
    video = straightened(OrbitVideo(frames, ORBIT), ball())
    assert video.orbit is ORBIT
    assert video.alpha.shape == frames.shape[:3]
    assert (video.alpha - alpha[..., 0]).abs().mean() < 0.02
    assert (video.frames.float() - frames.float()).abs().mean() < 1.5
    with pytest.raises(ValueError, match="all background"):
        straightened(OrbitVideo(torch.full_like(frames, 255), ORBIT), ball())


def test_a_fit_of_warped_frames_shows_the_object_as_it_is():
    orbit, between = Orbit.sine(10, 25), Orbit(torch.tensor([0.0, 15.0, 25.0]), torch.tensor([8.0, 98.0, 197.0]))
    true = render(ASYMMETRIC, orbit, 48)
    knots = random_knots(1.0)[torch.arange(21) % 12] * torch.where(torch.arange(21) < 12, 1, -1)[:, None, None, None]
    images, alpha = moved(true.colors(), true.alpha[..., None], knots)
    warped = OrbitVideo((images * 255).round().to(torch.uint8), orbit, alpha[..., 0])
    unseen = render(ASYMMETRIC, between, 48).colors()
    found = {}
    for alignments in (0, 7):
        splats = fit(warped, config=FitConfig(48, 800, 200, 1, lr_means=0.6, alignments=alignments))
        found[alignments] = psnr(fit_module.render(splats, between, 48)[0].clamp(0, 1), unseen)
    assert found[7] > found[0] + 0.5
