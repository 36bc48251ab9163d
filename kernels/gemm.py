"""The matrix product behind the fused ops: tiles by TMA, float32 accumulation, everything that follows in the epilogue.

One kernel serves linear layers (one tap), convolutions over frames (three taps, each the same rows `shift` further on)
and GEGLU (value and gate columns interleaved, multiplied before they leave the registers). Rows beyond either end of
an orbit read as zero, which is a convolution's padding: TMA fills them in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sv3d_fast.kernels.triton_support import multiprocessors, triton, why_no_triton

if triton is not None:
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit
    def _gelu(x):
        """x * Phi(x), Phi to 1.5e-7 (Abramowitz and Stegun, 7.1.26): half the instructions of erf, in an epilogue that
        takes as long as the products."""
        z = tl.abs(x) * 0.7071067811865476
        t = 1.0 / (1.0 + 0.3275911 * z)
        series = 1.061405429 * t - 1.453152027
        series = series * t + 1.421413741
        series = series * t - 0.284496736
        series = series * t + 0.254829592
        tail = 0.5 * series * t * tl.exp2(z * z * -1.4426950408889634)
        return x * tl.where(x >= 0, 1.0 - tail, tail)

    @triton.jit
    def gemm_kernel(
        a_desc,  # (B, R, K): rows of each orbit
        b_desc,  # (N, TAPS * K)
        bias,  # (N,)
        rows,  # (B * R / row_period, N)
        residual,  # as out
        scale,  # (1,)
        out,  # (B, R, N), or (B, R, N / 2) with GEGLU
        orbits,
        length,  # R
        n,
        k,
        shift,  # rows between two taps
        row_period,
        TAPS: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_ROWS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        GEGLU: tl.constexpr,
        GELU: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        GROUP: tl.constexpr,
        PROGRAMS: tl.constexpr,
    ):
        strips = tl.cdiv(length, BLOCK_M)
        tiles_m, tiles_n = orbits * strips, tl.cdiv(n, BLOCK_N)
        chunks = tl.cdiv(k, BLOCK_K)
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
            # GROUP strips of rows by all columns: neighbours in time share both operands in the cache
            group = tile // (GROUP * tiles_n)
            height = min(tiles_m - group * GROUP, GROUP)
            tile_m = group * GROUP + (tile % (GROUP * tiles_n)) % height
            tile_n = (tile % (GROUP * tiles_n)) // height
            orbit = tile_m // strips
            first = (tile_m % strips) * BLOCK_M
            column = tile_n * BLOCK_N
            accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for step in range(TAPS * chunks):
                tap = step // chunks
                at = (step % chunks) * BLOCK_K
                a = a_desc.load([orbit, first + (tap - TAPS // 2) * shift, at]).reshape(BLOCK_M, BLOCK_K)
                b = b_desc.load([column, tap * k + at])  # what it holds of the next tap meets zeros of a
                accumulator = tl.dot(a, b.T, accumulator)

            inside = first + tl.arange(0, BLOCK_M)
            row = orbit * length + inside
            columns = column + tl.arange(0, BLOCK_N)
            if HAS_BIAS:
                accumulator += tl.load(bias + columns, columns < n, 0.0).to(tl.float32)[None, :]
            if GEGLU:
                value, gate = accumulator.reshape(BLOCK_M, BLOCK_N // 2, 2).split()
                result = value * _gelu(gate)
                columns = column // 2 + tl.arange(0, BLOCK_N // 2)
                width = n // 2
            else:
                result = _gelu(accumulator) if GELU else accumulator
                width = n
            if HAS_SCALE:
                result *= tl.load(scale).to(tl.float32)
            mask = (inside < length)[:, None] & (columns < width)[None, :]
            place = row.to(tl.int64)[:, None] * width + columns[None, :]
            if HAS_ROWS:
                at_row = (row // row_period)[:, None] * width + columns[None, :]
                result += tl.load(rows + at_row, mask, 0.0).to(tl.float32)
            if HAS_RESIDUAL:
                result += tl.load(residual + place, mask, 0.0).to(tl.float32)
            tl.store(out + place, result.to(out.dtype.element_ty), mask)


@dataclass(frozen=True)
class Tiles:
    """How the product is cut: a program's tile, its warps and stages, strips per group, programs per multiprocessor."""

    m: int = 128
    n: int = 128
    k: int = 64
    warps: int = 8
    stages: int = 4
    group: int = 8
    resident: int = 1


def why_not(x: Tensor, *others: Tensor | None) -> list[str]:
    """Reasons why the kernel can't run on these operands."""
    reasons = why_no_triton(x, *others, capability=(9, 0))  # tiles arrive by TMA
    if x.shape[-1] % 8:
        reasons.append(f"TMA needs rows of a multiple of 16 bytes, got {x.shape[-1]} channels")
    if not all(t.is_contiguous() for t in (x, *others) if t is not None):
        reasons.append("contiguous operands only")
    return reasons


def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: Tiles,
    *,
    taps: int = 1,
    shift: int = 0,
    rows: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    geglu: bool = False,
    gelu: bool = False,
    inplace: bool = False,
) -> Tensor:
    """x (B, R, K) contiguous times weight (N, taps * K): returns (B, R, N), or (B, R, N / 2) with `geglu`.

    Tap i multiplies the rows (i - taps // 2) * shift further on by weight[:, i * K : (i + 1) * K], which is finite.
    bias: (N,). rows: (G, N), each added to B * R / G successive rows. residual: of the result's shape; inplace: the
    result takes its place. geglu: columns 2j and 2j + 1 are value and gate, and value * gelu(gate) is stored. gelu,
    scale (1,): of the product with its bias, or of value * gelu(gate), before rows and residual.
    """
    orbits, length, k = x.shape
    n = weight.shape[0]
    width = n // 2 if geglu else n
    if inplace and residual is not None:
        out = residual
    else:
        out = torch.empty(orbits, length, width, dtype=x.dtype, device=x.device)
    count = orbits * triton.cdiv(length, tiles.m) * triton.cdiv(n, tiles.n)
    programs = min(count, multiprocessors(x.device) * tiles.resident)
    gemm_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [1, tiles.m, tiles.k]),
        TensorDescriptor.from_tensor(weight, [tiles.n, tiles.k]),
        bias, rows, residual, scale, out, orbits, length, n, k, shift,
        1 if rows is None else orbits * length // len(rows),
        taps, bias is not None, rows is not None, residual is not None, scale is not None, geglu, gelu,
        tiles.m, tiles.n, tiles.k, tiles.group, programs,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out
