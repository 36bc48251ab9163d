"""Parts of the video UNet on channels-last activations: embeddings, normalisation, convolutions, residual blocks.

Activations are (B, T, h, w, c) contiguous, from the first convolution to the last. A spatial layer sees them as
(B*T, h, w, c), a temporal one as (B, T, h*w, c): views, so nothing is copied between the two. Parameter names are
those of diffusers' UNetSpatioTemporalConditionModel.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32


def sinusoidal(values: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (..., dim) of `values` (...), float32: dim/2 cosines, then dim/2 sines.

    The frequencies are 10000^(-i / (dim/2)), i = 0 .. dim/2 - 1, in radians per unit. Raises ValueError for an odd
    `dim`.
    """
    if dim % 2:
        raise ValueError(f"dim: expected an even number, got {dim}")
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, Linear on an embedding (..., dim_in) of any floating type; returns (..., dim_out)."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim_hidden)
        self.linear_2 = nn.Linear(dim_hidden, dim_out)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(embedding.to(self.linear_1.weight.dtype))))


class TimeMixer(nn.Module):
    """The learned blend of a spatial and a temporal branch: a weighs the spatial one, a = sigmoid(mix_factor)."""

    def __init__(self):
        super().__init__()
        self.mix_factor = nn.Parameter(torch.full((1,), 0.5))

    def temporal_weight(self, dtype: torch.dtype) -> Tensor:
        """1 - a, shape (1,)."""
        return torch.sigmoid(-self.mix_factor).to(dtype)


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group normalisation of x (n, a, b, c) channels-last, over groups of channels and both middle dimensions.

    Statistics are float32 at least; the result has x's dtype and layout.
    """
    if x.device.type == "cpu":  # the only device whose native operator keeps channels last
        return F.group_norm(x.permute(0, 3, 1, 2), norm.num_groups, norm.weight, norm.bias, norm.eps).permute(
            0, 2, 3, 1
        )
    wide = x if x.dtype == torch.float64 else x.float()
    grouped = wide.reshape(x.shape[0], -1, norm.num_groups, x.shape[-1] // norm.num_groups)
    variance, mean = torch.var_mean(grouped, dim=(1, 3), correction=0, keepdim=True)
    scale = torch.rsqrt(variance + norm.eps) * norm.weight.view(norm.num_groups, -1)
    shift = norm.bias.view(norm.num_groups, -1) - mean * scale
    return torch.addcmul(shift, grouped, scale).to(x.dtype).view(x.shape)


def spatial_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 2-D convolution of x (B, T, h, w, c): returns (B, T, h', w', c')."""
    frames = x.flatten(0, 1).permute(0, 3, 1, 2)  # channels_last strides: no copy
    return conv(frames).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def temporal_conv(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """A (3, 1, 1) convolution of x (B, T, h, w, c) over frames, zeros beyond both ends: returns (B, T, h, w, c').

    Run in two dimensions, (T, h*w), where channels_last is a view of x and has the fast kernels.
    """
    sheets = x.flatten(2, 3).permute(0, 3, 1, 2)
    mixed = F.conv2d(sheets, conv.weight.squeeze(-1), conv.bias, padding=(1, 0))
    return mixed.permute(0, 2, 3, 1).unflatten(2, x.shape[2:4])


class SpatialResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, with the embedding added in between and a residual around it."""

    def __init__(self, channels_in: int, channels: int, embedding: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels_in, eps=eps)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, channels)
        self.norm2 = nn.GroupNorm(GROUPS, channels, eps=eps)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else None

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        hidden = spatial_conv(F.silu(group_norm(x.flatten(0, 1), self.norm1)).view(x.shape), self.conv1)
        hidden = hidden + self.time_emb_proj(activated)[:, :, None, None]
        hidden = F.silu(group_norm(hidden.flatten(0, 1), self.norm2)).view(hidden.shape)
        if self.conv_shortcut is not None:
            x = F.linear(x, self.conv_shortcut.weight.flatten(1), self.conv_shortcut.bias)
        return x + spatial_conv(hidden, self.conv2)


class TemporalResBlock(nn.Module):
    """The same over frames, with (3, 1, 1) convolutions; its statistics span all frames. Returns the residual alone."""

    def __init__(self, channels: int, embedding: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels, eps=eps)
        self.conv1 = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
        self.time_emb_proj = nn.Linear(embedding, channels)
        self.norm2 = nn.GroupNorm(GROUPS, channels, eps=eps)
        self.conv2 = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        hidden = temporal_conv(F.silu(group_norm(x.flatten(2, 3), self.norm1)).view(x.shape), self.conv1)
        hidden = hidden + self.time_emb_proj(activated)[:, :, None, None]
        hidden = F.silu(group_norm(hidden.flatten(2, 3), self.norm2)).view(hidden.shape)
        return temporal_conv(hidden, self.conv2)


class ResBlock(nn.Module):
    """A spatial residual block, then a temporal one, blended.

    x is (B, T, h, w, channels_in), `activated` the SiLU of the embedding (B, T, embedding); returns
    (B, T, h, w, channels).
    """

    def __init__(self, channels_in: int, channels: int, embedding: int, eps: float):
        super().__init__()
        self.spatial_res_block = SpatialResBlock(channels_in, channels, embedding, eps)
        self.temporal_res_block = TemporalResBlock(channels, embedding, eps)
        self.time_mixer = TimeMixer()

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        x = self.spatial_res_block(x, activated)
        # a x + (1 - a)(x + residual) is x + (1 - a) residual
        return torch.addcmul(x, self.temporal_res_block(x, activated), self.time_mixer.temporal_weight(x.dtype))


class Downsample(nn.Module):
    """Halves height and width by a 3x3 convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return spatial_conv(x, self.conv)


class Upsample(nn.Module):
    """Doubles height and width: the nearest pixel, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        frames = F.interpolate(x.flatten(0, 1).permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest")
        return spatial_conv(frames.permute(0, 2, 3, 1).unflatten(0, x.shape[:2]), self.conv)
