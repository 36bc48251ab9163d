"""Group normalisation of channels-last activations, with what stands before and after it in a residual block.

Three launches: mean and squared deviation of each channel over a strip of rows, their combination to a scale and a
shift per channel, and one pass that applies them. Deviations are from the mean of a strip's first tile and strips are
combined by Chan et al. 1979, so a large mean costs no digits; the order is fixed, so the same input gives the same
bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sv3d_fast.kernels.op import Implementation, Op
from sv3d_fast.kernels.triton_support import multiprocessors, triton, why_no_triton

BLOCK_P = 64  # rows of a tile


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    skip: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Group normalisation of [x + rows, skip] over the rows and the channels of each group, then SiLU if asked for.

    x: (N, P, c). skip: (N, P, c2), whose channels follow those of x. rows: (N, c) or (1, c), added to x first.
    weight, bias: (c + c2,). Returns (N, P, c + c2). Statistics are float32 at least. Raises ValueError where `groups`
    doesn't divide the channels.
    """
    if (x.shape[-1] + (0 if skip is None else skip.shape[-1])) % groups:
        raise ValueError(f"groups: expected a divisor of the channels of x and skip, got {groups}")
    wide = x if x.dtype == torch.float64 else x.float()
    if rows is not None:
        wide = wide + rows[:, None]
    if skip is not None:
        wide = torch.cat([wide, skip.to(wide.dtype)], -1)
    grouped = wide.unflatten(-1, (groups, -1))
    variance, mean = torch.var_mean(grouped, dim=(1, 3), correction=0, keepdim=True)
    y = ((grouped - mean) * torch.rsqrt(variance + eps)).flatten(2) * weight + bias
    return (F.silu(y) if silu else y).to(x.dtype)


