"""The denoising loop and the decoder around the networks."""

import re
from dataclasses import replace

import pytest
import torch
from tiny_sv3d import config, relative_error

from sv3d_fast import sampler
from sv3d_fast.camera import Orbit
from sv3d_fast.conditioning import Conditioning, vector
from sv3d_fast.engine import NonFiniteError, decoding, decoding_frames, denoising, to_uint8
from sv3d_fast.events import Progress, finish
from sv3d_fast.model.config import SamplerConfig
from sv3d_fast.model.unet import SV3DUNet
from sv3d_fast.model.vae import SV3DVAE

FRAMES, SIDE = 5, 8
SAMPLING = SamplerConfig(steps=3, sigma_max=80.0)


pytestmark = pytest.mark.usefixtures("one_thread")


def make_unet():
    torch.manual_seed(0)
    return SV3DUNet(config().unet).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def unet():
    return make_unet()


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return SV3DVAE(config().vae).eval()


def given(count=1):
    generator = torch.Generator().manual_seed(1)
    token = torch.randn(count, 1, 32, generator=generator)
    latents = torch.randn(count, 4, SIDE, SIDE, generator=generator)
    orbits = [Orbit.static(5.0 + 20 * i, FRAMES) for i in range(count)]
    noise = torch.randn(count, FRAMES, 4, SIDE, SIDE, generator=generator)
    return Conditioning(token, latents, vector(config().unet, orbits, 1e-5)), noise


def steps_of(running, replace_with=lambda step: None):
    """(the steps, the value)."""
    steps, answer = [], None
    while True:
        try:
            step = running.send(answer)
        except StopIteration as stop:
            return steps, stop.value
        steps.append(step)
        answer = replace_with(step)


def test_steps_count_and_end_in_the_value(unet):
    conditioning, noise = given()
    steps, value = steps_of(denoising(unet, conditioning, noise, SAMPLING))
    assert [(s.index, s.total) for s in steps] == [(0, 3), (1, 3), (2, 3)]
    assert [s.sigma for s in steps] == sampler.sigmas(SAMPLING).tolist()[:-1]
    assert torch.equal(steps[-1].latents, value)
    assert value.shape == noise.shape
    assert value.dtype == torch.float32
    assert torch.equal(value, finish(denoising(unet, conditioning, noise, SAMPLING)))


def test_guidance_is_what_its_formula_says(unet):
    conditioning, noise = given()
    one = replace(SAMPLING, steps=1, max_guidance=3.0)
    conditional = finish(denoising(unet, conditioning, noise, replace(one, max_guidance=1.0)))
    plain = finish(denoising(unet, conditioning.unconditional(), noise, replace(one, max_guidance=1.0)))
    scales = sampler.triangle_guidance(one, FRAMES)[:, None, None, None]
    made = finish(denoising(unet, conditioning, noise, one))
    expected = plain + scales * (conditional - plain)
    assert relative_error(made, expected) < 5e-5  # a step from sigma 700 to 0: differences of numbers that large
    assert relative_error(made, conditional) > 1e-3


def test_conditional_half_alone_equals_guidance_of_one(unet, monkeypatch):
    conditioning, noise = given()
    alone = finish(denoising(unet, conditioning, noise, replace(SAMPLING, max_guidance=1.0)))
    monkeypatch.setattr(sampler, "triangle_guidance", lambda c, frames: torch.ones(frames))
    both = finish(denoising(unet, conditioning, noise, replace(SAMPLING, max_guidance=2.0)))
    assert relative_error(both, alone) < 1e-5


def test_neighbours_do_not_matter(unet):
    conditioning, noise = given(2)
    both = finish(denoising(unet, conditioning, noise, SAMPLING))
    assert relative_error(both[0], both[1]) > 1e-2
    for i in range(2):
        one = Conditioning(
            conditioning.token[i : i + 1], conditioning.image_latents[i : i + 1], conditioning.vector[i : i + 1]
        )
        alone = finish(denoising(unet, one, noise[i : i + 1], SAMPLING))
        assert relative_error(both[i], alone[0]) < 1e-5


