"""A linear layer with what follows it: bias, GELU, a row per group of tokens, the residual."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sv3d_fast.kernels import gemm, hopper_gemm, tiles
from sv3d_fast.kernels.op import Implementation, Op


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
    gelu: bool = False,
    inplace: bool = False,
) -> Tensor:
    """x (M, k) @ weight (n, k).T + bias (n,) + rows + residual (M, n); rows: (G, n), each for M / G successive rows.

    gelu: an exact (erf) GELU of the product with its bias, before rows and residual. inplace: the result takes the
    residual's place. Raises ValueError where G doesn't divide M.
    """
    if rows is not None and len(x) % len(rows):
        raise ValueError(f"rows: expected a divisor of {len(x)} rows, got {len(rows)}")
    y = F.linear(x, weight, bias)
    if gelu:
        y = F.gelu(y)
    if rows is not None:
        y = (y.unflatten(0, (len(rows), -1)) + rows[:, None]).flatten(0, 1)
    if residual is None:
        return y
    return residual.add_(y) if inplace else y + residual


def _fused(x, weight, bias=None, residual=None, rows=None, gelu=False, inplace=False):
    how = tiles.choose("linear", x.device, len(x), len(weight), x.shape[-1]) or tiles.SAFE
    residual = None if residual is None else residual[None]
    return gemm.gemm(x[None], weight, bias, how, rows=rows, residual=residual, gelu=gelu, inplace=inplace)[0]


def _why_not_fused(x, weight, bias=None, residual=None, rows=None, gelu=False, inplace=False) -> list[str]:
    reasons = gemm.why_not(x, weight, bias, residual, rows)
    if rows is not None:
        return reasons if len(x) % len(rows) == 0 else [*reasons, f"{len(rows)} rows don't divide {len(x)}"]
    if not reasons and tiles.choose("linear", x.device, len(x), len(weight), x.shape[-1]) is None:
        reasons.append("cuBLAS was measured to be faster at this shape")
    return reasons


def _hopper(x, weight, bias=None, residual=None, rows=None, gelu=False, inplace=False):
    how = tiles.choose_hopper("linear", len(x), len(weight), x.shape[-1])
    assert how is not None  # or else why_not has said so
    residual = None if residual is None else residual[None]
    return hopper_gemm.hopper_gemm(
        x[None], weight, bias, how, rows=rows, residual=residual, gelu=gelu, inplace=inplace
    )[0]


def _why_not_hopper(x, weight, bias=None, residual=None, rows=None, gelu=False, inplace=False) -> list[str]:
    reasons = hopper_gemm.why_not(x, weight, bias, residual, rows)
    if rows is not None and len(x) % len(rows):
        reasons.append(f"{len(rows)} rows don't divide {len(x)}")
    return reasons or tiles.why_not_hopper("linear", len(x), len(weight), x.shape[-1])


def _library(x, weight, bias=None, residual=None, rows=None, gelu=False, inplace=False):
    if residual is None or gelu:
        y = F.linear(x, weight, bias)
        y = F.gelu(y) if gelu else y
        if residual is None:
            return y
        return residual.add_(y) if inplace else y + residual
    y = residual.addmm_(x, weight.T) if inplace else torch.addmm(residual, x, weight.T)
    return y if bias is None else y.add_(bias)


def _why_not_library(x, weight, bias=None, residual=None, rows=None, gelu=False, inplace=False) -> list[str]:
    reasons = [] if x.is_cuda else ["needs CUDA tensors"]
    return reasons if rows is None else [*reasons, "cuBLAS adds no rows"]


def _examples(device: str):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, torch.float16 if device == "cuda" else torch.float32)

    yield random(45, 40), random(24, 40), random(24), random(45, 24), random(5, 24)
    yield random(1, 64), random(72, 64)
    yield random(33, 24), random(40, 24), random(40), random(33, 40), None, True
    if device == "cuda":
        yield random(300, 320), random(960, 320), None, random(300, 960)


linear = Op(
    name="linear",
    reference=reference,
    implementations=[
        Implementation("cuda", _hopper, _why_not_hopper),
        Implementation("triton", _fused, _why_not_fused),
        Implementation("cublas", _library, _why_not_library),
    ],
    examples=_examples,
    tolerance=1e-3,  # 16-bit rounding of the result
)
