"""EDM sampling of SV3D: sigmas, preconditioning and triangle guidance. Pure functions; the step itself is an op,
`sv3d_fast.kernels.euler_step`.

Sources: Karras et al. 2022 (EDM), sections 3 and 5; generative-models, sgm/modules/diffusionmodules
(EDMDiscretization, VScalingWithEDMcNoise, TrianglePredictionGuider, EulerEDMSampler).
"""

import math

import torch

from .model.config import SamplerConfig


def sigmas(config: SamplerConfig, steps: int | None = None) -> torch.Tensor:
    """(steps + 1,) float32 noise levels: sigma_max down to sigma_min along rho, then 0. EDM, equation 5.

    Raises ValueError for fewer than one step.
    """
    steps = config.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else torch.zeros(1, dtype=torch.float64)
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
    levels = (high + ramp * (low - high)) ** config.rho
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)]).float()


def triangle_guidance(config: SamplerConfig, frames: int) -> torch.Tensor:
    """(frames,) float32 guidance scales: min at both ends of the orbit, max half way round."""
    if frames == 1:
        return torch.tensor([config.min_guidance])
    position = torch.linspace(0, 1, frames, dtype=torch.float64)
    triangle = 2 * (position - (position + 0.5).floor()).abs()
    return (config.min_guidance + (config.max_guidance - config.min_guidance) * triangle).float()


def c_in(sigma: float) -> float:
    """Scale of the noisy latents that the network sees."""
    return 1 / math.sqrt(sigma * sigma + 1)


def c_noise(sigma: float) -> float:
    """The timestep that the network sees: ln(sigma) / 4."""
    return 0.25 * math.log(sigma)


def initial_latents(noise: torch.Tensor, config: SamplerConfig) -> torch.Tensor:
    """Unit-variance noise scaled to the first sigma (sgm and EulerDiscreteScheduler add the data's unit variance)."""
    return noise * math.sqrt(1 + config.sigma_max**2)
