"""The sampler against the official trajectories and against diffusers' scheduler."""

import itertools

import numpy as np
import pytest
import torch

from sv3d_fast import sampler
from sv3d_fast.kernels.euler_step import euler_step
from sv3d_fast.model.config import SamplerConfig


def network(x, c_noise, image_latents):
    """The analytic network of the golden cases (tests/golden/README.md)."""
    return torch.tanh(0.8 * x + 0.3 * image_latents + 0.05 * c_noise + 0.1 * torch.roll(x, 1, 0))


def step(outputs, x, scales, sigma, following):
    """The op on one orbit: outputs (H, T, z, h, w), x (T, z, h, w)."""
    moved, seen = euler_step(outputs[:, None].movedim(3, -1), x[None], scales, sigma, following)
    return moved[0], seen[0].movedim(-1, 1)


def trajectory(noise, image_latents, steps):
    """Euler's loop as the engine runs it, on a classifier-free batch [unconditional frames; conditional frames]."""
    config = SamplerConfig(steps=steps)
    levels = sampler.sigmas(config).tolist()
    scales = sampler.triangle_guidance(config, len(noise))
    x = sampler.initial_latents(noise, config)
    image_latents = image_latents.expand_as(noise)
    images = torch.cat([torch.zeros_like(image_latents), image_latents])
    seen = x * sampler.c_in(levels[0])
    for sigma, following in itertools.pairwise(levels):
        outputs = network(torch.cat([seen, seen]), sampler.c_noise(sigma), images)
        x, seen = step(outputs.unflatten(0, (2, -1)), x, scales, sigma, following)
    return x


def golden_error(golden, case, steps) -> float:
    """Relative error of the final latents on a golden case."""
    data = np.load(golden / f"{case}.npz")
    out = trajectory(torch.from_numpy(data["noise"]), torch.from_numpy(data["image_latents"]), steps).numpy()
    return float(np.linalg.norm(out - data["latents"]) / np.linalg.norm(data["latents"]))


@pytest.mark.parametrize(("case", "steps"), [("sampler_21x50", 50), ("sampler_21x7", 7)])
def test_golden_trajectory(golden, case, steps):
    data = np.load(golden / f"{case}.npz")
    config = SamplerConfig(steps=steps)
    levels, scales = sampler.sigmas(config).numpy(), sampler.triangle_guidance(config, 21).numpy()
    np.testing.assert_allclose(levels, data["sigmas"], rtol=3e-6)
    np.testing.assert_allclose(scales, data["guidance"].reshape(-1), rtol=1e-6)
    assert golden_error(golden, case, steps) <= 1e-5


def test_published_values():
    levels = sampler.sigmas(SamplerConfig())
    assert len(levels) == 51
    np.testing.assert_allclose(levels[:5], [700, 620.33, 548.56, 484.03, 426.11], rtol=2e-5)
    np.testing.assert_allclose(levels[-6:], [0.023752, 0.01382, 0.0076843, 0.004049, 0.002, 0], rtol=1e-4)
    assert sampler.c_noise(700.0) == pytest.approx(1.63777, abs=1e-5)
    scales = sampler.triangle_guidance(SamplerConfig(), 21)
    np.testing.assert_allclose(scales, np.concatenate([np.arange(1, 2.5, 0.15), np.arange(2.5, 0.9, -0.15)]), rtol=1e-6)


def test_steps_agree_with_diffusers():
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0, timestep_spacing="leading",
        timestep_type="continuous", steps_offset=1, interpolation_type="linear",
    )  # fmt: skip
    scheduler.set_timesteps(9)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 4, 5, 7, generator=generator)
    theirs = noise * scheduler.init_noise_sigma
    ours = sampler.initial_latents(noise, SamplerConfig())
    levels = sampler.sigmas(SamplerConfig(steps=9)).tolist()
    zero, seen = torch.zeros_like(noise), ours * sampler.c_in(levels[0])
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(network(scheduler.scale_model_input(theirs, t), t, zero), t, theirs).prev_sample
        output = network(seen, sampler.c_noise(levels[i]), zero)
        ours, seen = step(output[None], ours, torch.ones(3), levels[i], levels[i + 1])
    assert torch.linalg.norm(ours - theirs) <= 1e-5 * torch.linalg.norm(theirs)


def test_no_steps_is_an_error():
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        sampler.sigmas(SamplerConfig(), 0)


def test_even_frames_miss_the_peak():
    assert sampler.triangle_guidance(SamplerConfig(), 4).max() < 2.5
    assert sampler.triangle_guidance(SamplerConfig(), 1).tolist() == [1.0]
