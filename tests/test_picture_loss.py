"""What decoded frames are worth in training."""

import math

import pytest
import torch

from sv3d_fast.mini.picture_loss import FLOOR, IOU_WEIGHT, MSE_WEIGHT, SSIM_WEIGHT, picture_loss, picture_terms

pytestmark = pytest.mark.usefixtures("one_thread")


def scene():
    """A dark square on white, (1, 24, 20, 3), and its mask."""
    true, alpha = torch.ones(1, 24, 20, 3), torch.zeros(1, 24, 20)
    true[:, 6:16, 4:14], alpha[:, 6:16, 4:14] = 0.3, 1.0
    return true, alpha


def test_the_truth_costs_next_to_nothing():
    true, alpha = scene()
    error, ssim, iou = picture_terms(true.clone(), true, alpha)[:, 0].tolist()
    assert error == pytest.approx(math.log(FLOOR))
    assert ssim == pytest.approx(0, abs=1e-5)
    assert 0 <= iou < 0.02


def test_terms_are_the_figures_they_stand_for():
    true, alpha = scene()
    made = true.clone()
    made[:, 6:16, 14:19] = 0.3  # half as wide again
    error, ssim, iou = picture_terms(made, true, alpha)[:, 0].tolist()
    assert math.exp(error) == pytest.approx(0.49 * 50 / (24 * 20) + FLOOR, rel=1e-4)
    assert 0.05 < ssim < 1
    assert iou == pytest.approx(1 / 3, abs=0.02)


def test_what_may_be_object_or_not_is_told_which():
    """Grey far from white has a gradient of the silhouettes, up where nothing is and down where something is."""
    true, alpha = scene()
    made = torch.full_like(true, 0.8).requires_grad_()
    picture_terms(made, true, alpha)[2].sum().backward()
    gradient = made.grad.sum(-1)  # of the darkest channel
    assert (gradient[alpha == 0] < 0).all()
    assert (gradient[alpha == 1] > 0).all()
    assert gradient.abs().min() > 1e-4
    white = torch.ones_like(true).requires_grad_()
    picture_terms(white, true, alpha)[2].sum().backward()
    assert not white.grad.any()  # what is white has nothing to give up


def test_loss_is_the_weighted_sum():
    terms = torch.tensor([[1.0, 2.0], [0.5, 0.25], [0.1, 0.2]])
    expected = [MSE_WEIGHT * a + SSIM_WEIGHT * b + IOU_WEIGHT * c for a, b, c in terms.T.tolist()]
    assert picture_loss(terms).tolist() == pytest.approx(expected)
