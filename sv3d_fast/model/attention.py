"""The video UNet's transformer: a spatial block, then a temporal one, blended, on channels-last activations.

Parameter names are those of diffusers' UNetSpatioTemporalConditionModel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sv3d_fast.kernels.temporal_attention import temporal_attention
from sv3d_fast.model.blocks import GROUPS, EmbeddingMLP, TimeMixer, group_norm
from sv3d_fast.model.geglu import GEGLU


class SelfAttention(nn.Module):
    """The projections of a multi-head self-attention; what attends to what is the caller's choice."""

    def __init__(self, channels: int):
        super().__init__()
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of x (..., c) in one product: (..., 3*c)."""
        return F.linear(x, torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight]))


class SingleTokenAttention(nn.Module):
    """Cross-attention to a context of one token: (B, context_dim) -> (B, c), the same for every query.

    The softmax over a single key is 1 whatever the query, so the result is exactly to_out(to_v(context)).
    """

    def __init__(self, channels: int, context_dim: int):
        super().__init__()
        # to_q and to_k never act on the result; they are here because every checkpoint has them.
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, context: Tensor) -> Tensor:
        return self.to_out[0](self.to_v(context))


class FeedForward(nn.Module):
    """GEGLU to four times the channels and a linear layer back. Entry 1 of `net` is a dropout of 0 in checkpoints."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class SpatialBlock(nn.Module):
    """Attention among the pixels of a frame, the context vector, feed-forward; x is (B, T, P, c)."""

    def __init__(self, channels: int, heads: int, context_dim: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = SelfAttention(channels)
        self.norm2 = nn.LayerNorm(channels)  # normalises the queries that a single token makes idle
        self.attn2 = SingleTokenAttention(channels, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        qkv = self.attn1.project(self.norm1(x)).flatten(0, 1).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B*T, heads, P, d)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.attn1.to_out[0](mixed) + self.attn2(context)[:, None, None]
        return x + self.ff(self.norm3(x))


class TemporalBlock(nn.Module):
    """Feed-forward, attention among the frames of a pixel, the context vector, feed-forward; x is (B, T, P, c)."""

    def __init__(self, channels: int, heads: int, context_dim: int):
        super().__init__()
        self.heads = heads
        self.norm_in = nn.LayerNorm(channels)
        self.ff_in = FeedForward(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = SelfAttention(channels)
        self.norm2 = nn.LayerNorm(channels)  # normalises the queries that a single token makes idle
        self.attn2 = SingleTokenAttention(channels, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.ff_in(self.norm_in(x))
        mixed = temporal_attention(self.attn1.project(self.norm1(x)), self.heads)
        x = x + self.attn1.to_out[0](mixed) + self.attn2(context)[:, None, None]
        return x + self.ff(self.norm3(x))


class VideoTransformer(nn.Module):
    """Spatial and temporal transformer blocks between two projections, with a residual around them.

    x is (B, T, h, w, c), context (B, context_dim), frames (T, c) the sinusoidal embedding of the frame numbers;
    returns (B, T, h, w, c).
    """

    def __init__(self, channels: int, heads: int, context_dim: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([SpatialBlock(channels, heads, context_dim)])
        self.temporal_transformer_blocks = nn.ModuleList([TemporalBlock(channels, heads, context_dim)])
        self.time_pos_embed = EmbeddingMLP(channels, 4 * channels, channels)
        self.time_mixer = TimeMixer()
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, frames: Tensor) -> Tensor:
        tokens = self.proj_in(group_norm(x.flatten(0, 1), self.norm)).view(*x.shape[:2], -1, x.shape[-1])
        spatial = self.transformer_blocks[0](tokens, context)
        positions = self.time_pos_embed(frames)[:, None]
        temporal = self.temporal_transformer_blocks[0](spatial + positions, context)
        blended = torch.lerp(spatial, temporal, self.time_mixer.temporal_weight(spatial.dtype))
        return x + self.proj_out(blended).view(x.shape)