def test_a_latent_sent_back_is_used(unet):
    conditioning, noise = given()

    def swap(step):
        return torch.full_like(step.latents, 0.5, dtype=torch.float64) if step.index == 1 else None

    _, value = steps_of(denoising(unet, conditioning, noise, SAMPLING), swap)
    levels = sampler.sigmas(SAMPLING).tolist()
    rest = torch.full_like(noise, 0.5)
    # one step from the third level, started from what was sent
    unit = rest / (1 + levels[2] ** 2) ** 0.5
    expected = finish(denoising(unet, conditioning, unit, SAMPLING, levels[2:]))
    assert relative_error(value, expected) < 1e-5
    _, untouched = steps_of(denoising(unet, conditioning, noise, SAMPLING))
    assert relative_error(value, untouched) > 1e-3
    last = torch.full_like(noise, 7.0)
    _, value = steps_of(denoising(unet, conditioning, noise, SAMPLING), lambda step: last)
    assert torch.equal(value, last)


def test_levels_of_the_caller(unet):
    conditioning, noise = given()
    own = sampler.sigmas(SAMPLING).tolist()
    ours = finish(denoising(unet, conditioning, noise, SAMPLING))
    assert torch.equal(finish(denoising(unet, conditioning, noise, replace(SAMPLING, steps=9), own)), ours)
    steps, other = steps_of(denoising(unet, conditioning, noise, SAMPLING, torch.tensor([40.0, 2.0, 0.0])))
    assert [(s.index, s.total, s.sigma) for s in steps] == [(0, 2, 40.0), (1, 2, 2.0)]
    assert relative_error(other, ours) > 1e-4


@pytest.mark.parametrize(
    "levels", [[], [0.0], [1.0], [1.0, 0.5], [1.0, 1.0, 0.0], [1.0, 2.0, 0.0], [float("inf"), 0.0], [float("nan"), 0.0]]
)
def test_levels_that_are_no_schedule(unet, levels):
    conditioning, noise = given()
    with pytest.raises(ValueError, match="sigmas: expected at least two decreasing numbers, the last 0") as info:
        next(denoising(unet, conditioning, noise, SAMPLING, levels))
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (1, FRAMES, 4, SIDE, SIDE + 1),
            "noise: expected (B, T, 4, h, w), h and w multiples of 2, got (1, 5, 4, 8, 9)",
        ),
        ((1, FRAMES, 3, SIDE, SIDE), "noise: expected (B, T, 4, h, w)"),
        ((FRAMES, 4, SIDE, SIDE), "noise: expected (B, T, 4, h, w)"),
        ((0, FRAMES, 4, SIDE, SIDE), "noise: expected (B, T, 4, h, w)"),
        ((2, FRAMES, 4, SIDE, SIDE), "conditioning: expected token (2, 1, 32), got (1, 1, 32)"),
        ((1, FRAMES, 4, SIDE, SIDE + 2), "conditioning: expected image_latents (1, 4, 8, 10), got (1, 4, 8, 8)"),
        ((1, FRAMES + 1, 4, SIDE, SIDE), "conditioning: expected vector (1, 6, 1280), got (1, 5, 1280)"),
    ],
)
def test_shapes_that_do_not_fit(unet, shape, message):
    conditioning, _ = given()
    with pytest.raises(ValueError, match="^" + re.escape(message)) as info:
        next(denoising(unet, conditioning, torch.zeros(shape), SAMPLING))
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(("levels", "total"), [(None, 3), ([5.0, 1.0, 0.5, 0.1, 0.0], 4)])
def test_numbers_that_stop_being_numbers_name_the_step(levels, total):
    unet = make_unet()
    conditioning, noise = given()
    running = denoising(unet, conditioning, noise, SAMPLING, levels)
    next(running)
    next(unet.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=f"the latents are not finite after step 2 of {total}; .*: conv_in$"):
        next(running)


