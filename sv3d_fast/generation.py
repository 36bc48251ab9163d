"""Pictures to orbits: conditioning, denoising and decoding in one stage."""

from collections.abc import Generator, Sequence

import torch

from .camera import Orbit
from .cfg_parallel import Twin, even_chunk
from .conditioning import condition
from .engine import decoding_frames, denoising, to_uint8
from .events import Progress
from .memory import CONDITIONING, DECODING, DENOISING, Plan
from .model.config import SamplerConfig
from .model.weights import SV3DModel
from .placement import during, stage

STAGE = "orbit"


def draw(seed: int, image_shape: Sequence[int], latent_shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The picture's noise, then the latents' noise, unit variance, float32: the official order.

    Drawn on the CPU from the picture's own generator, so that neither its neighbours nor the device change a result.
    """
    generator = torch.Generator().manual_seed(seed)
    image_noise = torch.randn(*image_shape, generator=generator)
    return image_noise, torch.randn(*latent_shape, generator=generator)


def generating(
    model: SV3DModel,
    images: torch.Tensor,
    orbits: Sequence[Orbit],
    config: SamplerConfig,
    seeds: Sequence[int],
    *,
    chunk: int = 7,
    plan: Plan | None = None,
    twin: Twin | None = None,
) -> Generator[Progress, None, torch.Tensor]:
    """Orbits (B, T, S, S, 3) uint8 of B pictures, one Progress per denoising step and per decoded chunk.

    images: (B, 3, S, S) in [-1, 1], the object on white, S a multiple of the model's smallest unit. One orbit and one
    seed for each. The last frame is the input picture itself, as in the official sampling. plan: the one by which the
    model was placed (`placement.place`); its chunk is taken, and nothing else of the result depends on it. twin: copies
    of the networks on another device, which take their half of the work.
    Raises ValueError for pictures that aren't square, numbers of pictures, orbits and seeds that differ, orbits of
    different lengths, sizes that don't divide and a chunk below 1.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or len(images) == 0:
        raise ValueError(f"images: expected (B, 3, S, S), at least one, got {tuple(images.shape)}")
    count, _, side, _ = images.shape
    if not count == len(orbits) == len(seeds):
        raise ValueError(f"orbits and seeds: expected {count} of each, got {len(orbits)} and {len(seeds)}")
    if chunk < 1:
        raise ValueError(f"decode_chunk_size: expected at least 1, got {chunk}")
    unit = model.config.vae.factor * 2 ** (len(model.config.unet.block_channels) - 1)
    if side % unit:
        raise ValueError(f"frame_size: expected a multiple of {unit}, got {side}")
    frames, latent_side = len(orbits[0]), side // model.config.vae.factor
    latent_shape = (frames, model.config.vae.latent_channels, latent_side, latent_side)
    draws = [draw(seed, images.shape[1:], latent_shape) for seed in seeds]
    image_noise, noise = (torch.stack(parts) for parts in zip(*draws, strict=True))
    chunk = chunk if plan is None else plan.decode_chunk
    with stage(model, plan, CONDITIONING) as visit:
        given = condition(model, images, orbits, image_noise, config.cond_aug, visit)
    vaes = [model.vae]
    if twin is not None:
        vaes.append(twin.vae)
        chunk = even_chunk(count * frames, chunk, len(vaes))
    total = config.steps + -(-count * frames // chunk)
    denoised = denoising(model.unet, given, noise, config, twin=None if twin is None else twin.unet)
    running = during(model, plan, DENOISING, denoised)
    while True:
        try:
            step = next(running)
        except StopIteration as stop:
            latents = stop.value
            break
        yield Progress(STAGE, step.index + 1, total, {"sigma": step.sigma})
    decoded = during(model, plan, DECODING, decoding_frames(vaes, latents.flatten(0, 1), chunk=chunk))
    done = config.steps
    while True:
        try:
            next(decoded)
        except StopIteration as stop:
            made = stop.value.view(count, frames, side, side, 3)
            break
        done += 1
        yield Progress(STAGE, done, total)
    made[:, -1] = to_uint8(images)
    return made
