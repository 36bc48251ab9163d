"""Configurations of the networks; the defaults are SV3D's (generative-models, configs/inference/sv3d_*.yaml)."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class UNetConfig:
    """The video UNet. One entry of `block_channels` and `attention` per resolution level, finest first.

    vector_dim: width of the per-frame vector conditioning: 256 (SV3D_u: cond_aug) or 1280 (SV3D_p: cond_aug 256,
    polar 512, azimuth 512). norm_eps: "official" (1e-5 in every residual block) or "diffusers" (its 1e-6 in the
    down blocks 0..2 and all up blocks; facts of the released classes, for bit-level comparison only).
    """

    in_channels: int = 8
    out_channels: int = 4
    block_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    head_channels: int = 64
    context_dim: int = 1024
    vector_dim: int = 1280
    norm_eps: str = "official"

    def __post_init__(self):
        if len(self.block_channels) != len(self.attention):
            raise ValueError(
                f"attention: expected one entry per level, {len(self.block_channels)}, got {len(self.attention)}"
            )
        if self.norm_eps not in ("official", "diffusers"):
            raise ValueError(f"norm_eps: expected 'official' or 'diffusers', got {self.norm_eps!r}")
        if self.vector_dim not in (256, 1280):
            raise ValueError(f"vector_dim: expected 256 (SV3D_u) or 1280 (SV3D_p), got {self.vector_dim}")

    @property
    def variant(self) -> str:
        """ "u" (no camera input) or "p" (one pose per frame)."""
        return "u" if self.vector_dim == 256 else "p"


@dataclass(frozen=True)
class VAEConfig:
    """The image autoencoder: encoder with quant_conv, per-frame decoder without post_quant_conv."""

    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    res_blocks: int = 2
    latent_channels: int = 4
    scaling: float = 0.18215

    def __post_init__(self):
        if not 1e-6 <= self.scaling <= 1e6:
            raise ValueError(f"scaling_factor: expected 1e-06 to 1e+06, got {self.scaling}")

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.block_channels) - 1)


@dataclass(frozen=True)
class CLIPConfig:
    """The image tower: one pooled and projected token per picture (ViT-H-14 by default)."""

    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp_width: int = 5120
    patch: int = 14
    image_size: int = 224
    projection: int = 1024


@dataclass(frozen=True)
class SamplerConfig:
    """EDM sampling: sigmas from sigma_max to sigma_min, guidance from min to max to min over the frames.

    Raises ValueError for numbers that no sampling can have.
    """

    steps: int = 50
    sigma_max: float = 700.0
    sigma_min: float = 0.002
    rho: float = 7.0
    min_guidance: float = 1.0
    max_guidance: float = 2.5
    cond_aug: float = 1e-5

    def __post_init__(self):
        for name, low, high in (
            ("steps", 1, 1000),
            ("sigma_max", 1e-3, 1e5),
            ("sigma_min", 1e-6, self.sigma_max),
            ("rho", 0.1, 100),
            ("min_guidance", 0, 1000),
            ("max_guidance", 0, 1000),
            ("cond_aug", 0, 10),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}: expected {low:g} to {high:g}, got {str(value)[:40]}")


@dataclass(frozen=True)
class ModelConfig:
    """A whole SV3D: the networks, how they are sampled, and the picture they were made for."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    image_size: int = 576
    frames: int = 21
