"""A field of three feature planes, sampled and decoded by a small MLP: a point's activations never leave its program.

The MLP's first layer is linear, and so is sampling: it has been applied to the planes, whose three samples are summed.
What a call takes of the MLP is the rest: weights (L, n, n), rows of outputs as nn.Linear has them, biases (L, n), and
the last layer (K, n) and (K,). SiLU follows the sum of samples and each of the L layers, not the last.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sv3d_fast.kernels.op import Implementation, Op
from sv3d_fast.kernels.triton_support import INTERPRETED, multiprocessors, triton, why_no_triton

PLANES = ((0, 1), (0, 2), (1, 2))  # the axes of each plane
WARPS = 4
GRID = (128, 3, 2)  # points of a program at a time, stages, programs per multiprocessor, which fill its shared memory
POINTS = (64, 1, 3)
WIDTHS = (16, 32, 64)  # neurons a layer, of which a program holds all layers' weights
MAX_LAYERS = 8


def _decoded(summed: Tensor, weights: Tensor, biases: Tensor, last: Tensor, last_bias: Tensor) -> Tensor:
    x = F.silu(summed)
    for weight, bias in zip(weights, biases, strict=True):
        x = F.silu(F.linear(x, weight, bias))
    return F.linear(x, last, last_bias).to(_wide(x))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def grid_reference(
    tables: Tensor, indices: Tensor, weights: Tensor, biases: Tensor, last: Tensor, last_bias: Tensor
) -> Tensor:
    """The MLP's outputs (N, K), float32 at least, at points of a grid of R ** 3.

    tables: (3, R, R, n), the planes xy, xz and yz at the projections of all grid points, the first layer's bias among
    them. indices: (N,) int32 or int64, (x * R + y) * R + z; they have to lie on the grid, which isn't checked.
    """
    side = tables.shape[1]
    at = (indices // side**2, indices // side % side, indices % side)
    first, second, third = (table[at[a], at[b]].to(_wide(table)) for table, (a, b) in zip(tables, PLANES, strict=True))
    return _decoded(first.add_(second).add_(third).to(tables.dtype), weights, biases, last, last_bias)


def points_reference(
    planes: Tensor, bias: Tensor, points: Tensor, weights: Tensor, biases: Tensor, last: Tensor, last_bias: Tensor
) -> Tensor:
    """The MLP's outputs (N, K), float32 at least, at points (N, 3), which the planes span from -1 to 1.

    planes: (3, S, S, n), xy, xz and yz, the first axis of each along columns, the second along rows. They are sampled
    bilinearly, zero outside, pixel centres half a pixel from the border. bias: (n,), the first layer's.
    """
    wide = _wide(planes)
    grid = torch.stack([points[:, axes] for axes in PLANES])[:, None].to(wide)
    samples = F.grid_sample(planes.to(wide).permute(0, 3, 1, 2), grid, align_corners=False)  # (3, n, 1, N)
    summed = samples.sum(0)[:, 0].T + bias.to(wide)
    return _decoded(summed.to(planes.dtype), weights, biases, last, last_bias)


if triton is not None:
    import triton.language as tl

    EXACT = tl.constexpr(INTERPRETED)  # the interpreter knows no PTX

    @triton.jit
    def _silu_of_twice(h):
        """silu(2h) = h + h tanh(h) in float16, of float32: one instruction of the special units, to 2^-11."""
        if EXACT:
            return (2 * h / (1 + tl.exp(-2 * h))).to(tl.float16)
        else:
            asm: tl.constexpr = "tanh.approx.f32 $0, $1;"
            t = tl.inline_asm_elementwise(asm, "=f,f", [h], dtype=tl.float32, is_pure=True, pack=1)
            return (h + h * t).to(tl.float16)

    @triton.jit
    def _weights(weights, LAYERS: tl.constexpr, N: tl.constexpr):
        """All layers' weights, (in, out), halved as `_silu_of_twice` needs them; they stay in shared memory."""
        row = tl.arange(0, N)
        held = ()
        for layer in tl.static_range(LAYERS):
            weight = tl.load(weights + layer * N * N + row[:, None] + row[None, :] * N) * 0.5
            held = held + (weight,)  # type: ignore[assignment]  # noqa: RUF005 (Triton unpacks no tuples)
        return held

    @triton.jit
    def _decode(
        summed, held, biases, last, last_bias, out, point, inside,
        LAYERS: tl.constexpr, N: tl.constexpr, OUTPUTS: tl.constexpr,
    ):  # fmt: skip
        """Half the first layer's output, (BLOCK, N) float32, through the rest of the MLP to `out`."""
        column = tl.arange(0, N)
        x = _silu_of_twice(summed)
        for layer in tl.static_range(LAYERS):
            bias = tl.load(biases + layer * N + column).to(tl.float32)
            x = _silu_of_twice(tl.dot(x, held[layer]) + 0.5 * bias[None, :])
        for k in tl.static_range(OUTPUTS):
            row = tl.load(last + k * N + column).to(tl.float32)
            value = tl.sum(x.to(tl.float32) * row[None, :], 1) + tl.load(last_bias + k).to(tl.float32)
            tl.store(out + point * OUTPUTS + k, value, inside)

    @triton.jit(do_not_specialize=["count"])  # of any size, without compiling anew
    def grid_kernel(
        tables, indices, weights, biases, last, last_bias, out, count, side,
        LAYERS: tl.constexpr, N: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        held = _weights(weights, LAYERS, N)
        column = tl.arange(0, N)
        for tile in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
            point = tile * BLOCK + tl.arange(0, BLOCK)
            inside = point < count
            index = tl.load(indices + point, inside, 0).to(tl.int32)  # whose division costs a tenth of 64 bits'
            xy = index // side
            x, y, z = xy // side, xy % side, index % side
            plane = side * side
            at_xy = xy[:, None] * N + column[None, :]
            at_xz = (plane + x * side + z)[:, None] * N + column[None, :]
            at_yz = (2 * plane + y * side + z)[:, None] * N + column[None, :]
            summed = tl.load(tables + at_xy).to(tl.float32) + tl.load(tables + at_xz).to(tl.float32)
            summed += tl.load(tables + at_yz).to(tl.float32)
            _decode(0.5 * summed, held, biases, last, last_bias, out, point, inside, LAYERS, N, OUTPUTS)

    @triton.jit
    def _sample(plane, along_columns, along_rows, side, N: tl.constexpr):
        """(BLOCK, N) float32 of a plane (S, S, N), at coordinates (BLOCK,) from -1 to 1."""
        column = tl.arange(0, N)
        u, v = ((along_columns + 1) * side - 1) * 0.5, ((along_rows + 1) * side - 1) * 0.5
        left, top = tl.floor(u), tl.floor(v)
        summed = tl.zeros((along_columns.shape[0], N), tl.float32)
        for tap in tl.static_range(4):
            a, b = left + tap % 2, top + tap // 2
            inside = (a >= 0) & (a < side) & (b >= 0) & (b < side)
            share = tl.where(inside, (1 - tl.abs(u - a)) * (1 - tl.abs(v - b)), 0.0)
            at = tl.where(inside, b, 0.0).to(tl.int32) * side + tl.where(inside, a, 0.0).to(tl.int32)
            summed += share[:, None] * tl.load(plane + at[:, None] * N + column[None, :]).to(tl.float32)
        return summed

    @triton.jit(do_not_specialize=["count"])  # of any size, without compiling anew
    def points_kernel(
        planes, bias, points, weights, biases, last, last_bias, out, count, side,
        LAYERS: tl.constexpr, N: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        held = _weights(weights, LAYERS, N)
        for tile in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
            point = tile * BLOCK + tl.arange(0, BLOCK)
            inside = point < count
            x = tl.load(points + point * 3, inside, 0.0).to(tl.float32)
            y = tl.load(points + point * 3 + 1, inside, 0.0).to(tl.float32)
            z = tl.load(points + point * 3 + 2, inside, 0.0).to(tl.float32)
            plane = side * side * N
            summed = _sample(planes, x, y, side, N) + _sample(planes + plane, x, z, side, N)
            summed += _sample(planes + 2 * plane, y, z, side, N)
            summed += tl.load(bias + tl.arange(0, N)).to(tl.float32)[None, :]
            _decode(0.5 * summed, held, biases, last, last_bias, out, point, inside, LAYERS, N, OUTPUTS)


def _launch(
    kernel: Any, how: tuple[int, int, int], inputs: tuple[Tensor, ...], places: Tensor, mlp: tuple[Tensor, ...]
) -> Tensor:
    (block, stages, resident), weights, last = how, mlp[0], mlp[2]
    count, side = len(places), inputs[0].shape[1]
    out = torch.empty(count, len(last), device=last.device)
    if count:
        programs = min(triton.cdiv(count, block), multiprocessors(last.device) * resident)
        kernel[(programs,)](
            *inputs, *mlp, out, count, side, len(weights), last.shape[1], len(last), block,
            num_warps=WARPS, num_stages=stages,
        )  # fmt: skip
    return out


def _grid(tables: Tensor, indices: Tensor, *mlp: Tensor) -> Tensor:
    return _launch(grid_kernel, GRID, (tables, indices), indices, mlp)


def _points(planes: Tensor, bias: Tensor, points: Tensor, *mlp: Tensor) -> Tensor:
    return _launch(points_kernel, POINTS, (planes, bias, points), points, mlp)


def _reasons(places: Tensor, planes: Tensor, *mlp: Tensor) -> list[str]:
    weights, last = mlp[-4], mlp[-2]
    reasons = why_no_triton(planes, *mlp)
    if planes.dtype == torch.bfloat16:
        reasons.append("float16 only")
    if last.shape[1] not in WIDTHS or not 1 <= len(weights) <= MAX_LAYERS:
        reasons.append(f"1 to {MAX_LAYERS} layers of {WIDTHS} neurons, got {len(weights)} of {last.shape[1]}")
    if places.device != planes.device or not all(t.is_contiguous() for t in (places, planes, *mlp)):
        reasons.append("contiguous operands on one device only")
    if max(planes.numel(), places.numel() * len(last)) >= 2**31:
        reasons.append("fewer than 2^31 values only")
    return reasons


def _why_not_grid(tables: Tensor, indices: Tensor, *mlp: Tensor) -> list[str]:
    reasons = _reasons(indices, tables, *mlp)
    if tables.shape[1] ** 3 >= 2**31:
        reasons.append(f"grids of fewer than 2^31 points only, got {tables.shape[1]} a side")
    return reasons


def _why_not_points(planes: Tensor, bias: Tensor, points: Tensor, *mlp: Tensor) -> list[str]:
    return _reasons(points, planes, bias, *mlp)


def _random_mlp(device: str, layers: int, n: int, outputs: int) -> tuple[Callable, tuple[Tensor, ...]]:
    """A source of normal random tensors, and the tensors of an MLP whose activations keep their size."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        tensor = scale * torch.randn(shape, generator=generator)
        return tensor.to(device, torch.float16 if device == "cuda" else torch.float32)

    gain = 1.7 * n**-0.5  # SiLU takes about as much away
    mlp = draw(layers, n, n, scale=gain), draw(layers, n, scale=0.1), draw(outputs, n, scale=gain), draw(outputs)
    return draw, mlp


def _grid_examples(device: str):
    for side, count, layers, n, outputs in ((9, 301, 8, 64, 4), (2, 1, 1, 16, 4), (5, 130, 3, 32, 1)):
        draw, mlp = _random_mlp(device, layers, n, outputs)
        indices = torch.randint(side**3, (count,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
        yield draw(3, side, side, n), indices.to(device), *mlp


def _points_examples(device: str):
    for side, count, layers, n, outputs in ((7, 301, 8, 64, 4), (1, 1, 1, 16, 4), (3, 45, 2, 32, 1)):
        draw, mlp = _random_mlp(device, layers, n, outputs)
        yield draw(3, side, side, n), draw(n), 0.7 * draw(count, 3).float(), *mlp  # a third lies outside the cube


_SOURCE = "Chan et al. 2022, Efficient Geometry-aware 3D GANs; Tochilkin et al. 2024, TripoSR"
_TOLERANCE = 3e-3  # nine layers of 16-bit activations, which both sides round; each is within 2e-3 of float64
triplane_grid = Op(
    name="triplane_grid",
    reference=grid_reference,
    implementations=[Implementation("triton", _grid, _why_not_grid)],
    examples=_grid_examples,
    tolerance=_TOLERANCE,
    source=_SOURCE,
)
triplane_points = Op(
    name="triplane_points",
    reference=points_reference,
    implementations=[Implementation("triton", _points, _why_not_points)],
    examples=_points_examples,
    tolerance=_TOLERANCE,
    source=_SOURCE,
)