def residual_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x + residual + rows, the first two (N, P, c), and its group normalisation (with SiLU if asked for)."""
    total = x + residual if rows is None else x + residual + rows[:, None]
    return total, reference(total, weight, bias, groups, eps, silu)


if triton is not None:
    import triton.language as tl

    @triton.jit
    def _tile(
        x, skip, rows, n, c0, row, mask, length, first, second, row_stride,
        HAS_SKIP: tl.constexpr, HAS_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """Rows `row` of the channels from c0 on, float32; a block lies in x or in skip, never in both."""
        channels = c0 + tl.arange(0, BLOCK_C)
        source, width, begin = x, first, 0
        if HAS_SKIP:
            if c0 >= first:
                source, width, begin = skip, second, first
        at = (n * length + row).to(tl.int64)[:, None] * width + (channels - begin)[None, :]
        v = tl.load(source + at, mask[:, None], 0.0).to(tl.float32)
        if HAS_ROWS:
            more = tl.load(rows + n * row_stride + channels, channels < first, 0.0).to(tl.float32)
            v += tl.where(mask[:, None], more[None, :], 0.0)
        return v

    @triton.jit
    def statistics_kernel(
        x, skip, rows, residual, total, means, squares, length, first, second, row_stride, strip,
        HAS_SKIP: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        split, c0, n = tl.program_id(0), tl.program_id(1) * BLOCK_C, tl.program_id(2)
        channels = c0 + tl.arange(0, BLOCK_C)
        sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        squares_of = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        pivot = tl.zeros((BLOCK_C,), tl.float32)
        begin, end = split * strip, min((split + 1) * strip, length)
        for start in range(begin, end, BLOCK_P):
            row = start + tl.arange(0, BLOCK_P)
            mask = row < length
            v = _tile(x, skip, rows, n, c0, row, mask, length, first, second, row_stride, HAS_SKIP, HAS_ROWS, BLOCK_C)
            if HAS_RESIDUAL:
                at = (n * length + row).to(tl.int64)[:, None] * first + channels[None, :]
                v += tl.load(residual + at, mask[:, None], 0.0).to(tl.float32)
                v = v.to(total.dtype.element_ty)
                tl.store(total + at, v, mask[:, None])
                v = v.to(tl.float32)  # as the apply pass will read it
            if start == begin:
                pivot = tl.sum(v, 0) / min(end - begin, BLOCK_P)
            shifted = tl.where(mask[:, None], v - pivot[None, :], 0.0)
            sums += shifted
            squares_of += shifted * shifted
        count = (end - begin) * 1.0
        drift = tl.sum(sums, 0) / count
        mean = pivot + drift
        square = tl.sum(squares_of, 0) - count * drift * drift
        place = (n * tl.num_programs(0) + split) * (first + second) + channels
        tl.store(means + place, mean)
        tl.store(squares + place, square)

    @triton.jit
    def combine_kernel(
        means, squares, weight, bias, scale, shift, splits, strip, length, channels, group, eps,
        BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
    ):  # fmt: skip
        n, c0 = tl.program_id(0), tl.program_id(1) * group
        channel = tl.arange(0, BLOCK_G)
        inside = channel < group
        total = tl.zeros((BLOCK_S, BLOCK_G), tl.float32)
        for start in range(0, splits, BLOCK_S):
            split = start + tl.arange(0, BLOCK_S)
            mask = (split < splits)[:, None] & inside[None, :]
            count = tl.minimum(length - split * strip, strip).to(tl.float32)[:, None]
            total += (
                tl.load(means + (n * splits + split)[:, None] * channels + (c0 + channel)[None, :], mask, 0.0) * count
            )
        size = length * 1.0 * group
        mean = tl.sum(total) / size
        total = tl.zeros((BLOCK_S, BLOCK_G), tl.float32)
        for start in range(0, splits, BLOCK_S):
            split = start + tl.arange(0, BLOCK_S)
            mask = (split < splits)[:, None] & inside[None, :]
            place = (n * splits + split)[:, None] * channels + (c0 + channel)[None, :]
            count = tl.minimum(length - split * strip, strip).to(tl.float32)[:, None]
            delta = tl.load(means + place, mask, 0.0) - mean
            total += tl.where(mask, tl.load(squares + place, mask, 0.0) + count * delta * delta, 0.0)
        factor = tl.rsqrt(tl.sum(total) / size + eps)
        w = tl.load(weight + c0 + channel, inside, 0.0).to(tl.float32) * factor
        b = tl.load(bias + c0 + channel, inside, 0.0).to(tl.float32) - mean * w
        tl.store(scale + n * channels + c0 + channel, w, inside)
        tl.store(shift + n * channels + c0 + channel, b, inside)

    @triton.jit
    def apply_kernel(
        x, skip, rows, scale, shift, y, length, first, second, row_stride,
        SILU: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_ROWS: tl.constexpr,
        BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
        c0, n = tl.program_id(1) * BLOCK_C, tl.program_id(2)
        mask = row < length
        v = _tile(x, skip, rows, n, c0, row, mask, length, first, second, row_stride, HAS_SKIP, HAS_ROWS, BLOCK_C)
        width = first + second
        channels = c0 + tl.arange(0, BLOCK_C)
        v = v * tl.load(scale + n * width + channels)[None, :] + tl.load(shift + n * width + channels)[None, :]
        if SILU:
            v = v / (1.0 + tl.exp(-v))
        at = (n * length + row).to(tl.int64)[:, None] * width + channels[None, :]
        tl.store(y + at, v.to(y.dtype.element_ty), mask[:, None])


def channel_block(*widths: int) -> int:
    """The largest power of two up to 64 that divides every width: a tile's channels come from one tensor."""
    block = 64
    while any(width % block for width in widths):
        block //= 2
    return block


