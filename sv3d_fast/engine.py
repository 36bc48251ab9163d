"""Runs the denoising loop and decodes its latents, a chunk of frames at a time."""

import itertools
import math
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import torch

from . import sampler
from .cfg_parallel import SplitPrediction
from .conditioning import Conditioning
from .events import Progress
from .kernels.euler_step import euler_step
from .model.config import SamplerConfig, UNetConfig
from .model.fused_vae import fused_decoder, why_not_fused
from .model.unet import SV3DUNet
from .model.vae import SV3DVAE
from .prediction import Prediction, prediction


class NonFiniteError(RuntimeError):
    """The latents stopped being numbers; the message names the step and the layer."""


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
    *,
    twin: SV3DUNet | None = None,
) -> Generator[Step, torch.Tensor | None, torch.Tensor]:
    """Unit-variance noise (B, T, z, h, w) to clean latents of the same shape, one Euler step per yield.

    levels: noise levels, decreasing, the last 0, one more than there are steps; None for those of `config`.
    twin: a copy of the network on another device, which then predicts the unconditional half of each step.
    The consumer may send latents back in place of the ones it was given (a callback's right). Latents and angles
    stay float32 whatever the network's dtype. Guidance whose scales are all 1 runs the conditional half alone,
    which is exact. Raises ValueError for levels that aren't a schedule and shapes that don't fit the network,
    NonFiniteError, naming the step and the layer, where the latents overflow: on a GPU when the step after it is asked
    for, since its answer isn't waited for.
    """
    _check(unet.config, conditioning, noise)
    if levels is None:
        levels = sampler.sigmas(config).tolist()
    else:
        levels = check_levels(levels)
        config = replace(config, sigma_max=levels[0])
    weight, total = unet.conv_in.weight, len(levels) - 1
    guidance = config.max_guidance > 1 or config.min_guidance != 1
    scales = sampler.triangle_guidance(config, noise.shape[1]).to(weight.device)
    halves = [conditioning.unconditional(), conditioning] if guidance else [conditioning]
    latents = sampler.initial_latents(noise.to(weight.device, torch.float32), config)
    noisy = _seen(latents, levels[0], weight.dtype)
    with torch.no_grad(), torch.cuda.device_of(weight):
        if guidance and twin is not None:
            predict: Prediction = SplitPrediction([twin, unet], halves, levels[:-1])
        else:
            predict = prediction(unet, halves, levels[:-1])
    watch = _Watch(predict, total, weight.device)
    for index, (sigma, following) in enumerate(itertools.pairwise(levels)):
        with torch.no_grad(), torch.cuda.device_of(weight):
            output = predict(index, noisy).unflatten(0, (len(halves), -1))
            latents, ahead = euler_step(output, latents, scales, sigma, following)
            watch.follow(index, noisy, latents)
        replaced = yield Step(index, total, sigma, latents)
        noisy = ahead
        if replaced is not None and replaced is not latents:
            latents = replaced.to(latents)
            noisy = _seen(latents, following, weight.dtype)
    return latents


def _check(config: UNetConfig, conditioning: Conditioning, noise: torch.Tensor) -> None:
    factor = 2 ** (len(config.block_channels) - 1)
    fits = noise.ndim == 5 and noise.shape[2] == config.out_channels and 0 not in noise.shape
    if not fits or noise.shape[3] % factor or noise.shape[4] % factor:
        raise ValueError(
            f"noise: expected (B, T, {config.out_channels}, h, w), h and w multiples of {factor}, "
            f"got {tuple(noise.shape)}"
        )
    b, t, z, h, w = noise.shape
    expected = {
        "token": (b, 1, config.context_dim), "image_latents": (b, config.in_channels - z, h, w),
        "vector": (b, t, config.vector_dim),
    }  # fmt: skip
    for name, shape in expected.items():
        if (got := tuple(getattr(conditioning, name).shape)) != shape:
            raise ValueError(f"conditioning: expected {name} {shape}, got {got}")


def _seen(latents: torch.Tensor, sigma: float, dtype: torch.dtype) -> torch.Tensor:
    """What the network sees of latents: scaled, (B, T, h, w, z)."""
    return (latents * sampler.c_in(sigma)).movedim(2, -1).to(dtype).contiguous()


