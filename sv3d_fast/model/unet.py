"""The exact video UNet of Stable Video 3D, on channels-last activations.

State dicts interchange with diffusers' UNetSpatioTemporalConditionModel without renaming; `unet_names` maps the
names of the official checkpoints. Source: Voleti et al. 2024, SV3D; Blattmann et al. 2023, Stable Video Diffusion.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sv3d_fast.model.attention import VideoTransformer
from sv3d_fast.model.blocks import (
    GROUPS,
    Downsample,
    EmbeddingMLP,
    ResBlock,
    Upsample,
    group_norm,
    sinusoidal,
    spatial_conv,
)
from sv3d_fast.model.config import UNetConfig

__all__ = ["SV3DUNet", "sinusoidal"]

OFFICIAL_EPS = 1e-5
DIFFUSERS_EPS = 1e-6  # what diffusers has in its down blocks with attention and in all its up blocks


class _Level(nn.Module):
    """One resolution on the way down or up: residual blocks, a transformer after each if the level has attention."""

    def __init__(self, config: UNetConfig, widths: list[int], channels: int, attention: bool, eps: float):
        super().__init__()
        embedding = 4 * config.block_channels[0]
        self.resnets = nn.ModuleList([ResBlock(width, channels, embedding, eps) for width in widths])
        if attention:
            heads = channels // config.head_channels
            self.attentions = nn.ModuleList([VideoTransformer(channels, heads, config.context_dim) for _ in widths])
        self.attention = attention

    def layer(self, i: int, x: Tensor, activated: Tensor, context: Tensor, frames: dict[int, Tensor]) -> Tensor:
        x = self.resnets[i](x, activated)
        return self.attentions[i](x, context, frames[x.shape[-1]]) if self.attention else x


class _Down(_Level):
    def __init__(self, config: UNetConfig, level: int):
        channels, attention = config.block_channels[level], config.attention[level]
        widths = [config.block_channels[max(level - 1, 0)]] + [channels] * (config.layers_per_block - 1)
        eps = DIFFUSERS_EPS if config.norm_eps == "diffusers" and attention else OFFICIAL_EPS
        super().__init__(config, widths, channels, attention, eps)
        last = level == len(config.block_channels) - 1
        self.downsamplers = None if last else nn.ModuleList([Downsample(channels)])

    def forward(self, x: Tensor, skips: list[Tensor], *conditioning) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, x, *conditioning)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x


class _Middle(_Level):
    def __init__(self, config: UNetConfig):
        channels = config.block_channels[-1]
        super().__init__(config, [channels], channels, True, OFFICIAL_EPS)
        self.resnets.append(ResBlock(channels, channels, 4 * config.block_channels[0], OFFICIAL_EPS))

    def forward(self, x: Tensor, activated: Tensor, context: Tensor, frames: dict[int, Tensor]) -> Tensor:
        return self.resnets[1](self.layer(0, x, activated, context, frames), activated)


class _Up(_Level):
    def __init__(self, config: UNetConfig, level: int):
        channels, coarser = config.block_channels[level], config.block_channels[level + 1 :][:1]
        arriving = [*(coarser or [channels]), *[channels] * config.layers_per_block]
        skipped = [channels] * config.layers_per_block + [config.block_channels[max(level - 1, 0)]]
        widths = [a + s for a, s in zip(arriving, skipped, strict=True)]
        eps = DIFFUSERS_EPS if config.norm_eps == "diffusers" else OFFICIAL_EPS
        super().__init__(config, widths, channels, config.attention[level], eps)
        self.upsamplers = None if level == 0 else nn.ModuleList([Upsample(channels)])

    def forward(self, x: Tensor, skips: list[Tensor], *conditioning) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=-1), *conditioning)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class SV3DUNet(nn.Module):
    """The network F of the denoiser: predicts v for every frame of an orbit.

    Raises ValueError where `config` has a width that the normalisation groups or the attention heads don't divide.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        for level, channels in enumerate(config.block_channels):
            has_heads = config.attention[level] or level == len(config.block_channels) - 1
            if channels % GROUPS:
                raise ValueError(f"block_channels: expected multiples of {GROUPS}, got {config.block_channels}")
            if has_heads and channels % config.head_channels:
                raise ValueError(
                    f"head_channels: expected a divisor of every width with attention, {config.block_channels}, "
                    f"got {config.head_channels}"
                )
        self.config = config
        first, levels = config.block_channels[0], range(len(config.block_channels))
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = EmbeddingMLP(first, 4 * first, 4 * first)
        self.add_embedding = EmbeddingMLP(config.vector_dim, 4 * first, 4 * first)
        self.down_blocks = nn.ModuleList([_Down(config, level) for level in levels])
        self.mid_block = _Middle(config)
        self.up_blocks = nn.ModuleList([_Up(config, level) for level in reversed(levels)])
        self.conv_norm_out = nn.GroupNorm(GROUPS, first, eps=OFFICIAL_EPS)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)
        _store_channels_last(self)
        self.register_load_state_dict_post_hook(_store_channels_last)

    def forward(self, latents: Tensor, c_noise: Tensor | float, context: Tensor, vector: Tensor) -> Tensor:
        """One evaluation on a batch of orbits; returns (B, T, out_channels, h, w) in the parameters' dtype.

        latents: (B, T, in_channels, h, w), the noisy latents scaled by c_in, then the image latents; h and w are
        divisible by 2^(levels - 1). c_noise: ln(sigma) / 4, one number or (B,). context: (B, 1, context_dim), the
        image token that every frame sees. vector: (B, T, vector_dim), the sinusoidal embeddings of cond_aug and, for
        SV3D_p, of the polar and azimuth angles. Raises ValueError for any other shape.
        """
        self._check(latents, context, vector)
        b, t = latents.shape[:2]
        dtype, device = self.conv_in.weight.dtype, latents.device
        if not isinstance(c_noise, Tensor):
            c_noise = torch.full((), c_noise, dtype=torch.float32, device=device)
        if c_noise.shape not in ((), (1,), (b,)):
            raise ValueError(f"c_noise: expected one number or {(b,)}, got {tuple(c_noise.shape)}")
        embedding = self.time_embedding(sinusoidal(c_noise.to(device).expand(b), self.config.block_channels[0]))
        activated = F.silu(embedding[:, None] + self.add_embedding(vector))
        numbers = torch.arange(t, device=device)
        frames = {channels: sinusoidal(numbers, channels) for channels in set(self.config.block_channels)}
        conditioning = (activated, context[:, 0].to(dtype), frames)

        x = spatial_conv(latents.to(dtype).permute(0, 1, 3, 4, 2).contiguous(), self.conv_in)
        skips = [x]
        for down in self.down_blocks:
            x = down(x, skips, *conditioning)
        x = self.mid_block(x, *conditioning)
        for up in self.up_blocks:
            x = up(x, skips, *conditioning)
        x = F.silu(group_norm(x.flatten(0, 1), self.conv_norm_out)).view(x.shape)
        return spatial_conv(x, self.conv_out).permute(0, 1, 4, 2, 3).contiguous()

    def _check(self, latents: Tensor, context: Tensor, vector: Tensor) -> None:
        config, factor = self.config, 2 ** (len(self.config.block_channels) - 1)
        if latents.ndim != 5 or latents.shape[2] != config.in_channels:
            raise ValueError(f"latents: expected (B, T, {config.in_channels}, h, w), got {tuple(latents.shape)}")
        b, t, _, h, w = latents.shape
        if h % factor or w % factor:
            raise ValueError(f"latents: expected h and w divisible by {factor}, got {h} x {w}")
        if context.shape != (b, 1, config.context_dim):
            raise ValueError(f"context: expected {(b, 1, config.context_dim)}, got {tuple(context.shape)}")
        if vector.shape != (b, t, config.vector_dim):
            raise ValueError(f"vector: expected {(b, t, config.vector_dim)}, got {tuple(vector.shape)}")


def _store_channels_last(unet: nn.Module, incompatible_keys=None) -> None:
    """Lays convolution weights out as the activations are, so that no call has to; values and shapes stay."""
    for module in unet.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            layout = torch.channels_last if isinstance(module, nn.Conv2d) else torch.channels_last_3d
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
