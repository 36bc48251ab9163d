"""Runs the denoising loop and decodes its latents, a chunk of frames at a time."""

import itertools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import torch

from . import sampler
from .conditioning import Conditioning
from .events import Progress
from .model.config import SamplerConfig
from .model.fused_vae import fused_decoder, why_not_fused
from .model.unet import SV3DUNet
from .model.vae import SV3DVAE
from .prediction import prediction


class NonFiniteError(RuntimeError):
    """The latents stopped being numbers; the message names the step."""


@dataclass(frozen=True)
class Step:
    """Denoising step `index` (from 0) of `total` is done; `latents` (B, T, z, h, w) float32 are at the next sigma."""

    index: int
    total: int
    sigma: float
    latents: torch.Tensor


def check_levels(levels: Sequence[float]) -> list[float]:
    """A schedule of noise levels as numbers. Raises ValueError, naming `sigmas`, unless they fall from a finite level
    to 0 in at least one step."""
    numbers = [float(level) for level in levels]
    falls = all(above > below for above, below in itertools.pairwise(numbers))
    if len(numbers) < 2 or not falls or numbers[-1] != 0 or not math.isfinite(numbers[0]):
        raise ValueError(f"sigmas: expected at least two decreasing numbers, the last 0, got {numbers}")
    return numbers


def denoising(
    unet: SV3DUNet,
    conditioning: Conditioning,
    noise: torch.Tensor,
    config: SamplerConfig,
    levels: Sequence[float] | None = None,
) -> Generator[Step, torch.Tensor | None, torch.Tensor]:
    """Unit-variance noise (B, T, z, h, w) to clean latents of the same shape, one Euler step per yield.

    levels: noise levels, decreasing, the last 0, one more than there are steps; None for those of `config`.
    The consumer may send latents back in place of the ones it was given (a callback's right). Latents and angles
    stay float32 whatever the network's dtype. Guidance whose scales are all 1 runs the conditional half alone,
    which is exact. Raises ValueError for levels that aren't a schedule, NonFiniteError, naming the step, where the
    latents overflow.
    """
    if levels is None:
        levels = sampler.sigmas(config).tolist()
    else:
        levels = check_levels(levels)
        config = replace(config, sigma_max=levels[0])
    weight, total = next(unet.parameters()), len(levels) - 1
    guidance = config.max_guidance > 1 or config.min_guidance != 1
    scales = sampler.triangle_guidance(config, noise.shape[1]).to(weight.device)
    halves = [conditioning.unconditional(), conditioning] if guidance else [conditioning]
    latents = sampler.initial_latents(noise.to(weight.device, torch.float32), config)
    with torch.no_grad():
        predict = prediction(unet, halves, levels[:-1])
    for index, (sigma, following) in enumerate(itertools.pairwise(levels)):
        with torch.no_grad():
            output = predict(index, latents * sampler.c_in(sigma))
            if guidance:
                unconditional, conditional = output.chunk(2)
                output = sampler.guided(unconditional, conditional, scales)
            latents = sampler.euler_step(latents, sampler.denoised(output, latents, sigma), sigma, following)
            if not torch.isfinite(latents).all():
                raise NonFiniteError(f"the latents are not finite after step {index + 1} of {total}")
        replaced = yield Step(index, total, sigma, latents)
        if replaced is not None:
            latents = replaced.to(latents)
    return latents


def decoding(
    vae: SV3DVAE, latents: torch.Tensor, *, chunk: int, stage: str = "decode"
) -> Generator[Progress, None, torch.Tensor]:
    """Latents (N, z, h, w) as sampled to pictures (N, 3, H, W) float32 in [-1, 1], unclamped, `chunk` at a time.

    The decoder sees each frame alone, so the chunk size changes memory and never the result.
    Raises ValueError for a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"decode_chunk_size: expected at least 1, got {chunk}")
    weight = next(vae.parameters())
    decode = vae.decode if why_not_fused(vae) else fused_decoder(vae)
    pictures = []
    for start in range(0, len(latents), chunk):
        with torch.no_grad():
            part = latents[start : start + chunk].to(weight.device, torch.float32) / vae.config.scaling
            pictures.append(decode(part.to(weight.dtype)).float())
        yield Progress(stage, min(start + chunk, len(latents)), len(latents))
    return torch.cat(pictures)


def to_uint8(pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1] to (N, H, W, 3) uint8 on the CPU, rounded."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
