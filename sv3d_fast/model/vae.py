"""The image autoencoder of SV3D: a KL encoder with its quant_conv, and a per-frame decoder without post_quant_conv.

Architecture of generative-models' AutoencoderKL (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent
Diffusion Models", appendix E); parameters carry the names that diffusers' AutoencoderKL gives them.
"""

import torch
import torch.nn.functional as F
from torch import nn

from sv3d_fast.kernels.group_norm import group_norm, why_not_fused

from .blocks import group_norm as channels_last_norm
from .config import VAEConfig

GROUPS = 32
EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)  # of the reference posterior: keeps exp(logvar) finite in training


def _fastest_layout(x: torch.Tensor) -> torch.Tensor:
    # Channels-last convolutions are the faster ones, but on a CPU the backward pass of a channels-last group norm is
    # slow enough to cost training more than they save.
    trains_on_cpu = x.device.type == "cpu" and torch.is_grad_enabled()
    return x.contiguous(memory_format=torch.contiguous_format if trains_on_cpu else torch.channels_last)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=EPS)


def _activated(x: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """SiLU of the group normalisation of x (N, c, h, w), in x's layout."""
    if x.is_cuda and x.is_contiguous(memory_format=torch.channels_last):
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        operands = (tokens, norm.weight, norm.bias, norm.num_groups, norm.eps, True)
        if not why_not_fused(*operands):
            return group_norm(*operands).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        if not torch.is_grad_enabled():
            # torch's own norm gives the layout up, and each convolution then copies both its sides: 0.6 GiB at 576²
            return F.silu(channels_last_norm(x.permute(0, 2, 3, 1), norm)).permute(0, 3, 1, 2)
    return F.silu(norm(x))


class ResBlock(nn.Module):
    """(N, c_in, h, w) -> (N, c_out, h, w): twice norm, SiLU, 3x3 convolution, around a skip connection."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1 = _norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = _norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(_activated(x, self.norm1))
        h = self.conv2(_activated(h, self.norm2))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """(N, c, h, w) -> same: self-attention with one head over all positions, added to its input."""

    def __init__(self, channels: int):
        super().__init__()
        self.group_norm = _norm(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        tokens = self.group_norm(x).permute(0, 2, 3, 1).reshape(n, 1, h * w, c)
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](out).view(n, h, w, c).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """(N, c, h, w) -> (N, c, h/2, w/2). The zero border is on the right and the bottom alone."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(N, c, h, w) -> (N, c, 2h, 2w): nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, layers: int, downsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_in if j == 0 else c_out, c_out) for j in range(layers))
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if downsample else [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, layers: int, upsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_in if j == 0 else c_out, c_out) for j in range(layers))
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if upsample else [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels)])
        self.resnets = nn.ModuleList([ResBlock(channels, channels), ResBlock(channels, channels)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """(N, 3, H, W) -> (N, 2z, H/f, W/f): mean and log variance before quant_conv; f is `config.factor`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_channels
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[max(i - 1, 0)], widths[i], config.res_blocks, downsample=i < len(widths) - 1)
            for i in range(len(widths))
        )
        self.mid_block = MidBlock(widths[-1])
        self.conv_norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(image)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(_activated(self.mid_block(x), self.conv_norm_out))


class Decoder(nn.Module):
    """(N, z, h, w) -> (N, 3, f h, f w); the frames of a batch don't meet, so any chunking gives the same pixels."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[max(i - 1, 0)], widths[i], config.res_blocks + 1, upsample=i < len(widths) - 1)
            for i in range(len(widths))
        )
        self.conv_norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(_activated(x, self.conv_norm_out))


class SV3DVAE(nn.Module):
    """The autoencoder, in the precision of its parameters (the official code runs it in float32).

    post_quant_conv: a 1x1 convolution before the decoder. SV3D has none; folders that pair SV3D's UNet with the
    autoencoder of Stable Diffusion need it.
    Raises ValueError for channel counts that 32 groups don't divide, and for inputs of a wrong shape.
    """

    def __init__(self, config: VAEConfig, *, post_quant_conv: bool = False):
        super().__init__()
        if not config.block_channels or any(c < 1 or c % GROUPS for c in config.block_channels):
            raise ValueError(f"block_channels: expected multiples of {GROUPS}, got {config.block_channels}")
        if config.res_blocks < 1 or config.latent_channels < 1:
            raise ValueError(
                f"res_blocks and latent_channels: expected at least 1, "
                f"got {config.res_blocks} and {config.latent_channels}"
            )
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1) if post_quant_conv else None

    def moments(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of the posterior, each (N, z, h, w), unscaled; differentiable.

        image: (N, 3, H, W) in [-1, 1], H and W multiples of `config.factor`.
        """
        factor = self.config.factor
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % factor or image.shape[3] % factor:
            raise ValueError(f"image: expected (N, 3, H, W) with sides multiples of {factor}, got {tuple(image.shape)}")
        x = self.quant_conv(self.encoder(_fastest_layout(image)))
        mean, logvar = x.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, z, H/f, W/f): the posterior's mode, not multiplied by `config.scaling`."""
        return self.moments(image)[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, z, h, w), already divided by `config.scaling` -> (N, 3, f h, f w), in [-1, 1] give or take."""
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(f"latents: expected (N, {self.config.latent_channels}, h, w), got {tuple(latents.shape)}")
        latents = _fastest_layout(latents)
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))
