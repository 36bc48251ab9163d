"""Which network predicts a step, and that both say the same."""

import pytest
import torch
from test_fused_unet import CONFIGS, make

from sv3d_fast.conditioning import Conditioning
from sv3d_fast.engine import denoising
from sv3d_fast.events import finish
from sv3d_fast.model.config import SamplerConfig
from sv3d_fast.prediction import FusedPrediction, PlainPrediction, fused, prediction, release, why_not_fused

CONFIG = CONFIGS["p, two levels"]


def given(b=2, t=5, side=8, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    noise = draw(b, t, 4, side, side).float()
    return Conditioning(draw(b, 1, CONFIG.context_dim), draw(b, 4, side, side), draw(b, t, 1280).float()), noise


def test_a_cpu_and_wide_weights_run_plain():
    unet = make(CONFIG, torch.float32)
    assert why_not_fused(unet) == ["needs a GPU", "needs 16-bit weights, got torch.float32"]
    assert isinstance(prediction(unet, [given()[0]], [1.0]), PlainPrediction)


def test_the_fused_network_is_made_once_and_again_when_weights_change():
    unet = make(CONFIG, torch.float32)
    first = fused(unet)
    assert fused(unet) is first
    with torch.no_grad():
        unet.conv_in.weight.mul_(2)
    second = fused(unet)
    assert second is not first
    release(unet)
    assert fused(unet) is not second


@pytest.mark.gpu
def test_both_predict_the_same_and_the_graph_serves_other_runs():
    unet = make(CONFIG, torch.float16, "cuda")
    for seed_shift, levels in ((0, [3.0, 0.5]), (1, [7.0])):
        conditioning, noise = given(dtype=torch.float16, device="cuda")
        conditioning = Conditioning(
            conditioning.token + seed_shift, conditioning.image_latents, conditioning.vector - seed_shift
        )
        halves = [conditioning.unconditional(), conditioning]
        ours = prediction(unet, halves, levels)
        assert isinstance(ours, FusedPrediction)
        theirs = PlainPrediction(unet, halves, levels)
        for index in range(len(levels)):
            with torch.no_grad():
                a, b = ours(index, noise), theirs(index, noise)
            assert float((a - b).norm() / b.norm()) <= 5e-3


@pytest.mark.gpu
def test_the_same_seed_gives_the_same_bits_and_neighbours_do_not_meet():
    unet = make(CONFIG, torch.float16, "cuda")
    conditioning, noise = given(dtype=torch.float16, device="cuda")
    config = SamplerConfig(steps=3)
    first = finish(denoising(unet, conditioning, noise, config))
    assert torch.equal(first, finish(denoising(unet, conditioning, noise, config)))
    alone = Conditioning(conditioning.token[:1], conditioning.image_latents[:1], conditioning.vector[:1])
    single = finish(denoising(unet, alone, noise[:1], config))
    assert float((single - first[:1]).norm() / single.norm()) <= 5e-3
