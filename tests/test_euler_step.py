"""The step behind the network against the equations of its sources, written out in float64."""

import math

import pytest
import torch

from sv3d_fast.kernels.euler_step import euler_step


def by_the_book(output, x, scales, sigma, following):
    """EDM's preconditioning with unit data variance, sgm's guider and Algorithm 1 without its correction, per frame."""
    moved = torch.empty_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            halves = [half[b, t].permute(2, 0, 1) for half in output]
            c_skip, c_out = 1 / (sigma**2 + 1), -sigma / math.sqrt(sigma**2 + 1)
            clean = [c_out * half + c_skip * x[b, t] for half in halves]
            guided = clean[0] + scales[t] * (clean[1] - clean[0]) if len(clean) == 2 else clean[0]
            slope = (x[b, t] - guided) / sigma
            moved[b, t] = x[b, t] + (following - sigma) * slope
    return moved, (moved / math.sqrt(following**2 + 1)).permute(0, 1, 3, 4, 2)


def given(halves, orbits, frames, height, width, channels, sigma):
    torch.manual_seed(4)
    output = torch.randn(halves, orbits, frames, height, width, channels, dtype=torch.float64)
    x = torch.randn(orbits, frames, channels, height, width, dtype=torch.float64) * sigma
    return output, x, torch.rand(frames, dtype=torch.float64) * 3


@pytest.mark.parametrize(
    ("shape", "sigma", "following"),
    [((2, 3, 5, 7, 3, 4), 700.0, 620.0), ((1, 2, 3, 1, 5, 3), 0.7, 0.1), ((2, 1, 1, 1, 1, 1), 0.002, 0.0)],
)
def test_equations(shape, sigma, following):
    arguments = (*given(*shape, sigma), sigma, following)
    made, seen = euler_step(*arguments)
    expected, expected_seen = by_the_book(*arguments)
    torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(seen, expected_seen, rtol=1e-10, atol=1e-10)
    assert seen.is_contiguous()


def test_last_step_returns_the_prediction():
    output, x, _ = given(1, 2, 3, 4, 5, 6, 0.002)
    made, seen = euler_step(output, x, torch.ones(3), 0.002, 0.0)
    clean = output[0].movedim(-1, 2) * (-0.002 / math.sqrt(1 + 0.002**2)) + x / (1 + 0.002**2)
    torch.testing.assert_close(made, clean)
    torch.testing.assert_close(seen, clean.movedim(2, -1))


def test_latents_stay_wide_behind_a_16_bit_network():
    output, x, scales = given(2, 1, 3, 4, 5, 4, 300.0)
    made, seen = euler_step(output.bfloat16(), x.float(), scales.float(), 300.0, 200.0)
    assert (made.dtype, seen.dtype) == (torch.float32, torch.bfloat16)
    exact, _ = euler_step(output.bfloat16().double(), x, scales, 300.0, 200.0)
    assert float((made - exact).norm() / exact.norm()) < 1e-6
