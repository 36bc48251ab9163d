"""OrbitVideo: the frames of an orbit with the cameras they were seen from."""

from dataclasses import dataclass

import torch

from .camera import Orbit

MIN_FRAMES = 4


@dataclass(frozen=True)
class OrbitVideo:
    """Frames of one object on white, with their cameras.

    frames: (T, H, W, 3) uint8 sRGB on a white background, H = W. orbit: the T cameras.
    alpha: (T, H, W) float32 in [0, 1] where the masks are known; None where they come from the white background.
    Raises ValueError for shapes that don't agree.
    """

    frames: torch.Tensor
    orbit: Orbit
    alpha: torch.Tensor | None = None

    def __post_init__(self):
        f = self.frames
        if f.dtype != torch.uint8 or f.ndim != 4 or f.shape[3] != 3 or f.shape[1] != f.shape[2]:
            raise ValueError(f"frames: expected uint8 (T, S, S, 3), got {f.dtype} {tuple(f.shape)}")
        if len(f) != len(self.orbit):
            raise ValueError(f"frames: expected one for each of the {len(self.orbit)} cameras, got {len(f)}")
        if self.alpha is not None and self.alpha.shape != f.shape[:3]:
            raise ValueError(f"alpha: expected shape {tuple(f.shape[:3])}, got {tuple(self.alpha.shape)}")

    @property
    def size(self) -> int:
        """Side of the square frames in pixels."""
        return self.frames.shape[1]

    def colors(self) -> torch.Tensor:
        """(T, H, W, 3) float32 in [0, 1]."""
        return self.frames.float() / 255
