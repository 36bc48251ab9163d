"""What decoded frames are worth, by the figures that the embedded model is judged by."""

import torch
from torch import Tensor

from sv3d_fast.kernels.ssim import ssim

from .evaluate import MASK_THRESHOLD

# Of the step from white to object, in the logarithm of the difference from white: sharp on the white side, and on the
# other with a gradient for what is grey because it may be object or not.
SOFTNESS = 0.5
WHITE = 0.5 / 255  # differences below are none
FLOOR = 1e-4  # added to squared errors, 40 dB: frames that are right already must not outweigh the others
MSE_WEIGHT, SSIM_WEIGHT, IOU_WEIGHT = 0.5, 2.0, 1.5


def picture_terms(made: Tensor, true: Tensor, alpha: Tensor) -> Tensor:
    """(3, N) of each picture: logarithm of the squared error, 1 - SSIM and 1 - IoU of the silhouettes; low is good.

    made: (N, H, W, 3) float32 on white, differentiable. true: the same shape in [0, 1]. alpha: (N, H, W) in [0, 1].
    A made picture's silhouette is what differs from white by MASK_THRESHOLD, as a sigmoid of the logarithm.
    """
    error = ((made - true).square().mean((1, 2, 3)) + FLOOR).log()
    darkness = (1 - made.amin(-1)).clamp_min(WHITE) * (255 / MASK_THRESHOLD)
    mask, solid = torch.sigmoid(darkness.log() / SOFTNESS), (alpha >= 0.5).float()
    shared = (mask * solid).sum((1, 2))
    union = mask.sum((1, 2)) + solid.sum((1, 2)) - shared
    return torch.stack([error, 1 - ssim(made, true), 1 - shared / union.clamp_min(1)])


def picture_loss(terms: Tensor) -> Tensor:
    """(N,) the weighted sum of (3, N) terms."""
    return MSE_WEIGHT * terms[0] + SSIM_WEIGHT * terms[1] + IOU_WEIGHT * terms[2]
