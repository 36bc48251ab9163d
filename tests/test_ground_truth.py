"""The true orbits of bench.reconstruction: cameras, packing, and each way of spoiling frames."""

import numpy as np
import pytest
import torch
from analytic_scene import ASYMMETRIC, render

from bench.ground_truth import BLUR, GAIN, WARP, _truth, blurred, compressed, jittered, novel_views, warped
from sv3d_fast.camera import Orbit
from sv3d_fast.mini.pack import Object
from sv3d_fast.scene.metrics import iou, psnr
from sv3d_fast.video import OrbitVideo

ORBIT = Orbit.sine(10.0, 30.0)


@pytest.fixture(scope="module")
def video():
    return render(ASYMMETRIC, ORBIT, 64)


def test_novel_views_lie_halfway_and_cover_the_elevations():
    novel = novel_views(ORBIT)
    between = (novel.azimuths[:, None] - ORBIT.azimuths + 180) % 360 - 180
    assert between.abs().amin(1).tolist() == pytest.approx([180 / 21] * 21, abs=1e-3)
    assert sorted(novel.elevations.tolist()) == pytest.approx(np.linspace(-10, 40, 21), abs=1e-4)
    assert (novel.elevations.diff().abs() > 5).all()  # neighbours differ: elevation is no function of azimuth


def test_a_textured_triangle_is_rendered_with_its_mask():
    vertices = np.array([[0, -0.4, -0.3], [0, 0.4, -0.3], [0, 0, 0.4]], np.float32)
    triangle = Object(
        "Triangle", "X#triangle", "", "", "", "", "held_out", vertices, np.array([[0, 1, 2]], np.int32),
        np.zeros((1, 3, 2), np.float32), np.full((8, 8, 3), (200, 60, 20), np.uint8),
        np.tile(np.array([[1, 0, 0]], np.float32), (3, 1)),
    )  # fmt: skip
    seen = _truth("triangle", triangle, torch.device("cpu")).orbit(Orbit.static(0.0, 4).select([3]), 64)
    area = 0.5 * 0.8 * 0.7 * (seen.orbit.focal(64) / 2) ** 2
    assert float(seen.alpha.sum()) == pytest.approx(area, rel=0.02)
    color = seen.frames[0, 32, 32].float()
    assert (color / color[0]).tolist() == pytest.approx([1, 0.3, 0.1], abs=0.02)
    assert seen.frames[0, 0, 0].tolist() == [255, 255, 255]


def test_gains_change_the_object_and_not_the_background(video):
    spoilt = jittered(video)
    inside, outside = video.alpha == 1, video.alpha == 0
    assert torch.equal(spoilt.frames[outside], video.frames[outside])
    ratio = spoilt.frames[inside].float() / video.frames[inside].float().clamp(min=1)
    assert ratio[video.frames[inside] > 60].min() >= 1 - GAIN - 0.02
    assert ratio[video.frames[inside] > 60].max() <= 1 + GAIN + 0.02
    assert ratio.std() > GAIN / 4


def test_warps_move_masks_with_colours_and_by_no_more_than_they_say(video):
    spoilt = warped(video)
    assert not torch.equal(spoilt.alpha, video.alpha)
    grown = torch.nn.functional.max_pool2d(video.alpha[:, None], 5, 1, 2)[:, 0]
    assert WARP * 64 / 576 + 1 < 2
    assert (spoilt.alpha <= grown + 1e-4).all()
    assert iou(spoilt.alpha, video.alpha) > 0.9


def test_only_back_views_are_blurred(video):
    big = OrbitVideo(video.frames.repeat_interleave(3, 1).repeat_interleave(3, 2), ORBIT)
    spoilt = blurred(big)
    behind = -torch.cos(torch.deg2rad(ORBIT.azimuths))
    for view, share in enumerate(behind.tolist()):
        if share <= 0 or share * BLUR * 192 / 576 > 0.5:
            assert torch.equal(spoilt.frames[view], big.frames[view]) == (share <= 0)
    assert psnr(spoilt.colors()[10], big.colors()[10]) < 45


def test_h264_keeps_pictures_and_loses_masks(video):
    spoilt = compressed(video)
    assert spoilt.alpha is None
    assert spoilt.frames.shape == video.frames.shape
    assert 25 < psnr(spoilt.colors(), video.colors()) < 60
