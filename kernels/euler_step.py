"""What follows the network in a denoising step: guidance, Euler's step, and the scaled input of the step after it."""

import math

import torch
from torch import Tensor

from sv3d_fast.kernels.op import Implementation, Op
from sv3d_fast.kernels.triton_support import triton, why_no_triton

BLOCK = 256  # pixels of a program


def reference(output: Tensor, latents: Tensor, scales: Tensor, sigma: float, following: float) -> tuple[Tensor, Tensor]:
    """One Euler step of the probability-flow ODE from noise level `sigma` to `following`, which may be 0.

    output: (H, B, T, h, w, z), v-predictions for B orbits of T frames: of the unconditional and the conditional half,
    or of one half alone, H = 1. latents: (B, T, z, h, w). scales: (T,), guidance of each frame. Returns the latents at
    `following`, in the type of those given, and what the network sees of them, (B, T, h, w, z) in the type of `output`.
    """
    guided = output[-1].to(latents.dtype)
    if len(output) == 2:
        unconditional = output[0].to(latents.dtype)
        guided = unconditional + scales[:, None, None, None] * (guided - unconditional)
    of_output, of_latents, stride, seen = _coefficients(sigma, following)
    clean = guided.movedim(-1, 2) * of_output + latents * of_latents
    moved = latents + (latents - clean) * stride
    return moved, (moved * seen).movedim(2, -1).to(output.dtype).contiguous()


def _coefficients(sigma: float, following: float) -> tuple[float, float, float, float]:
    """The clean latents are the first times the network's output plus the second times the noisy latents (v-prediction,
    unit data variance); the step goes the third of the way away from them; the network sees the fourth of the result.
    """
    variance = sigma * sigma + 1
    return -sigma / math.sqrt(variance), 1 / variance, (following - sigma) / sigma, 1 / math.sqrt(following**2 + 1)


if triton is not None:
    import triton.language as tl

    @triton.jit
    def euler_step_kernel(
        output, latents, scales, moved, scaled, frames, pixels, channels,
        of_output, of_latents, stride, seen,
        GUIDED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """Some pixels of one frame, whose channels are innermost in what the network has and outermost in latents."""
        image = tl.program_id(1).to(tl.int64)
        pixel = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
        channel = tl.arange(0, BLOCK_C)[None, :]
        mask = (pixel < pixels) & (channel < channels)
        inner = (image * pixels + pixel) * channels + channel
        outer = (image * channels + channel) * pixels + pixel
        guided = tl.load(output + inner, mask, 0.0).to(tl.float32)
        if GUIDED:
            half = tl.num_programs(1).to(tl.int64) * pixels * channels  # a program for each image
            conditional = tl.load(output + half + inner, mask, 0.0).to(tl.float32)
            guided += tl.load(scales + image % frames).to(tl.float32) * (conditional - guided)
        before = tl.load(latents + outer, mask, 0.0).to(tl.float32)
        after = before + (before - (guided * of_output + before * of_latents)) * stride
        tl.store(moved + outer, after.to(moved.dtype.element_ty), mask)
        tl.store(scaled + inner, (after * seen).to(scaled.dtype.element_ty), mask)


def _run(output: Tensor, latents: Tensor, scales: Tensor, sigma: float, following: float) -> tuple[Tensor, Tensor]:
    halves, orbits, frames, height, width, channels = output.shape
    pixels, images = height * width, orbits * frames
    moved, scaled = torch.empty_like(latents), torch.empty_like(output[0])
    euler_step_kernel[(triton.cdiv(pixels, BLOCK), images)](
        output, latents, scales, moved, scaled, frames, pixels, channels, *_coefficients(sigma, following),
        halves == 2, BLOCK, triton.next_power_of_2(channels), num_warps=4,
    )  # fmt: skip
    return moved, scaled


def _why_not(output: Tensor, latents: Tensor, scales: Tensor, sigma: float, following: float) -> list[str]:
    reasons = why_no_triton(output)
    if not all(t.device == output.device for t in (latents, scales)):
        reasons.append("tensors of one device only")
    if not all(t.is_contiguous() for t in (output, latents, scales)):
        reasons.append("contiguous operands only")
    return reasons


def _examples(device: str):
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float16 if device == "cuda" else torch.float32
    for shape, sigma, following in (
        ((2, 2, 5, 17, 19, 4), 1.5, 0.8),
        ((1, 1, 3, 7, 1, 5), 700.0, 300.0),
        ((2, 1, 1, 3, 3, 4), 0.002, 0.0),
    ):
        _, orbits, frames, height, width, channels = shape
        output = torch.randn(shape, generator=generator)
        latents = torch.randn(orbits, frames, channels, height, width, generator=generator) * math.hypot(sigma, 1)
        scales = torch.linspace(1, 2.5, frames)
        yield output.to(device, dtype), latents.to(device), scales.to(device), sigma, following


euler_step = Op(
    name="euler_step",
    reference=reference,
    implementations=[Implementation("triton", _run, _why_not)],
    examples=_examples,
    source="Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models, algorithm 1",
)
