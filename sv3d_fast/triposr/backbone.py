"""From image tokens to planes: learned triplane tokens, a transformer that attends to the image, an upsampler.

Parameters carry the official names. Tokens stand in the order plane, row, column.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sv3d_fast.model.geglu import GEGLU

from .config import TripoSRConfig


class TriplaneTokens(nn.Module):
    """The learned input of the transformer, the same for every picture: (1, channels, 3 * plane_size ** 2)."""

    def __init__(self, config: TripoSRConfig):
        super().__init__()
        shape = (3, config.channels, config.plane_size, config.plane_size)
        self.embeddings = nn.Parameter(torch.randn(shape) * config.channels**-0.5)

    def forward(self) -> Tensor:
        return self.embeddings.transpose(0, 1).flatten(1)[None]

    def as_planes(self, tokens: Tensor) -> Tensor:
        """(B, channels, 3 * S * S) -> (B, 3, channels, S, S)."""
        return tokens.unflatten(2, (3, *self.embeddings.shape[2:])).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention of x (B, L, width) to a context (B, M, context_width); no bias but in the last layer."""

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """GEGLU to four times the width and a linear layer back. Entry 1 of `net` is a dropout of 0 in checkpoints."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """Self-attention, attention to the image, feed-forward, each after a layer norm and with a residual."""

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, width)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, image_tokens: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), image_tokens)
        return x + self.ff(self.norm3(x))


class Backbone(nn.Module):
    """Triplane tokens (B, channels, L) and image tokens (B, M, C) -> triplane tokens (B, channels, L)."""

    def __init__(self, config: TripoSRConfig):
        super().__init__()
        width = config.heads * config.head_width
        self.norm = nn.GroupNorm(config.groups, config.channels, eps=1e-6)
        self.proj_in = nn.Linear(config.channels, width)
        self.transformer_blocks = nn.ModuleList(
            Block(width, config.heads, config.vit.width) for _ in range(config.layers)
        )
        self.proj_out = nn.Linear(width, config.channels)

    def forward(self, tokens: Tensor, image_tokens: Tensor) -> Tensor:
        x = self.proj_in(self.norm(tokens).transpose(1, 2))
        for block in self.transformer_blocks:
            x = block(x, image_tokens)
        return tokens + self.proj_out(x).transpose(1, 2)


class Upsampler(nn.Module):
    """Planes of tokens (B, 3, channels, S, S) -> scene codes (B, 3, plane_channels, 2 * S, 2 * S)."""

    def __init__(self, config: TripoSRConfig):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(config.channels, config.plane_channels, kernel_size=2, stride=2)

    def forward(self, planes: Tensor) -> Tensor:
        return self.upsample(planes.flatten(0, 1)).unflatten(0, planes.shape[:2])
