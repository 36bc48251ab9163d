"""Layer normalisation in one pass, and with what is done on the way: positions added, a blend with another tensor."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sv3d_fast.kernels.op import Implementation, Op
from sv3d_fast.kernels.triton_support import triton, why_no_triton

MAX_CHANNELS = 8192  # what one program holds
ELEMENTS = 4096  # that a program takes at a time, at most


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalisation of x (M, c) over its channels; statistics are float32 at least."""
    wide = x if x.dtype == torch.float64 else x.float()
    return F.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)


def positioned_reference(
    x: Tensor, positions: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """x + positions + shift, and the normalisation of x + positions over channels, both (B, T, P, c).

    positions: (T, c). shift: (c,), what the residual that the sum becomes is to have more than the norm sees.
    """
    total = x + positions[:, None]
    return total + shift, reference(total, weight, bias, eps)


def blended_reference(
    x: Tensor, other: Tensor, share: Tensor, weight: Tensor, bias: Tensor, eps: float, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """other + share * (x - other), and the normalisation of x over channels, both (M, c).

    share: (1,). inplace: the blend takes the place of x.
    """
    y = reference(x, weight, bias, eps)
    return torch.lerp(other, x, share, out=x if inplace else None), y


if triton is not None:
    import triton.language as tl

    @triton.jit
    def layer_norm_kernel(
        x, positions, extra, other, share, weight, bias, total, y, rows, channels, frames, pixels, eps,
        HAS_POSITIONS: tl.constexpr, BLENDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        channel = tl.arange(0, BLOCK_C)
        inside = channel < channels
        mask = (row < rows)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        v = tl.load(x + at, mask, 0.0).to(tl.float32)
        if HAS_POSITIONS:
            frame = (row // pixels) % frames
            v += tl.load(positions + frame[:, None] * channels + channel[None, :], mask, 0.0).to(tl.float32)
            more = tl.load(extra + channel, inside, 0.0).to(tl.float32)
            tl.store(total + at, (v + more[None, :]).to(total.dtype.element_ty), mask)
            v = tl.where(mask, v, 0.0)
        if BLENDS:
            base = tl.load(other + at, mask, 0.0).to(tl.float32)
            blend = base + tl.load(share).to(tl.float32) * (v - base)
            tl.store(total + at, blend.to(total.dtype.element_ty), mask)
        mean = tl.sum(v, 1) / channels
        deviation = tl.where(mask, v - mean[:, None], 0.0)
        factor = tl.rsqrt(tl.sum(deviation * deviation, 1) / channels + eps)
        w = tl.load(weight + channel, inside, 0.0).to(tl.float32)
        b = tl.load(bias + channel, inside, 0.0).to(tl.float32)
        tl.store(y + at, (deviation * factor[:, None] * w[None, :] + b[None, :]).to(y.dtype.element_ty), mask)


def _launch(x, weight, bias, eps, *, positions=None, shift=None, other=None, share=None, inplace=False):
    channels = x.shape[-1]
    rows = x.numel() // channels
    block = triton.next_power_of_2(channels)
    high = max(1, ELEMENTS // block)
    y = torch.empty_like(x)
    sums = positions is not None or other is not None
    total = (x if inplace else torch.empty_like(x)) if sums else None
    frames, pixels = x.shape[1:3] if positions is not None else (1, 1)
    layer_norm_kernel[(triton.cdiv(rows, high),)](
        x, positions, shift, other, share, weight, bias, total, y, rows, channels, frames, pixels, eps,
        positions is not None, other is not None, high, block, num_warps=4,
    )  # fmt: skip
    return total, y


def _run(x, weight, bias, eps):
    return _launch(x, weight, bias, eps)[1]


def _run_positioned(x, positions, weight, bias, eps, shift):
    return _launch(x, weight, bias, eps, positions=positions, shift=shift)


def _run_blended(x, other, share, weight, bias, eps, inplace=False):
    return _launch(x, weight, bias, eps, other=other, share=share, inplace=inplace)


def _reasons(x: Tensor, *others: Tensor) -> list[str]:
    reasons = why_no_triton(x, *others)
    if x.shape[-1] > MAX_CHANNELS:
        reasons.append(f"at most {MAX_CHANNELS} channels, got {x.shape[-1]}")
    if not all(t.is_contiguous() for t in (x, *others)):
        reasons.append("contiguous operands only")
    return reasons


def _why_not(x, weight, bias, eps) -> list[str]:
    return _reasons(x, weight, bias)


def _why_not_positioned(x, positions, weight, bias, eps, shift) -> list[str]:
    return _reasons(x, positions, weight, bias, shift)


def _why_not_blended(x, other, share, weight, bias, eps, inplace=False) -> list[str]:
    return _reasons(x, other, share, weight, bias)


def _random(device: str, *shapes):
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float16 if device == "cuda" else torch.float32
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _examples(device: str):
    for rows, channels in ((37, 320), (1, 96), (130, 1280)):
        x, weight, bias = _random(device, (rows, channels), (channels,), (channels,))
        yield x + 5, weight, bias, 1e-5


def _positioned_examples(device: str):
    for shape in ((2, 21, 7, 320), (1, 1, 1, 64), (1, 5, 33, 96)):
        x, positions, *vectors = _random(device, shape, (shape[1], shape[3]), *[shape[3:]] * 3)
        weight, bias, shift = vectors
        yield x, positions, weight, bias, 1e-5, shift


def _blended_examples(device: str):
    for rows, channels in ((37, 320), (1, 96), (130, 1280)):
        x, other, weight, bias, share = _random(device, *[(rows, channels)] * 2, *[(channels,)] * 2, (1,))
        yield x, other, share.sigmoid(), weight, bias, 1e-5


layer_norm = Op(
    name="layer_norm",
    reference=reference,
    implementations=[Implementation("triton", _run, _why_not)],
    examples=_examples,
    tolerance=1e-3,  # 16-bit rounding of the result
    source="Ba et al. 2016, Layer Normalization",
)
positioned_layer_norm = Op(
    name="positioned_layer_norm",
    reference=positioned_reference,
    implementations=[Implementation("triton", _run_positioned, _why_not_positioned)],
    examples=_positioned_examples,
    tolerance=1e-3,
    source="Blattmann et al. 2023, Stable Video Diffusion: frame positions before the temporal transformer blocks",
)
blended_layer_norm = Op(
    name="blended_layer_norm",
    reference=blended_reference,
    implementations=[Implementation("triton", _run_blended, _why_not_blended)],
    examples=_blended_examples,
    tolerance=1e-3,
    source="Blattmann et al. 2023, Stable Video Diffusion: the blend of spatial and temporal transformer blocks",
)
