"""Splats: the container of a Gaussian scene."""

from dataclasses import dataclass, replace

import torch

SH_C0 = 0.28209479177387814  # Y_0^0: the constant spherical harmonic that PLY viewers multiply f_dc with


@dataclass(frozen=True)
class Splats:
    """N Gaussians in world coordinates (design: z up), stored before their activations, as PLY files hold them.

    means: (N, 3). quats: (N, 4), w first, not necessarily normalised. log_scales: (N, 3). logit_opacities: (N,).
    colors: (N, 3) sRGB as rendered, unclamped (light is static in an orbit, so there is no view dependence).
    """

    means: torch.Tensor
    quats: torch.Tensor
    log_scales: torch.Tensor
    logit_opacities: torch.Tensor
    colors: torch.Tensor

    def __post_init__(self):
        n = len(self.means)
        for name, shape in (
            ("means", (n, 3)), ("quats", (n, 4)), ("log_scales", (n, 3)),
            ("logit_opacities", (n,)), ("colors", (n, 3)),
        ):  # fmt: skip
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(getattr(self, name).shape)}")

    def __len__(self):
        return len(self.means)

    @property
    def scales(self) -> torch.Tensor:
        """(N, 3) standard deviations along the axes, world units."""
        return self.log_scales.exp()

    @property
    def opacities(self) -> torch.Tensor:
        """(N,) in (0, 1)."""
        return self.logit_opacities.sigmoid()

    def to(self, *args, **kwargs) -> "Splats":
        """A copy on another device or of another dtype."""
        return replace(self, **{k: v.to(*args, **kwargs) for k, v in vars(self).items()})

    def detach(self) -> "Splats":
        """A copy cut from the autograd graph."""
        return replace(self, **{k: v.detach() for k, v in vars(self).items()})
