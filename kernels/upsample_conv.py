"""Nearest upsampling by two and the 3x3 convolution behind it, as one 2x2 convolution per parity of the output.

An output pixel's nine taps fall on four input pixels, so taps that share one are summed beforehand: exact, and 4 / 9
of the arithmetic (Odena et al. 2016, "Deconvolution and Checkerboard Artifacts", describe the resize-convolution).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sv3d_fast.kernels import native
from sv3d_fast.kernels.hopper_support import why_no_hopper
from sv3d_fast.kernels.op import Implementation, Op
from sv3d_fast.kernels.triton_support import triton, why_no_triton

BLOCK_M, BLOCK_N, BLOCK_K, GROUP = 128, 256, 64, 8


def pack(weight: Tensor) -> Tensor:
    """A kernel (c', c, 3, 3) to (4, c', 4, c): parity 2 * py + px of the output pixel, tap 2 * dy + dx.

    Tap (dy, dx) of parity (py, px) reads the input pixel (y + py - 1 + dy, x + px - 1 + dx).
    """
    # which of the three taps along an axis fall on the first and the second input pixel, for each parity
    falls = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64)
    summed = torch.einsum("pai,qbj,ocij->pqoabc", falls, falls, weight.double())
    return summed.flatten(3, 4).flatten(0, 1).to(weight.dtype).contiguous()


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (N, h, w, c) to (N, 2h, 2w, c'); weight as `pack` lays it out, bias (c',)."""
    n, h, w, _ = x.shape
    outer = F.pad(x, (0, 0, 1, 1, 1, 1))
    y = x.new_empty(n, h, 2, w, 2, weight.shape[1])
    for parity in range(4):
        py, px = divmod(parity, 2)
        y[:, :, py, :, px] = bias + sum(
            F.linear(outer[:, py + dy : py + dy + h, px + dx : px + dx + w], weight[parity, :, 2 * dy + dx])
            for dy in (0, 1)
            for dx in (0, 1)
        )
    return y.view(n, 2 * h, 2 * w, -1)


if triton is not None:
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit
    def upsample_conv_kernel(
        x, w_desc, bias, y, images, height, width, channels, n,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        pixels = images * height * width
        tiles_m, tiles_n = tl.cdiv(pixels, BLOCK_M), tl.cdiv(n, BLOCK_N)
        parity, tile = tl.program_id(1), tl.program_id(0)
        group = tile // (GROUP * tiles_n)
        tall = min(tiles_m - group * GROUP, GROUP)
        tile_m = group * GROUP + (tile % (GROUP * tiles_n)) % tall
        column = ((tile % (GROUP * tiles_n)) // tall) * BLOCK_N
        pixel = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = pixel < pixels
        py, px = parity // 2, parity % 2
        row, at_x = pixel // width, pixel % width
        at_y = row % height
        channel = tl.arange(0, BLOCK_K)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        chunks = tl.cdiv(channels, BLOCK_K)
        for step in range(4 * chunks):
            tap = step // chunks
            c0 = (step % chunks) * BLOCK_K
            dy, dx = py - 1 + tap // 2, px - 1 + tap % 2
            seen = inside & (at_y + dy >= 0) & (at_y + dy < height) & (at_x + dx >= 0) & (at_x + dx < width)
            at = (pixel + dy * width + dx)[:, None] * channels + (c0 + channel)[None, :]
            a = tl.load(x + at, seen[:, None] & (c0 + channel < channels)[None, :], 0.0)
            b = w_desc.load([parity * n + column, tap * channels + c0])  # the next tap's meet zeros of x
            accumulator = tl.dot(a, b.T, accumulator)
        columns = column + tl.arange(0, BLOCK_N)
        accumulator += tl.load(bias + columns, columns < n, 0.0).to(tl.float32)[None, :]
        place = ((2 * row + py) * (2 * width) + 2 * at_x + px).to(tl.int64)
        tl.store(
            y + place[:, None] * n + columns[None, :], accumulator.to(y.dtype.element_ty),
            inside[:, None] & (columns < n)[None, :],
        )  # fmt: skip


def _folded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    images, height, width, channels = x.shape
    n = weight.shape[1]
    y = torch.empty(images, 2 * height, 2 * width, n, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(images * height * width, BLOCK_M) * triton.cdiv(n, BLOCK_N)
    upsample_conv_kernel[(tiles, 4)](
        x, TensorDescriptor.from_tensor(weight.flatten(2).flatten(0, 1), [BLOCK_N, BLOCK_K]), bias, y, images, height,
        width, channels, n, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, num_warps=8, num_stages=3,
    )  # fmt: skip
    return y


def _why_not_folded(x: Tensor, weight: Tensor, bias: Tensor) -> list[str]:
    reasons = why_no_triton(x, weight, bias, capability=(9, 0))  # weights arrive by TMA
    if x.shape[-1] % 8:
        reasons.append(f"TMA needs rows of a multiple of 16 bytes, got {x.shape[-1]} channels")
    if max(x.numel(), 4 * x.numel() // x.shape[-1] * weight.shape[1]) >= 2**31:
        reasons.append("fewer than 2^31 values only")
    if not (x.is_contiguous() and weight.is_contiguous()):
        reasons.append("contiguous operands only")
    return reasons


def _hopper(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    images, height, width, _ = x.shape
    y = x.new_empty(images, 2 * height, 2 * width, weight.shape[1])
    native.load("cuda").gemm_upsample(x, weight.flatten(2).flatten(0, 1), bias, y)
    return y


def _why_not_hopper(x: Tensor, weight: Tensor, bias: Tensor) -> list[str]:
    reasons = why_no_hopper(x, weight, bias)
    if x.shape[-1] % 8 or weight.shape[1] % 128:
        reasons.append(f"channels in multiples of 8 to 128 only, got {x.shape[-1]} to {weight.shape[1]}")
    if 4 * x.numel() // x.shape[-1] >= 2**31:
        reasons.append("fewer than 2^31 pixels only")
    return reasons


def _examples(device: str):
    generator = torch.Generator().manual_seed(0)
    large = [(2, 9, 9, 320, 320), (3, 5, 7, 72, 256), (1, 40, 33, 64, 640)] if device == "cuda" else []
    for n, h, w, c, out in ((2, 5, 7, 40, 24), (1, 1, 1, 64, 32), *large):
        x, kernel, bias = (
            torch.randn(shape, generator=generator).to(device, torch.float16 if device == "cuda" else torch.float32)
            for shape in ((n, h, w, c), (out, c, 3, 3), (out,))
        )
        yield x, pack(kernel), bias


upsample_conv = Op(
    name="upsample_conv",
    reference=reference,
    implementations=[
        Implementation("cuda", _hopper, _why_not_hopper),  # on Hopper, see csrc/gemm_kernel.h
        Implementation("triton", _folded, _why_not_folded),
    ],
    examples=_examples,
    tolerance=1e-3,  # 16-bit rounding of the result
)
