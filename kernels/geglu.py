"""The gated linear unit of the transformers' feed-forward; its eightfold channels never reach memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sv3d_fast.kernels import gemm, hopper_gemm, tiles
from sv3d_fast.kernels.op import Implementation, Op


def interleaved(rows: Tensor) -> Tensor:
    """(2h, ...), values before gates, to value and gate in turn, as a copy."""
    return rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1).contiguous()


def separated(rows: Tensor) -> Tensor:
    """The inverse of `interleaved`."""
    return rows.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1).contiguous()


def reference(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None) -> Tensor:
    """value * gelu(gate), both linear in x: (M, k) -> (M, h); weight (2h, k) and bias (2h,), value and gate in turn.

    scale: (1,), of the result.
    """
    value, gate = F.linear(x, weight, bias).unflatten(-1, (-1, 2)).unbind(-1)
    y = value * F.gelu(gate)
    return y if scale is None else y * scale


def _fused(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None) -> Tensor:
    how = tiles.choose("geglu", x.device, len(x), len(weight), x.shape[-1])
    assert how is not None  # or else why_not has said so
    return gemm.gemm(x[None], weight, bias, how, scale=scale, geglu=True)[0]


def _why_not_fused(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None) -> list[str]:
    reasons = gemm.why_not(x, weight, bias, scale)
    if not reasons and tiles.choose("geglu", x.device, len(x), len(weight), x.shape[-1]) is None:
        reasons.append("cuBLAS was measured to be faster at this shape")
    return reasons


def _hopper(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None) -> Tensor:
    how = tiles.choose_hopper("geglu", len(x), len(weight), x.shape[-1])
    assert how is not None  # or else why_not has said so
    return hopper_gemm.hopper_gemm(x[None], weight, bias, how, scale=scale, geglu=True)[0]


def _why_not_hopper(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None) -> list[str]:
    reasons = hopper_gemm.why_not(x, weight, bias, scale)
    return reasons or tiles.why_not_hopper("geglu", len(x), len(weight), x.shape[-1])


def _examples(device: str):
    generator = torch.Generator().manual_seed(0)
    large = [(300, 320, 1280)] if device == "cuda" else []
    for m, k, h in ((45, 40, 24), (1, 64, 8), *large):
        given = tuple(
            torch.randn(shape, generator=generator).to(device, torch.float16 if device == "cuda" else torch.float32)
            for shape in ((m, k), (2 * h, k), (2 * h,), (1,))
        )
        yield given[:3]
        yield given


geglu = Op(
    name="geglu",
    reference=reference,
    implementations=[
        Implementation("cuda", _hopper, _why_not_hopper),
        Implementation("triton", _fused, _why_not_fused),
    ],
    examples=_examples,
    tolerance=1e-3,  # 16-bit rounding of the result
    source="Shazeer 2020, GLU Variants Improve Transformer",
)
