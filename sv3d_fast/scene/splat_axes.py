"""Axes of splat files: splats turned from the world (x front, y left, z up) into them and back."""

from dataclasses import dataclass

import numpy as np
import torch

from .splats import Splats


@dataclass(frozen=True)
class Axes:
    """A turn between the world's axes and a file's: file axis k is signs[k] times the world's axis order[k].

    turn: the same rotation as a quaternion, w first.
    """

    order: tuple[int, int, int]
    signs: tuple[int, int, int]
    turn: tuple[float, float, float, float]

    def of_world(self, splats: Splats) -> tuple[np.ndarray, np.ndarray]:
        """Means (N, 3) and quaternions (N, 4), w first, as the file has them; float64."""
        means, quats = (values.detach().double().cpu().numpy() for values in (splats.means, splats.quats))
        return means[:, self.order] * self.signs, _product(np.array(self.turn), quats)

    def to_world(self, means: np.ndarray, quats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The way back."""
        back = np.empty_like(means)
        back[:, self.order] = means * self.signs
        return back, _product(np.array(self.turn) * [1, -1, -1, -1], quats)


# Viewers take PLY and .splat files as y-down and turn them by 180 degrees about z, after which ours stand as our glTF.
Y_DOWN = Axes((1, 2, 0), (-1, -1, 1), (0.5, 0.5, -0.5, 0.5))
# SPZ files are x right, y up, z backward (RUB), seen by a camera that faces the front: the axes of glTF.
RIGHT_UP_BACK = Axes((1, 2, 0), (1, 1, 1), (0.5, -0.5, -0.5, -0.5))


def to_splats(axes: Axes, means, quats, log_scales, opacities, colors) -> Splats:
    """Splats, float32 on the CPU, of arrays as a file has them; opacities are bytes, 0 to 255.

    The logits of 0 and 255 are infinite, so these are read as what is half a step inside of them.
    """
    opacities = np.clip(opacities / 255.0, 0.5 / 255, 1 - 0.5 / 255)
    means, quats = axes.to_world(means, quats)
    logits = np.log(opacities) - np.log1p(-opacities)
    return Splats(*(torch.from_numpy(v).float() for v in (means, quats, log_scales, logits, colors)))


def quantised(values: np.ndarray) -> np.ndarray:
    """The nearest bytes."""
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def unit(quats: np.ndarray) -> np.ndarray:
    """(N, 4) quaternions of length 1; NaN for those of length 0."""
    with np.errstate(invalid="ignore"):
        return quats / np.linalg.norm(quats, axis=1, keepdims=True)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Hamilton product of one quaternion with (N, 4), w first."""
    a, b, c, d = left
    w, x, y, z = right.T
    return np.stack(
        [
            a * w - b * x - c * y - d * z,
            a * x + b * w + c * z - d * y,
            a * y - b * z + c * w + d * x,
            a * z + b * y - c * x + d * w,
        ],
        -1,
    )
