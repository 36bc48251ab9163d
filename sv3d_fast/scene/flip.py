"""FLIP: how much two images differ to an observer who flips between them, per pixel, 0 to 1.

Andersson et al., "FLIP: A Difference Evaluator for Alternating Images", HPG 2020 (LDR-FLIP); constants are the paper's.
"""

import math

import torch
import torch.nn.functional as F

PIXELS_PER_DEGREE = 0.7 * 3840 / 0.7 * math.pi / 180  # 0.7 m from a screen 0.7 m wide with 3840 pixels
# Amplitudes and widths of the two Gaussians of the contrast sensitivity, for luminance, red-green and blue-yellow
SENSITIVITY = (((1.0, 0.0047), (0.0, 1e-5)), ((1.0, 0.0053), (0.0, 1e-5)), ((34.1, 0.04), (13.5, 0.025)))
WIDEST = 0.04
COLOR_EXPONENT, SPLIT, SPLIT_VALUE = 0.7, 0.4, 0.95
FEATURE_EXPONENT, FEATURE_WIDTH = 0.5, 0.082  # width in degrees
TO_XYZ = (
    (10135552 / 24577794, 8788810 / 24577794, 4435075 / 24577794),
    (2613072 / 12288897, 8788810 / 12288897, 887015 / 12288897),
    (1425312 / 73733382, 8788810 / 73733382, 70074185 / 73733382),
)


def flip(image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """(...,) mean FLIP of sRGB images (..., H, W, 3) in [0, 1], computed in float64.

    Raises ValueError for shapes that differ or are no images.
    """
    if image.shape != truth.shape or image.ndim < 3 or image.shape[-1] != 3:
        raise ValueError(
            f"image: expected the truth's shape (..., H, W, 3), {tuple(truth.shape)}, got {tuple(image.shape)}"
        )
    shape = image.shape[:-3]
    opponent = [_opponent(_linear(i.double().reshape(-1, *i.shape[-3:]).movedim(-1, 1))) for i in (image, truth)]
    color = _color_difference(*(_hunt(_lab(_filtered(o))) for o in opponent))
    feature = _feature_difference(*((o[:, :1] + 16) / 116 for o in opponent))
    return (color ** (1 - feature)).mean((1, 2)).reshape(shape)


def _linear(srgb: torch.Tensor) -> torch.Tensor:
    return torch.where(srgb > 0.04045, ((srgb.clamp(min=0) + 0.055) / 1.055) ** 2.4, srgb / 12.92)


def _mixed(matrix: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ij,njhw->nihw", matrix, image)


def _matrix(image: torch.Tensor) -> torch.Tensor:
    """Linear RGB to XYZ over that of white."""
    matrix = image.new_tensor(TO_XYZ)
    return matrix / matrix.sum(1, keepdim=True)


def _opponent(rgb: torch.Tensor) -> torch.Tensor:
    """Linear RGB to YCxCz, the linearised CIELAB."""
    x, y, z = _mixed(_matrix(rgb), rgb).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def _filtered(opponent: torch.Tensor) -> torch.Tensor:
    """What an observer resolves of YCxCz, as linear RGB in [0, 1]."""
    radius = math.ceil(3 * math.sqrt(WIDEST / (2 * math.pi**2)) * PIXELS_PER_DEGREE)
    axis = torch.arange(-radius, radius + 1, dtype=opponent.dtype, device=opponent.device) / PIXELS_PER_DEGREE
    square = axis.square() + axis.square()[:, None]
    channels = []
    for channel, gaussians in zip(opponent.split(1, 1), SENSITIVITY, strict=True):
        first, second = (a * math.sqrt(math.pi / b) * torch.exp(-(math.pi**2) * square / b) for a, b in gaussians)
        kernel = first + second
        padded = F.pad(channel, (radius,) * 4, mode="replicate")
        channels.append(F.conv2d(padded, (kernel / kernel.sum())[None, None]))
    luminance, red_green, blue_yellow = torch.cat(channels, 1).unbind(1)
    y = (luminance + 16) / 116
    xyz = torch.stack([y + red_green / 500, y, y - blue_yellow / 200], 1)
    return _mixed(torch.linalg.inv(_matrix(opponent)), xyz).clamp(0, 1)


def _lab(rgb: torch.Tensor) -> torch.Tensor:
    xyz, delta = _mixed(_matrix(rgb), rgb), 6 / 29
    root = torch.where(xyz > delta**3, xyz.clamp(min=delta**3) ** (1 / 3), xyz / (3 * delta**2) + 4 / 29)
    x, y, z = root.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def _hunt(lab: torch.Tensor) -> torch.Tensor:
    """Colourfulness grows with luminance."""
    return torch.cat([lab[:, :1], 0.01 * lab[:, :1] * lab[:, 1:]], 1)


def _hyab(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b)[:, 0].abs() + (a - b)[:, 1:].norm(dim=1)


def _color_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(N, H, W) in [0, 1]: the largest difference, of green from blue, is 1."""
    green, blue = a.new_tensor([0, 1, 0]).view(1, 3, 1, 1), a.new_tensor([0, 0, 1]).view(1, 3, 1, 1)
    largest = _hyab(_hunt(_lab(green)), _hunt(_lab(blue))) ** COLOR_EXPONENT
    difference, split = _hyab(a, b) ** COLOR_EXPONENT, SPLIT * largest
    above = SPLIT_VALUE + (difference - split) / (largest - split) * (1 - SPLIT_VALUE)
    return torch.where(difference < split, SPLIT_VALUE / split * difference, above)


def _feature_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(N, H, W) in [0, 1] of luminances (N, 1, H, W): how edges and points differ."""
    deviation = 0.5 * FEATURE_WIDTH * PIXELS_PER_DEGREE
    radius = math.ceil(3 * deviation)
    x = torch.arange(-radius, radius + 1, dtype=a.dtype, device=a.device)
    bell = torch.exp(-(x.square() + x.square()[:, None]) / (2 * deviation**2))
    edge, point = -x * bell, (x.square() / deviation**2 - 1) * bell
    features = []
    for kernel in (edge, point):
        positive, negative = kernel.clamp(min=0), kernel.clamp(max=0)
        kernel = positive / positive.sum() + negative / -negative.sum()
        both = torch.stack([kernel, kernel.T])[:, None]
        features.append([F.conv2d(F.pad(i, (radius,) * 4, mode="replicate"), both).norm(dim=1) for i in (a, b)])
    change = torch.maximum(*((of_a - of_b).abs() for of_a, of_b in features))
    return (change / math.sqrt(2)).clamp(0, 1) ** FEATURE_EXPONENT
