"""Fitting splats to ray-cast orbits."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from analytic_scene import ASYMMETRIC, Sphere, render

from sv3d_fast import events
from sv3d_fast.camera import Orbit
from sv3d_fast.scene import fit as fit_module
from sv3d_fast.scene.fit import FitConfig, fit, fitting, initial_splats
from sv3d_fast.scene.fit_batch import fit_batch, fitting_batch
from sv3d_fast.scene.hull import visual_hull
from sv3d_fast.scene.metrics import iou, psnr
from sv3d_fast.video import OrbitVideo

ORBIT = Orbit.static(15)
ROUND = [Sphere((0.05, 0.0, 0.0), 0.3, (0.9, 0.3, 0.2))]


@cache
def video(size=32):
    return render(ASYMMETRIC, ORBIT, size)


@pytest.fixture(scope="module")
def splats():
    return fit(video(48), count=800, steps=250)


def test_it_shows_the_frames_again(splats):
    rgb, alpha = fit_module.render(splats, ORBIT, 48)
    assert rgb.shape == (21, 48, 48, 3)
    assert alpha.shape == (21, 48, 48)
    assert psnr(rgb.clamp(0, 1), video(48).colors()) > 30
    assert iou(alpha, video(48).alpha) > 0.93


def test_it_shows_views_between_the_frames(splats):
    between = Orbit(torch.tensor([10.0, 20.0, 15.0]), torch.tensor([8.0, 98.0, 200.0]))
    truth = render(ASYMMETRIC, between, 48)
    rgb, _ = fit_module.render(splats, between, 48)
    assert psnr(rgb.clamp(0, 1), truth.colors()) > 27


def test_the_background_is_composited_behind(splats):
    views = ORBIT.select([3, 11])
    white, alpha = fit_module.render(splats, views, 20)
    black, _ = fit_module.render(splats, views, 20, 0.0)
    assert torch.allclose(white - black, (1 - alpha)[..., None].expand_as(white), atol=1e-5)
    colors = torch.tensor([[0.2, 0.4, 0.6], [1.0, 0.0, 0.5]])
    each, _ = fit_module.render(splats, views, 20, colors)
    assert torch.allclose(each, black + (1 - alpha)[..., None] * colors[:, None, None], atol=1e-5)


def test_splats_stay_flat_finite_and_in_the_hull(splats):
    for value in vars(splats).values():
        assert value.isfinite().all()
        assert not value.requires_grad
    smallest, middle, _ = splats.scales.sort(-1).values.unbind(-1)
    assert (smallest / middle).median() < 0.4
    hull = visual_hull(video(48).alpha, ORBIT, 64)
    solid = splats.opacities > 0.5
    assert (hull.sample(splats.means[solid]) > -0.05).float().mean() > 0.99


def test_a_seed_decides_and_the_global_generator_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    a, b, c = (fit(video(), count=60, steps=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    for name, value in vars(a).items():
        assert torch.equal(value, getattr(b, name)), name
    assert not torch.equal(a.means, c.means)


def test_progress_counts_the_steps_and_improves():
    seen = [e for e in fitting(video(), count=200, steps=31) if isinstance(e, events.Progress)]
    assert [(e.stage, e.done, e.total) for e in seen] == [("fit", i + 1, 31) for i in range(31)]
    assert seen[-1].figures["psnr"] > seen[0].figures["psnr"] + 2
    assert seen[-1].figures["loss"] < seen[0].figures["loss"]


def test_masks_come_from_white_where_none_are_given():
    a = fit(replace(video(), alpha=None), count=200, steps=60)
    alpha = fit_module.render(a, ORBIT, 32)[1]
    assert iou(alpha, video().alpha) > 0.85


def test_a_reversed_orbit_and_an_empty_frame_are_warned_about():
    wrong = replace(video(), orbit=Orbit(ORBIT.elevations, -ORBIT.azimuths))
    warnings = [e for e in fitting(wrong, count=20, steps=1) if isinstance(e, events.Warned)]
    assert len(warnings) == 1
    assert "other way" in warnings[0].message
    alpha = video().alpha.clone()
    alpha[[4, 9, 10]] = 0  # more than the hull tolerates
    warnings = [e for e in fitting(replace(video(), alpha=alpha), count=20, steps=1) if isinstance(e, events.Warned)]
    assert [w.message for w in warnings] == ["frames [4, 9, 10]: the mask is empty; they are left out"]
    alpha[3:] = 0
    with pytest.raises(ValueError, match="expected an object in at least 4 of 21, got it in 3"):
        fit(replace(video(), alpha=alpha), count=20, steps=1)


def test_few_frames_and_single_splats():
    four = render((Sphere((0, 0, 0), 0.3, (0.8, 0.2, 0.2)),), Orbit.static(0, 4), 17)
    assert len(fit(four, count=1, steps=1)) == 1
    with pytest.raises(ValueError, match="at least 4 frames"):
        fit(replace(four, frames=four.frames[:3], alpha=None, orbit=four.orbit.select([0, 1, 2])))
    with pytest.raises(ValueError, match="steps: expected at least one, got 0"):
        fit(four, steps=0)
    with pytest.raises(ValueError, match="count: expected at least one, got 0"):
        fit(four, count=0)
    with pytest.raises(ValueError, match="all background"):
        fit(replace(four, frames=torch.full_like(four.frames, 255), alpha=None))


def test_splats_start_flat_on_the_surface_in_the_colour_of_the_view_that_faces_them():
    sphere = render((Sphere((0, 0, 0), 0.3, (0.8, 0.2, 0.2)),), ORBIT, 64)
    hull = visual_hull(sphere.alpha, ORBIT, 64, dilation=0)
    start, spacing = initial_splats(
        hull, sphere.colors(), sphere.alpha, ORBIT, torch.Generator().manual_seed(0), FitConfig(count=500)
    )
    side = start.means[:, 2].abs() < 0.15
    assert (start.means[side].norm(dim=-1) - 0.3).abs().max() < 0.03
    w, x, y, z = start.quats.unbind(-1)
    axis = torch.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], -1)  # rotated z
    assert ((axis * start.means).sum(-1)[side] > 0.28).float().mean() > 0.98
    assert torch.allclose(start.scales[:, 2] / start.scales[:, 0], torch.full((500,), 0.2), atol=1e-4)
    assert spacing == pytest.approx((4 * torch.pi * 0.09 / 500) ** 0.5, rel=0.5)
    shade = start.colors[side] / torch.tensor([0.8, 0.2, 0.2])
    assert shade.std(-1).median() < 0.02  # red of some brightness, not white
    assert shade.max() < 1.3


def test_large_frames_are_fitted_smaller_on_a_cpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert FitConfig.of(cpu, 576).size == 256
    assert FitConfig.of(cpu, 48).size == 48
    assert FitConfig.of(gpu, 576).size == 576
    assert FitConfig.of(gpu, 576).count > FitConfig.of(cpu, 576).count
    large = fit(video(48), config=FitConfig(size=20, count=30, steps=2))
    assert len(large) == 30


@pytest.mark.gpu
def test_it_fits_on_a_gpu():
    large = render(ASYMMETRIC, ORBIT, 128)
    on_gpu = replace(large, frames=large.frames.cuda(), alpha=large.alpha.cuda())
    splats = fit(on_gpu, count=20_000, steps=500)
    rgb, _ = fit_module.render(splats, ORBIT, 128)
    assert psnr(rgb.clamp(0, 1).cpu(), large.colors()) > 32


@pytest.mark.gpu
def test_a_fit_leaves_no_memory_behind_on_a_gpu():
    on_gpu = OrbitVideo(video(48).frames.cuda(), ORBIT)
    held = []
    for _ in range(3):
        fit(on_gpu, count=2000, steps=12)
        held.append(torch.cuda.memory_reserved())
    assert held[1] <= held[0]
    assert held[2] <= held[0]


def test_objects_fitted_together_are_what_they_are_alone():
    pair = [video(24), render(ROUND, Orbit.static(5), 24)]
    options = {"count": 60, "steps": 7, "seed": 3}
    seen = [0, 0]
    together = fitting_batch(pair, **options)
    try:
        while True:
            index, event = next(together)
            seen[index] += isinstance(event, events.Progress)
            assert abs(seen[0] - seen[1]) <= 1  # a step of each in turn
    except StopIteration as end:
        made = end.value
    assert seen == [7, 7]
    for splats, one in zip(made, pair, strict=True):
        alone = fit(one, **options)
        assert all(torch.equal(a, b) for a, b in zip(vars(splats).values(), vars(alone).values(), strict=True))


def test_an_object_that_cannot_be_fitted_is_named():
    few = OrbitVideo(video(24).frames[:3], video(24).orbit.select([0, 1, 2]))
    with pytest.raises(ValueError, match=r"video 1: video: expected at least \d+ frames"):
        fit_batch([video(24), few], count=20, steps=2)
    assert fit_batch([]) == []


@pytest.mark.gpu
def test_objects_fitted_together_on_a_gpu_show_their_own_frames():
    sources = [video(48), render(ROUND, Orbit.static(5), 48)]
    pair = [OrbitVideo(v.frames.cuda(), v.orbit) for v in sources]
    for splats, one in zip(fit_batch(pair, count=800, steps=120), sources, strict=True):
        rgb, _ = fit_module.render(splats, one.orbit, 48)
        assert psnr(rgb.cpu().clamp(0, 1), one.colors()) > 27
