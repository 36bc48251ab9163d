"""The (3, 1, 1) convolution over frames as one product over three shifted views of the same rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sv3d_fast.kernels import gemm, hopper_gemm, tiles
from sv3d_fast.kernels.op import Implementation, Op


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Convolution of x (B, T, P, c) over T, zeros beyond both ends, plus what follows it: (B, T, P, c').

    weight: (c', 3, c). bias: (c',). scale: (1,), of the convolution with its bias. rows: (B, T, c'). residual:
    (B, T, P, c').
    """
    y = F.conv2d(x.permute(0, 3, 1, 2), weight.mT[..., None], bias, padding=(1, 0)).permute(0, 2, 3, 1)
    if scale is not None:
        y = y * scale
    if rows is not None:
        y = y + rows[:, :, None]
    return y.contiguous() if residual is None else y + residual


def _with(product, how, x, weight, bias, rows, residual, scale):
    b, t, p, c = x.shape
    n = len(weight)
    out = product(
        x.view(b, t * p, c), weight.flatten(1), bias, how, taps=3, shift=p,
        rows=None if rows is None else rows.reshape(b * t, n),
        residual=None if residual is None else residual.reshape(b, t * p, n), scale=scale,
    )  # fmt: skip
    return out.view(b, t, p, n)


def _fused(x, weight, bias=None, rows=None, residual=None, scale=None):
    how = tiles.choose("temporal_conv", x.device, x.numel() // x.shape[-1], len(weight), x.shape[-1])
    return _with(gemm.gemm, how, x, weight, bias, rows, residual, scale)


def _why_not_fused(x, weight, bias=None, rows=None, residual=None, scale=None) -> list[str]:
    return gemm.why_not(x, weight, bias, rows, residual, scale)


def _hopper(x, weight, bias=None, rows=None, residual=None, scale=None):
    how = tiles.choose_hopper("temporal_conv", x.numel() // x.shape[-1], len(weight), x.shape[-1])
    return _with(hopper_gemm.hopper_gemm, how, x, weight, bias, rows, residual, scale)


def _why_not_hopper(x, weight, bias=None, rows=None, residual=None, scale=None) -> list[str]:
    reasons = hopper_gemm.why_not(x, weight, bias, rows, residual, scale)
    return reasons or tiles.why_not_hopper("temporal_conv", x.numel() // x.shape[-1], len(weight), x.shape[-1])


def _examples(device: str):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, torch.float16 if device == "cuda" else torch.float32)

    yield random(2, 5, 9, 40), random(24, 3, 40), random(24), random(2, 5, 24)
    yield random(1, 1, 1, 64), random(64, 3, 64)
    yield random(1, 3, 5, 32), random(32, 3, 32), random(32), None, random(1, 3, 5, 32), random(1)
    if device == "cuda":
        yield random(2, 21, 81, 320), random(320, 3, 320), random(320), None, random(2, 21, 81, 320), random(1)


temporal_conv = Op(
    name="temporal_conv",
    reference=reference,
    implementations=[
        Implementation("cuda", _hopper, _why_not_hopper),
        Implementation("triton", _fused, _why_not_fused),
    ],
    examples=_examples,
    tolerance=1e-3,  # 16-bit rounding of the result
    source="Blattmann et al. 2023, Stable Video Diffusion: the temporal residual blocks",
)
