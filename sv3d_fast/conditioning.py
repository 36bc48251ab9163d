"""Subject and orbit to what the UNet is conditioned on (generative-models, configs/inference/sv3d_*.yaml)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from .camera import Orbit
from .model.clip import preprocess
from .model.config import UNetConfig
from .model.unet import sinusoidal
from .model.weights import SV3DModel

COND_AUG_DIM = 256
ANGLE_DIM = 512


@dataclass(frozen=True)
class Conditioning:
    """What B orbits of T frames are conditioned on.

    token: (B, 1, context_dim) one image token. image_latents: (B, z, h, w) of the input view, unscaled.
    vector: (B, T, vector_dim) float32, the same for both halves of guidance.
    """

    token: torch.Tensor
    image_latents: torch.Tensor
    vector: torch.Tensor

    def unconditional(self) -> "Conditioning":
        """The twin that guidance leans away from: token and latents zero, the vector untouched."""
        return replace(self, token=torch.zeros_like(self.token), image_latents=torch.zeros_like(self.image_latents))


def vector(config: UNetConfig, orbits: Sequence[Orbit], cond_aug: float) -> torch.Tensor:
    """(B, T, vector_dim) float32: cond_aug in 256 channels, then polar and azimuth in 512 each for SV3D_p.

    The angles stay float32 throughout: a cast to 16 bits costs up to 0.9 degrees. Raises ValueError where the
    orbits differ in length.
    """
    frames = {len(orbit) for orbit in orbits}
    if len(frames) != 1:
        raise ValueError(f"orbits: expected the same number of frames in each, got {sorted(frames)}")
    (count,) = frames
    parts = [sinusoidal(torch.full((len(orbits), count), cond_aug), COND_AUG_DIM)]
    if config.variant == "p":
        parts.append(sinusoidal(torch.stack([o.polars_rad for o in orbits]), ANGLE_DIM))
        parts.append(sinusoidal(torch.stack([o.azimuths_rad for o in orbits]), ANGLE_DIM))
    return torch.cat(parts, -1)


@torch.no_grad()
def condition(
    model: SV3DModel,
    images: torch.Tensor,
    orbits: Sequence[Orbit],
    image_noise: torch.Tensor,
    cond_aug: float,
    visit: Callable[[nn.Module], AbstractContextManager] = nullcontext,
) -> Conditioning:
    """Conditioning of B pictures, one orbit each.

    images: (B, 3, H, W) in [-1, 1], the object on white. image_noise: the same shape, unit variance; the VAE sees the
    picture with cond_aug of it, the image tower sees the clean picture. Results lie on the UNet's device. Each of the
    two networks runs within `visit(network)`, one after the other.
    """
    unet, vae, tower = model.unet, model.vae, model.image_encoder
    with visit(vae):
        weight = next(vae.parameters())
        latents = vae.encode((images + cond_aug * image_noise.to(images)).to(weight.device, weight.dtype))
    with visit(tower):
        weight = next(tower.parameters())
        pixels = preprocess(images.to(weight.device, torch.float32), model.config.clip.image_size)
        token = tower(pixels.to(weight.dtype))[:, None]
    weight = next(unet.parameters())
    return Conditioning(
        token.to(weight.device, weight.dtype),
        latents.to(weight.device, weight.dtype),
        vector(model.config.unet, orbits, cond_aug).to(weight.device),
    )