def _launch(x, weight, bias, groups, eps, silu, skip, rows, residual):
    n, length, first = x.shape
    second = 0 if skip is None else skip.shape[-1]
    channels = first + second
    block = channel_block(first, second)
    # about eight programs per multiprocessor, each a whole number of tiles high
    wanted = max(1, 8 * multiprocessors(x.device) * block // (n * channels))
    strip = triton.cdiv(triton.cdiv(length, wanted), BLOCK_P) * BLOCK_P
    splits = triton.cdiv(length, strip)
    means, squares = torch.empty(2, n, splits, channels, dtype=torch.float32, device=x.device)
    scale, shift = torch.empty(2, n, channels, dtype=torch.float32, device=x.device)
    total = None if residual is None else torch.empty_like(x)
    row_stride = 0 if rows is None or len(rows) == 1 else first
    statistics_kernel[(splits, channels // block, n)](
        x, skip, rows, residual, total, means, squares, length, first, second, row_stride, strip,
        skip is not None, rows is not None, residual is not None, BLOCK_P, block, num_warps=4,
    )  # fmt: skip
    group = channels // groups
    combine_kernel[(n, groups)](
        means, squares, weight, bias, scale, shift, splits, strip, length, channels, group, eps,
        min(64, triton.next_power_of_2(splits)), triton.next_power_of_2(group), num_warps=4,
    )  # fmt: skip
    y = torch.empty(n, length, channels, dtype=x.dtype, device=x.device)
    apply_kernel[(triton.cdiv(length, BLOCK_P), channels // block, n)](
        x if total is None else total, skip, rows, scale, shift, y, length, first, second, row_stride,
        silu, skip is not None, rows is not None and total is None, BLOCK_P, block, num_warps=4,
    )  # fmt: skip
    return y, total


def _run(x, weight, bias, groups, eps, silu, skip=None, rows=None):
    return _launch(x, weight, bias, groups, eps, silu, skip, rows, None)[0]


def _run_residual(x, residual, weight, bias, groups, eps, silu, rows=None):
    y, total = _launch(x, weight, bias, groups, eps, silu, None, rows, residual)
    return total, y


def why_not_fused(x, weight, bias, groups, eps, silu, skip=None, rows=None) -> list[str]:
    """Reasons why the fused kernels can't run on these operands."""
    return _reasons(groups, x, weight, bias, skip, rows)


def _why_not_residual(x, residual, weight, bias, groups, eps, silu, rows=None) -> list[str]:
    return _reasons(groups, x, weight, bias, None, residual, rows)


def _reasons(groups, x, weight, bias, skip, *others) -> list[str]:
    reasons = why_no_triton(x, skip, *others, weight, bias)
    if (x.shape[-1] + (0 if skip is None else skip.shape[-1])) % groups:
        reasons.append(f"groups must divide the channels, got {groups}")
    if not all(t.is_contiguous() for t in (x, skip, *others) if t is not None):
        reasons.append("contiguous operands only")
    return reasons


def _examples(device: str):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, torch.float16 if device == "cuda" else torch.float32)

    for n, length, first, second in ((2, 131, 64, 0), (3, 65, 40, 24), (1, 1, 32, 0)):
        skip = random(n, length, second) if second else None
        yield random(n, length, first) + 30, random(first + second), random(first + second), 32, 1e-5, True, skip
    for count in (2, 1):
        yield random(2, 70, 64), random(64), random(64), 32, 1e-6, False, None, random(count, 64)


def _residual_examples(device: str):
    for x, weight, bias, groups, eps, silu, skip, *rows in _examples(device):
        if skip is None:
            # of opposite means, so that the sum loses no digits to its rounding
            yield x, x.flip(0) - 2 * x.mean().round(), weight, bias, groups, eps, silu, *rows


group_norm = Op(
    name="group_norm",
    reference=reference,
    implementations=[Implementation("triton", _run, why_not_fused)],
    examples=_examples,
    tolerance=1e-3,  # 16-bit rounding of the result
    source="Wu and He 2018, Group Normalization",
)
residual_group_norm = Op(
    name="residual_group_norm",
    reference=residual_reference,
    implementations=[Implementation("triton", _run_residual, _why_not_residual)],
    examples=_residual_examples,
    tolerance=1e-3,
    source="Wu and He 2018, Group Normalization",
)
