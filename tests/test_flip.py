"""FLIP against the authors' program and against what the paper's formulas give by hand."""

import pytest
import torch

from sv3d_fast.scene.flip import flip


def pattern(height=37, width=53):
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    image = torch.stack([0.5 + 0.5 * torch.sin(0.2 * x + 0.1 * y), 0.5 + 0.5 * torch.cos(0.3 * y), x / width], -1)
    return image, 0.02 * torch.sin(x * y / 9)[..., None]


def test_it_agrees_with_flip_evaluator():
    image, noise = pattern()
    moved = image.roll((2, 3), (0, 1)) * 0.9 + 0.05
    noisy = (image + noise).clamp(0, 1)
    both = flip(torch.stack([moved, noisy]), torch.stack([image, image]))
    # flip-evaluator 1.7: evaluate(..., "LDR") on the same arrays
    assert both.tolist() == pytest.approx([0.74900275, 0.02598121], abs=2e-5)


def test_plain_greys_differ_by_their_lightness():
    def lightness(grey):
        y = ((grey + 0.055) / 1.055) ** 2.4
        return 116 * y ** (1 / 3) - 16

    largest = 41.2760  # of Hunt-adjusted green and blue, to the power 0.7
    difference = abs(lightness(0.5) - lightness(0.6)) ** 0.7
    images = [torch.full((9, 11, 3), grey) for grey in (0.5, 0.6)]
    assert float(flip(*images)) == pytest.approx(0.95 * difference / (0.4 * largest), rel=1e-4)


def test_it_is_zero_for_equal_images_and_symmetric():
    image, noise = pattern()
    other = (image + 3 * noise).clamp(0, 1)
    assert float(flip(image, image)) == 0
    assert float(flip(image, other)) == pytest.approx(float(flip(other, image)))
    assert 0 < float(flip(image, other)) < 1


def test_other_shapes_are_named():
    for image, truth in ((torch.rand(4, 5, 3), torch.rand(5, 4, 3)), (torch.rand(4, 3), torch.rand(4, 3))):
        with pytest.raises(ValueError, match="image: expected"):
            flip(image, truth)
