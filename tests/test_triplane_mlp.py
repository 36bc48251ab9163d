"""Sampling and decoding of feature planes, against loops over points, taps and neurons in float64."""

import math

import pytest
import torch

from sv3d_fast.kernels.op import UnsupportedError
from sv3d_fast.kernels.triplane_mlp import _random_mlp, triplane_grid, triplane_points


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def decoded(x: list[float], mlp) -> list[float]:
    weights, biases, last, last_bias = (t.tolist() for t in mlp)
    x = [silu(v) for v in x]
    for layer, bias in zip(weights, biases, strict=True):
        x = [silu(sum(w * v for w, v in zip(row, x, strict=True)) + b) for row, b in zip(layer, bias, strict=True)]
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(last, last_bias, strict=True)]


def sampled(plane: torch.Tensor, along_columns: float, along_rows: float) -> torch.Tensor:
    """Bilinear, pixel i's centre at (2 i + 1) / S - 1, zero beyond the border."""
    side = len(plane)
    total = torch.zeros(plane.shape[2], dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            dx = abs((along_columns + 1) * side / 2 - (column + 0.5))
            dy = abs((along_rows + 1) * side / 2 - (row + 0.5))
            total += max(0.0, 1 - dx) * max(0.0, 1 - dy) * plane[row, column]
    return total


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double().cpu() - expected).norm() / expected.norm())


def points_case():
    """Planes, the first bias, points and the MLP in float64, and the outputs."""
    draw, mlp = _random_mlp("cpu", 3, 16, 4)
    mlp = tuple(t.double() for t in mlp)
    planes, bias = draw(3, 5, 5, 16).double(), draw(16).double()
    inner = 2.2 * torch.rand(21, 3, generator=torch.Generator().manual_seed(2)).double() - 1.1
    corners = torch.tensor([[-1, -1, -1], [1, 1, 1], [1, -1, 0], [0, 0, 0], [1.2, 1.19, -1.21], [9, -40, 3]]).double()
    points = torch.cat([inner, corners])
    expected = []
    for x, y, z in points.tolist():
        summed = sampled(planes[0], x, y) + sampled(planes[1], x, z) + sampled(planes[2], y, z) + bias
        expected.append(decoded(summed.tolist(), mlp))
    return planes, bias, points, mlp, torch.tensor(expected, dtype=torch.float64)


def grid_case():
    """Tables, every index of the grid in some order, the MLP, and the outputs."""
    draw, mlp = _random_mlp("cpu", 2, 16, 4)
    mlp, tables = tuple(t.double() for t in mlp), draw(3, 3, 3, 16).double()
    indices = torch.randperm(27, generator=torch.Generator().manual_seed(1)).int()
    expected = []
    for index in indices.tolist():
        x, y, z = index // 9, index // 3 % 3, index % 3
        expected.append(decoded((tables[0, x, y] + tables[1, x, z] + tables[2, y, z]).tolist(), mlp))
    return tables, indices, mlp, torch.tensor(expected, dtype=torch.float64)


def test_points_equal_a_loop():
    planes, bias, points, mlp, expected = points_case()
    assert error(triplane_points(planes, bias, points, *mlp), expected) < 1e-12
    single = triplane_points(*(t.float() for t in (planes, bias, points, *mlp)))
    assert single.dtype == torch.float32
    assert error(single, expected) < 1e-5
    assert torch.equal(triplane_points(planes, bias, points[:0], *mlp), expected[:0])


def test_grid_points_equal_a_loop():
    tables, indices, mlp, expected = grid_case()
    before = tables.clone()
    assert error(triplane_grid(tables, indices, *mlp), expected) < 1e-12
    assert torch.equal(tables, before)
    assert error(triplane_grid(tables, indices.long(), *mlp), expected) < 1e-12
    density = triplane_grid(tables, indices, *mlp[:2], mlp[2][:1], mlp[3][:1])
    assert error(density, expected[:, :1]) < 1e-12


def test_why_the_kernel_does_not_run():
    tables, indices, mlp, _ = grid_case()
    with pytest.raises(UnsupportedError, match="16-bit tensors only"):
        triplane_grid(tables, indices, *mlp, implementation="triton")
    half = [t.half() for t in mlp]
    with pytest.raises(UnsupportedError, match="got 9 of 16"):
        triplane_grid(tables.half(), indices, half[0].repeat(5, 1, 1)[:9], *half[1:], implementation="triton")


@pytest.mark.gpu
def test_kernels_on_cuda_equal_a_loop_in_float64():
    def cuda(*tensors):
        return [t.cuda() if not t.is_floating_point() else t.half().cuda() for t in tensors]

    planes, bias, points, mlp, expected = points_case()
    got = triplane_points(*cuda(planes, bias), points.float().cuda(), *cuda(*mlp), implementation="triton")
    assert error(got, expected) <= 2e-3
    tables, indices, mlp, expected = grid_case()
    got = triplane_grid(*cuda(tables, indices, *mlp), implementation="triton")
    assert error(got, expected) <= 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 127, 100_003])
def test_kernels_on_cuda_at_full_size(count):
    """The official decoder's sizes and planes, many tiles a program, against the reference in float64."""
    draw, mlp = _random_mlp("cuda", 8, 64, 4)
    wide = [t.double() for t in mlp]
    indices = torch.randint(70**3, (count,), generator=torch.Generator().manual_seed(1), dtype=torch.int32).cuda()
    tables = draw(3, 70, 70, 64)
    got = triplane_grid(tables, indices, *mlp, implementation="triton")
    bound = 2e-3 if count > 100 else 5e-3  # of one point, whose roundings don't average out
    assert error(got, triplane_grid(tables.double(), indices, *wide).cpu()) <= bound
    planes, bias, points = draw(3, 64, 64, 64), draw(64), 0.6 * draw(count, 3).float()
    got = triplane_points(planes, bias, points, *mlp, implementation="triton")
    expected = triplane_points(planes.double(), bias.double(), points.double(), *wide)
    assert error(got, expected.cpu()) <= bound