class _Watch:
    """Stops a run whose latents are not finite.

    A GPU's answer is read while it works on the step behind, so that it never waits for this process; that also keeps
    this process, its progress and its right to interrupt within a step of the GPU.
    """

    def __init__(self, predict: Prediction, total: int, device: torch.device):
        self.predict, self.total, self.on_gpu = predict, total, device.type == "cuda"
        self.fine = torch.ones(total, dtype=torch.bool, pin_memory=self.on_gpu)
        self.unread: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()

    def follow(self, index: int, noisy: torch.Tensor, latents: torch.Tensor) -> None:
        """Step `index` took `noisy` to `latents`. Raises NonFiniteError for the step before it; for itself too if it
        is the last."""
        self.fine[index].copy_(torch.isfinite(latents).all(), non_blocking=self.on_gpu)
        event = torch.cuda.Event() if self.on_gpu else None
        if event is not None:
            event.record()
        self.unread.append((index, noisy, event))
        while self.unread and (self.unread[0][0] < index or not self.on_gpu or index + 1 == self.total):
            self._read(*self.unread.popleft())

    def _read(self, index: int, noisy: torch.Tensor, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.synchronize()
        if self.fine[index]:
            return
        where = self.predict.first_non_finite(index, noisy) if torch.isfinite(noisy).all() else "the latents before it"
        advice = ", in float16; dtype bfloat16 reaches further" if noisy.dtype == torch.float16 else ""
        raise NonFiniteError(
            f"the latents are not finite after step {index + 1} of {self.total}; "
            f"the first of its values that are not: {where or 'its result, behind the network'}{advice}"
        )


def decoding(
    vae: SV3DVAE, latents: torch.Tensor, *, chunk: int, stage: str = "decode"
) -> Generator[Progress, None, torch.Tensor]:
    """Latents (N, z, h, w) as sampled to pictures (N, 3, H, W) float32 in [-1, 1], unclamped, `chunk` at a time.

    The decoder sees each frame alone, so the chunk size changes memory and never the result.
    Raises ValueError for a chunk below 1.
    """
    pictures = []
    for part in _chunks(latents, chunk):
        pictures.append(_decode(vae, latents[part]).float())
        yield Progress(stage, part.stop, len(latents))
    return torch.cat(pictures)


def decoding_frames(
    vaes: Sequence[SV3DVAE], latents: torch.Tensor, *, chunk: int, stage: str = "decode"
) -> Generator[Progress, None, torch.Tensor]:
    """Latents (N, z, h, w) as sampled to frames (N, H, W, 3) uint8 on the CPU, `chunk` at a time.

    vaes: one autoencoder, or copies of it on several devices, which take chunks in turn. A GPU rounds a chunk to bytes
    and copies them while the next is decoded: Progress tells what is on its way. Raises ValueError for a chunk below
    1, NonFiniteError where a picture overflows.
    """
    placed = [latents.to(next(vae.parameters()).device) for vae in vaes]  # before any of them is busy
    copiers = [torch.cuda.Stream(here.device) if here.is_cuda else None for here in placed]
    factor, size = vaes[0].config.factor, latents.shape[-2:]
    shape = (len(latents), factor * size[0], factor * size[1], 3)
    frames = torch.empty(shape, dtype=torch.uint8, pin_memory=any(here.is_cuda for here in placed))
    finite = []
    for number, part in enumerate(_chunks(latents, chunk)):
        turn = number % len(vaes)
        made, whole = to_bytes(_decode(vaes[turn], placed[turn][part]))
        finite.append(whole)
        copier = copiers[turn]
        if copier is None:
            frames[part] = made
        else:
            copier.wait_stream(torch.cuda.current_stream(made.device))
            with torch.cuda.stream(copier):
                frames[part].copy_(made, non_blocking=True)
            made.record_stream(copier)
        yield Progress(stage, part.stop, len(latents))
    for copier in filter(None, copiers):
        copier.synchronize()
    if not all(finite):
        raise NonFiniteError(f"the decoder overflowed in {next(vaes[0].parameters()).dtype}")
    return frames


def _chunks(latents: torch.Tensor, chunk: int) -> list[slice]:
    if chunk < 1:
        raise ValueError(f"decode_chunk_size: expected at least 1, got {chunk}")
    count = len(latents)
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]


@torch.no_grad()
def _decode(vae: SV3DVAE, latents: torch.Tensor) -> torch.Tensor:
    """Latents as sampled to pictures (N, 3, H, W) in the autoencoder's precision."""
    weight = next(vae.parameters())
    decode = vae.decode if why_not_fused(vae) else fused_decoder(vae)
    with torch.cuda.device_of(weight):
        return decode((latents.to(weight.device, torch.float32) / vae.config.scaling).to(weight.dtype))


def to_uint8(pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1] to (N, H, W, 3) uint8 on the CPU, rounded."""
    return to_bytes(pictures)[0].cpu()


def to_bytes(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 3, H, W) in [-1, 1] to (N, H, W, 3) uint8, rounded, where they are; and whether all were numbers."""
    made = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return made, torch.isfinite(pictures).all()
