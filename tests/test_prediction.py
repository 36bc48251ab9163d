"""Which network predicts a step, and that both say the same."""

import pytest
import torch
from test_fused_unet import CONFIGS, make

from sv3d_fast.cfg_parallel import twin_of
from sv3d_fast.conditioning import Conditioning
from sv3d_fast.engine import NonFiniteError, decoding, decoding_frames, denoising, to_uint8
from sv3d_fast.events import finish
from sv3d_fast.kernels.euler_step import euler_step
from sv3d_fast.model.clip import CLIPImageTower
from sv3d_fast.model.config import CLIPConfig, ModelConfig, SamplerConfig, VAEConfig
from sv3d_fast.model.vae import SV3DVAE
from sv3d_fast.model.weights import SV3DModel
from sv3d_fast.prediction import FusedPrediction, PlainPrediction, fused, prediction, release, why_not_fused

CONFIG = CONFIGS["p, two levels"]
TOWER = CLIPConfig(width=32, layers=1, heads=2, mlp_width=64, patch=8, image_size=32, projection=24)


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
        noisy = noise.half().movedim(2, -1).contiguous()
        for index in range(len(levels)):
            with torch.no_grad():
                a, b = ours(index, noisy), theirs(index, noisy)
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


@pytest.mark.gpu
def test_a_gpu_names_the_step_and_the_layer():
    unet = make(CONFIG, torch.float16, "cuda")
    conditioning, noise = given(dtype=torch.float16, device="cuda")
    running = denoising(unet, conditioning, noise, SamplerConfig(steps=5))
    next(running)
    with torch.no_grad():
        unet.mid_block.attentions[0].proj_in.weight[3].fill_(float("inf"))  # the fused network's too
    next(running)  # its result is looked at while the next step runs
    with pytest.raises(NonFiniteError, match=r"after step 2 of 5; .*: middle\.attentions\.0\.proj_in, in float16;"):
        next(running)


@pytest.mark.gpu
def test_a_gpu_judges_the_last_step_before_it_yields_it():
    unet = make(CONFIG, torch.float16, "cuda")
    with torch.no_grad():
        unet.conv_out.bias.fill_(float("inf"))
    conditioning, noise = given(dtype=torch.float16, device="cuda")
    with pytest.raises(NonFiniteError, match=r"after step 1 of 1; .*: conv_out, in float16;"):
        next(denoising(unet, conditioning, noise, SamplerConfig(steps=1)))


@pytest.mark.gpu
def test_a_twin_on_another_gpu_or_beside_the_first_gives_the_same_orbit():
    unet = make(CONFIG, torch.float16, "cuda")
    conditioning, noise = given(dtype=torch.float16, device="cuda")
    config = SamplerConfig(steps=3)
    alone = finish(denoising(unet, conditioning, noise, config))
    vae = SV3DVAE(VAEConfig(block_channels=(32, 32), res_blocks=1)).cuda()
    model = SV3DModel(ModelConfig(CONFIG), unet, vae, CLIPImageTower(TOWER))
    twin = twin_of(model, torch.device("cuda", torch.cuda.device_count() - 1))
    first, second = (finish(denoising(unet, conditioning, noise, config, twin=twin.unet)) for _ in range(2))
    assert first.device == alone.device
    assert torch.equal(first, second)
    assert twin_of(model, twin.unet.conv_in.weight.device) is twin
    assert float((first - alone).norm() / alone.norm()) <= 5e-3
    latents = torch.randn(7, 4, 8, 8)
    frames = finish(decoding_frames([vae, twin.vae], latents, chunk=2))
    assert frames.is_pinned()
    assert torch.equal(frames, to_uint8(finish(decoding(vae, latents, chunk=2))))


@pytest.mark.gpu
def test_the_step_behind_the_network_is_one_kernel():
    unet = make(CONFIG, torch.float16, "cuda")
    conditioning, noise = given(dtype=torch.float16, device="cuda")
    predict = prediction(unet, [conditioning.unconditional(), conditioning], [2.0])
    output = predict(0, noise.half().movedim(2, -1).contiguous()).unflatten(0, (2, -1))
    scales = torch.ones(noise.shape[1], device="cuda")
    assert euler_step.choose(output, noise, scales, 2.0, 1.0).name == "triton"
