"""Structural similarity of images, differentiable in the first (Wang et al. 2004).

The window is an 11-tap Gaussian of sigma 1.5, the data range is 1 (C1 = 0.01^2, C2 = 0.03^2) and variances are not
Bessel-corrected. As in fused-ssim with padding "same", pixels outside the image count as zero and the map has the
size of the image, so a border of 5 pixels differs from implementations that crop or mirror.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sv3d_fast.kernels import native
from sv3d_fast.kernels.op import Implementation, Op

RADIUS = 5
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2
STRIP, COLUMNS, MAX_CHANNELS = 48, 128, 64  # of csrc/ssim.cu: a block's rows, and values of a row


def reference(x: Tensor, y: Tensor) -> Tensor:
    """Mean structural similarity (N,) of images x and y (N, H, W, C), values in [0, 1]. Plain torch, any float dtype.

    Differentiable in x; y gets no gradient. Raises ValueError for shapes, dtypes or devices that differ.
    """
    _check(x, y)
    channels = x.shape[-1]
    taps = [math.exp(-(i**2) / (2 * SIGMA**2)) for i in range(-RADIUS, RADIUS + 1)]
    window = torch.tensor(taps, dtype=x.dtype, device=x.device) / sum(taps)

    def blur(images: Tensor) -> Tensor:
        down = window.view(1, 1, -1, 1).expand(channels, -1, -1, -1)
        images = F.conv2d(images, down, padding=(RADIUS, 0), groups=channels)
        return F.conv2d(images, down.mT, padding=(0, RADIUS), groups=channels)

    x, y = x.movedim(-1, 1), y.movedim(-1, 1)
    mx, my = blur(x), blur(y)
    vx, vy, covariance = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    similarity = (2 * mx * my + C1) * (2 * covariance + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))
    return similarity.mean((1, 2, 3))


def _check(x: Tensor, y: Tensor) -> None:
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x: expected shape (N, H, W, C), none of them 0, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    if y.shape != x.shape or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"y: expected x's shape, dtype and device ({tuple(x.shape)}, {x.dtype}, {x.device}), "
            f"got {tuple(y.shape)}, {y.dtype}, {y.device}"
        )
    if y.requires_grad:
        raise ValueError("y: gets no gradient, so expected a tensor that doesn't require one")


class _Csrc(torch.autograd.Function):
    """Computes the gradient along with the value, whose filtered moments it shares, and keeps only that."""

    @staticmethod
    def forward(ctx, x, y):
        means = x.new_empty(len(x))
        gradient = torch.empty(x.shape if ctx.needs_input_grad[0] else (0,) * 4)
        native.load("cpu").ssim_forward(x.detach().contiguous(), y.contiguous(), means, gradient)
        ctx.save_for_backward(gradient)
        return means

    @staticmethod
    @once_differentiable
    def backward(ctx, v_means):
        (gradient,) = ctx.saved_tensors
        return gradient * v_means[:, None, None, None], None


class _Cuda(torch.autograd.Function):
    """Keeps the similarity's derivatives by the filtered moments, which the backward pass filters once more."""

    @staticmethod
    def forward(ctx, x, y):
        x, y = x.detach().contiguous(), y.contiguous()
        count, height, width, channels = x.shape
        blocks = -(-height // STRIP) * -(-width * channels // COLUMNS)
        sums = x.new_empty((count, blocks))
        derivatives = x.new_empty((3, *x.shape) if ctx.needs_input_grad[0] else 0)
        native.load("cuda").ssim_forward(x, y, sums, derivatives)
        ctx.save_for_backward(x, y, derivatives)
        return sums.sum(1) / x[0].numel()

    @staticmethod
    @once_differentiable
    def backward(ctx, v_means):
        x, y, derivatives = ctx.saved_tensors
        gradient = torch.empty_like(x)
        scales = (v_means / x[0].numel()).contiguous()
        native.load("cuda").ssim_backward(x, y, derivatives, scales, gradient)
        return gradient, None


def _csrc(x: Tensor, y: Tensor) -> Tensor:
    _check(x, y)
    return _Csrc.apply(x, y)


def _cuda(x: Tensor, y: Tensor) -> Tensor:
    _check(x, y)
    return _Cuda.apply(x, y)


def _why_not(kind: str, x: Tensor) -> list[str]:
    return native.why_not(kind, x) + ([] if x.dtype == torch.float32 else [f"needs float32, got {x.dtype}"])


def _why_not_cuda(x: Tensor, y: Tensor) -> list[str]:
    wide = x.ndim > 0 and x.shape[-1] > MAX_CHANNELS
    return _why_not("cuda", x) + ([f"takes up to {MAX_CHANNELS} channels, got {x.shape[-1]}"] if wide else [])


def _examples(device: str) -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 37, 53, 3), (1, 1, 1, 1), (3, 7, 64, 4)):
        x = torch.rand(shape, generator=generator)
        y = (x + 0.2 * torch.randn(shape, generator=generator)).clamp(0, 1)
        yield x.to(device), y.to(device)


ssim = Op(
    name="ssim",
    reference=reference,
    implementations=(
        Implementation("cuda", _cuda, _why_not_cuda),
        Implementation("csrc", _csrc, lambda x, y: _why_not("cpu", x)),
    ),
    examples=_examples,
    tolerance=1e-5,
    source="Wang et al. 2004; padding and constants of fused-ssim",
)
