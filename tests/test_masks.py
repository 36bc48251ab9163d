"""Masks against the true alpha of ray-cast shapes."""

from dataclasses import replace

import pytest
import torch
from analytic_scene import ASYMMETRIC, Box, Sphere, render

from bench.ground_truth import compressed
from sv3d_fast.camera import Orbit
from sv3d_fast.scene.masks import doubts, foreground, showing
from sv3d_fast.scene.metrics import iou
from sv3d_fast.video import OrbitVideo

ORBIT = Orbit.static(15)


def without_alpha(video, frames=None):
    return replace(video, alpha=None, frames=video.frames if frames is None else frames)


def noisy(frames, seed=0):
    """Frames as a video codec leaves them: levels off by a little, in blocks."""
    generator = torch.Generator().manual_seed(seed)
    t, h, w, _ = frames.shape
    fine = torch.randn(t, h, w, 1, generator=generator)
    blocks = torch.randn(t, h // 8 + 1, w // 8 + 1, 1, generator=generator)
    blocks = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :h, :w]
    return (frames + 0.8 * fine + 0.7 * blocks - 1).clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize("size", [48, 97])
@pytest.mark.parametrize("disturb", [lambda frames: frames, noisy], ids=["exact", "noisy"])
def test_the_true_alpha_is_found(size, disturb):
    video = render(ASYMMETRIC, ORBIT.select([0, 5, 12, 20]), size)
    alpha = foreground(without_alpha(video, disturb(video.frames)))
    assert alpha.shape == video.alpha.shape
    assert alpha.dtype == torch.float32
    assert alpha.min() >= 0
    assert alpha.max() <= 1
    assert iou(alpha, video.alpha) > 0.96
    assert (alpha - video.alpha).abs().mean() < 0.01
    assert alpha[video.alpha == 0].max() < 0.35
    assert (alpha[video.alpha == 1] > 0.7).float().mean() > 0.99


def test_a_given_alpha_is_taken_as_it_is():
    video = render(ASYMMETRIC, ORBIT.select([0, 5, 12, 20]), 32)
    assert torch.equal(foreground(video), video.alpha)


def test_a_white_part_keeps_its_inside():
    """A highlight that reaches pure white, in the middle of an object, with a soft rim."""
    video = render((Sphere((0, 0, 0), 0.35, (0.7, 0.7, 0.7)),), ORBIT, 64)
    ys, xs = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    glow = (1.6 * torch.exp(-((ys - 31) ** 2 + (xs - 31) ** 2) / 60)).clamp(max=1)[None, :, :, None]
    frames = (video.frames + glow * (255 - video.frames.float())).round().to(torch.uint8)
    assert (frames[:, 31, 31] == 255).all()
    alpha = foreground(without_alpha(video, frames))
    assert (alpha[video.alpha == 1] > 0.5).all()


def test_a_white_patch_with_a_sharp_rim_is_no_hole():
    """Pure white paint on one side: the views from behind show that nobody looks through."""
    shapes = (Sphere((0, 0, 0), 0.3, (0.6, 0.2, 0.2)), Box((0.27, 0.0, 0.0), (0.06, 0.1, 0.1), (0.1, 0.2, 0.6)))
    video = render(shapes, ORBIT, 96)
    blue = (video.frames[..., 2] > video.frames[..., 0]) & (video.alpha == 1)
    frames = torch.where(blue[..., None], torch.full_like(video.frames, 255), video.frames)
    alpha = foreground(without_alpha(video, frames))
    front = video.alpha[-1] == 1
    assert (alpha[-1][front] > 0.5).float().mean() > 0.98


def test_one_can_look_through_a_frame():
    sides = [((0.0, 0.3, 0.0), (0.05, 0.06, 0.36)), ((0.0, -0.3, 0.0), (0.05, 0.06, 0.36))]
    sides += [((0.0, 0.0, 0.3), (0.05, 0.36, 0.06)), ((0.0, 0.0, -0.3), (0.05, 0.36, 0.06))]
    video = render([Box(center, half, (0.5, 0.3, 0.1)) for center, half in sides], Orbit.static(5), 64)
    alpha = foreground(without_alpha(video))
    assert video.alpha[-1, 32, 32] == 0
    assert alpha[-1, 32, 32] == 0
    assert iou(alpha, video.alpha) > 0.97


def test_disconnected_parts_survive_and_specks_do_not():
    shapes = (Sphere((0, 0.25, 0), 0.18, (0.6, 0.2, 0.2)), Sphere((0, -0.3, 0), 0.08, (0.1, 0.2, 0.6)))
    video = render(shapes, ORBIT.select([0, 5, 15, 20]), 96)
    frames = video.frames.clone()
    frames[:, 3, 3] = 0
    frames[:, 90:92, 4:8] = 252
    alpha = foreground(without_alpha(video, frames))
    assert iou(alpha, video.alpha) > 0.97
    assert (alpha[:, :6, :6] == 0).all()
    assert (alpha[:, 88:, :12] == 0).all()


def test_empty_masks():
    video = render(ASYMMETRIC, ORBIT.select([0, 5, 12, 20]), 32)
    with pytest.raises(ValueError, match="all background"):
        foreground(without_alpha(video, torch.full_like(video.frames, 255)))
    with pytest.raises(ValueError, match="all background"):
        foreground(replace(video, alpha=torch.zeros_like(video.alpha)))
    frames = video.frames.clone()
    frames[1] = 255
    alpha = foreground(without_alpha(video, frames))
    assert (alpha[1] == 0).all()
    with pytest.raises(ValueError, match="an object in at least 4 of 4, got it in 3"):
        showing(without_alpha(video, frames))


@pytest.mark.parametrize("known", [False, True])
def test_frames_without_an_object_are_left_out_with_their_cameras(known):
    video = render(ASYMMETRIC, ORBIT.select([0, 3, 5, 9, 12, 20]), 32)
    whole, omissions = showing(video)
    assert omissions == []
    assert torch.equal(whole.frames, video.frames)
    frames, alpha = video.frames.clone(), video.alpha.clone()
    frames[[1, 3]], alpha[[1, 3]] = 255, 0
    kept, omissions = showing(OrbitVideo(frames, video.orbit, alpha if known else None))
    assert omissions == ["frames [1, 3]: the mask is empty; they are left out"]
    assert kept.orbit.azimuths.tolist() == ORBIT.azimuths[[0, 5, 12, 20]].tolist()
    assert torch.equal(kept.frames, video.frames[[0, 2, 4, 5]])
    assert kept.alpha.shape == (4, 32, 32)


def test_doubts_name_the_frames():
    video = render(ASYMMETRIC, ORBIT.select([0, 5, 12, 20]), 48)
    assert doubts(video.alpha) == []
    alpha = video.alpha.clone()
    alpha[2] = 0
    alpha[2, 20:22, 20:22] = 1
    alpha[3, 20, :30] = 1
    assert [d.partition(":")[0] for d in doubts(alpha)] == ["frames [2]", "frames [3]"]


def test_the_ringing_of_h264_stays_outside():
    truth = render(ASYMMETRIC, ORBIT, 128)
    alpha = foreground(compressed(truth))
    assert alpha.sum() / truth.alpha.sum() == pytest.approx(1, abs=0.025)
    assert ((alpha > 0.25) & (truth.alpha == 0)).sum() < 1000  # of 344,064 pixels