@pytest.mark.parametrize(
    ("layer", "weight"),
    [
        ("down_blocks.0.attentions.0.proj_in", "weight"),
        ("mid_block.resnets.1.temporal_res_block", "conv1.weight"),  # whose layers are not called by themselves
        ("conv_out", "bias"),
    ],
)
def test_numbers_that_stop_being_numbers_name_the_layer(layer, weight):
    unet = make_unet()
    conditioning, noise = given()
    unet.get_parameter(f"{layer}.{weight}")[0].fill_(float("inf"))
    message = f"after step 1 of 3; the first of its values that are not: {layer}"
    with pytest.raises(NonFiniteError, match=re.escape(message) + "$"):
        next(denoising(unet, conditioning, noise, SAMPLING))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_outgrows_float16_is_told_what_reaches_further(dtype):
    unet = make_unet()
    unet.conv_out.weight.fill_(3e4)
    conditioning, noise = given()
    parts = Conditioning(conditioning.token.to(dtype), conditioning.image_latents.to(dtype), conditioning.vector)
    running = denoising(unet.to(dtype), parts, noise, SAMPLING)
    if dtype == torch.bfloat16:
        assert torch.isfinite(finish(running)).all()
        return
    message = "after step 1 of 3; the first of its values that are not: conv_out, in float16; dtype bfloat16 reaches"
    with pytest.raises(NonFiniteError, match=message):
        next(running)


def test_latents_sent_back_that_are_no_numbers_are_blamed(unet):
    conditioning, noise = given()
    with pytest.raises(NonFiniteError, match=r"after step 2 of 3; .* the latents before it"):
        steps_of(denoising(unet, conditioning, noise, SAMPLING), lambda step: step.latents / 0)


def test_16_bit_networks_keep_float32_latents(unet):
    conditioning, noise = given()
    half = make_unet().bfloat16()
    parts = Conditioning(conditioning.token.bfloat16(), conditioning.image_latents.bfloat16(), conditioning.vector)
    made = finish(denoising(half, parts, noise.double(), SAMPLING))
    assert made.dtype == torch.float32
    assert relative_error(made, finish(denoising(unet, conditioning, noise, SAMPLING))) < 0.05


def test_chunks_change_nothing_but_progress(vae):
    latents = torch.randn(5, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    whole = finish(decoding(vae, latents, chunk=9))
    with torch.no_grad():
        torch.testing.assert_close(whole, vae.decode(latents / vae.config.scaling))
    assert whole.shape == (5, 3, 4 * SIDE, 4 * SIDE)
    for chunk, done in ((1, [1, 2, 3, 4, 5]), (2, [2, 4, 5])):
        events, parts = steps_of(decoding(vae, latents, chunk=chunk, stage="frames"))
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
        assert events == [Progress("frames", d, 5) for d in done]


def test_frames_are_the_pictures_in_bytes(vae):
    latents = torch.randn(5, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    events, frames = steps_of(decoding_frames([vae], latents, chunk=2, stage="frames"))
    assert events == [Progress("frames", d, 5) for d in (2, 4, 5)]
    assert torch.equal(frames, to_uint8(finish(decoding(vae, latents, chunk=2))))
    assert torch.equal(frames, finish(decoding_frames([vae, vae, vae], latents, chunk=2)))


def test_pictures_that_overflow_are_no_frames(vae):
    latents = torch.zeros(3, 4, SIDE, SIDE)
    latents[1, 0, 2, 2] = float("inf")
    with pytest.raises(NonFiniteError, match=r"the decoder overflowed in torch\.float32"):
        finish(decoding_frames([vae], latents, chunk=1))


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunk_below_one(vae, chunk):
    with pytest.raises(ValueError, match=f"decode_chunk_size: expected at least 1, got {chunk}"):
        finish(decoding_frames([vae], torch.zeros(1, 4, SIDE, SIDE), chunk=chunk))
    with pytest.raises(ValueError, match=f"decode_chunk_size: expected at least 1, got {chunk}"):
        finish(decoding(vae, torch.zeros(1, 4, SIDE, SIDE), chunk=chunk))


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-3.0, -1.0, -1 + 1.4 / 127.5, -1 + 1.6 / 127.5, 1.0, 9.0])
    pictures = values.expand(2, 3, 1, 6)
    made = to_uint8(pictures)
    assert made.shape == (2, 1, 6, 3)
    assert made.is_contiguous()
    assert made[0, 0, :, 0].tolist() == [0, 0, 1, 2, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_uint8(every.permute(0, 3, 1, 2).float() / 127.5 - 1), every)
