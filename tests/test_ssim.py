"""Structural similarity: against scikit-image on the interior, against finite differences, native against torch."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from sv3d_fast.kernels.op import UnsupportedError
from sv3d_fast.kernels.ssim import RADIUS, ssim


def pair(shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=g)
    return x.to(dtype), (x + 0.2 * torch.randn(shape, generator=g)).clamp(0, 1).to(dtype)


def test_interior_of_the_definition_is_that_of_scikit_image():
    x, y = (t[0].numpy() for t in pair((1, 41, 33, 3)))
    _, full = structural_similarity(
        x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=-1, full=True
    )
    inside = slice(RADIUS, -RADIUS)
    np.testing.assert_allclose(zero_padded_map(x, y)[inside, inside], full[inside, inside], atol=2e-6)


@pytest.mark.parametrize("implementation", ["csrc", "reference"])
@pytest.mark.parametrize("shape", [(2, 23, 17, 3), (1, 3, 40, 1)])
def test_value_is_the_mean_of_the_definition(implementation, shape):
    x, y = pair(shape)
    expected = [zero_padded_map(a.numpy(), b.numpy()).mean() for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(ssim(x, y, implementation=implementation), expected, atol=1e-6)


def zero_padded_map(x, y):
    """The definition, one window at a time, in float64."""
    offsets = np.arange(-RADIUS, RADIUS + 1)
    taps = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    border = ((RADIUS, RADIUS), (RADIUS, RADIUS), (0, 0))
    x, y = np.pad(x.astype(np.float64), border), np.pad(y.astype(np.float64), border)
    height, width = x.shape[0] - 2 * RADIUS, x.shape[1] - 2 * RADIUS
    result = np.empty((height, width, x.shape[2]))
    for i in range(height):
        for j in range(width):
            a, b = (z[i : i + 11, j : j + 11] for z in (x, y))
            w = window[..., None]
            ma, mb = (w * a).sum((0, 1)), (w * b).sum((0, 1))
            va, vb = (w * a * a).sum((0, 1)) - ma**2, (w * b * b).sum((0, 1)) - mb**2
            cov = (w * a * b).sum((0, 1)) - ma * mb
            result[i, j] = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    return result


@pytest.mark.parametrize("shape", [(2, 37, 53, 3), (1, 1, 1, 1), (3, 5, 4, 2), (1, 3, 90, 1), (2, 64, 64, 4)])
def test_native_agrees_with_the_reference(shape):
    x, y = pair(shape)
    weights = torch.arange(1, shape[0] + 1)
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    got, expected = ssim(a, y, implementation="csrc"), ssim(b, y.double(), implementation="reference")
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)
    assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [(2, 37, 53, 3), (1, 1, 1, 1), (3, 5, 4, 2), (1, 3, 90, 1), (1, 49, 130, 1), (2, 100, 61, 4), (1, 8, 5, 64)],
)
def test_cuda_agrees_with_the_cpu(shape):
    x, y = pair(shape)
    weights = torch.arange(1, shape[0] + 1)
    a, b = x.cuda().requires_grad_(), x.clone().requires_grad_()
    got, expected = ssim(a, y.cuda(), implementation="cuda"), ssim(b, y, implementation="csrc")
    (got * weights.cuda()).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(got.cpu(), expected, atol=2e-6, rtol=1e-5)
    assert (a.grad.cpu() - b.grad).norm() <= 1e-5 * b.grad.norm()
    alone = ssim(x.cuda(), y.cuda(), implementation="cuda")  # no derivatives are kept
    assert torch.equal(alone, got.detach())


@pytest.mark.gpu
def test_cuda_gives_the_same_bits_twice_and_takes_strided_inputs():
    x, y = (t.cuda() for t in pair((3, 70, 90, 3)))
    turned = x.movedim(-1, 1).contiguous().movedim(1, -1)
    assert torch.equal(ssim(x, y, implementation="cuda"), ssim(turned, y, implementation="cuda"))
    gradients = []
    for image in (x, turned):
        value = image.clone().requires_grad_()
        gradients += torch.autograd.grad(ssim(value, y, implementation="cuda").sum(), value)
    assert torch.equal(*gradients)


@pytest.mark.gpu
def test_cuda_says_that_it_takes_no_more_than_64_channels():
    x, y = (t.cuda() for t in pair((1, 4, 4, 65)))
    assert ssim.choose(x, y).name == "reference"
    with pytest.raises(UnsupportedError, match="up to 64 channels, got 65"):
        ssim(x, y, implementation="cuda")


def test_gradient_is_the_slope():
    x, y = pair((1, 9, 7, 2))
    value = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ssim(value, y, implementation="csrc").sum(), value)
    for index in [(0, 0, 0, 0), (0, 4, 3, 1), (0, 8, 6, 0)]:
        up, down = x.clone(), x.clone()
        up[index] += 1e-2
        down[index] -= 1e-2
        slope = (ssim(up, y, implementation="csrc") - ssim(down, y, implementation="csrc")) / 2e-2
        assert slope.item() == pytest.approx(gradient[index].item(), rel=0.02, abs=1e-4)


def test_gradcheck_of_the_reference():
    x, y = pair((1, 3, 4, 1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: ssim(a, y), (x.requires_grad_(),))


@pytest.mark.parametrize("implementation", ["csrc", "reference"])
def test_equal_images_are_one_with_no_slope(implementation):
    x, _ = pair((2, 20, 21, 3))
    value = x.clone().requires_grad_()
    result = ssim(value, x, implementation=implementation)
    result.sum().backward()
    torch.testing.assert_close(result.detach(), torch.ones(2))
    assert value.grad.abs().max() < 1e-5


def test_same_bits_twice_and_strided_inputs():
    x, y = pair((3, 40, 50, 3))
    turned = x.movedim(-1, 1).contiguous().movedim(1, -1)
    assert torch.equal(ssim(x, y, implementation="csrc"), ssim(turned, y, implementation="csrc"))


@pytest.mark.parametrize("implementation", ["csrc", "reference"])
def test_bad_input_is_named(implementation):
    x, y = pair((2, 8, 8, 3))
    with pytest.raises(ValueError, match="x: expected shape"):
        ssim(x[0], y[0], implementation=implementation)
    with pytest.raises(ValueError, match="x: expected shape"):
        ssim(x[:0], y[:0], implementation=implementation)
    with pytest.raises(ValueError, match="y: expected x's shape"):
        ssim(x, y[:1], implementation=implementation)
    with pytest.raises(ValueError, match="y: expected x's shape"):
        ssim(x, y.double(), implementation=implementation)
    with pytest.raises(ValueError, match="gets no gradient"):
        ssim(x, y.clone().requires_grad_(), implementation=implementation)


def test_implementation_says_why_it_can_not_run():
    x, y = pair((1, 8, 8, 3), dtype=torch.float64)
    assert ssim.choose(x, y).name == "reference"
    with pytest.raises(UnsupportedError, match="needs float32"):
        ssim(x, y, implementation="csrc")
