"""The video UNet's transformer for inference, on fused ops; see `fused_unet.py` for what is taken out of it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sv3d_fast.kernels.geglu import geglu
from sv3d_fast.kernels.group_norm import group_norm, residual_group_norm
from sv3d_fast.kernels.layer_norm import blended_layer_norm, layer_norm, positioned_layer_norm
from sv3d_fast.kernels.linear import linear
from sv3d_fast.kernels.spatial_attention import spatial_attention
from sv3d_fast.kernels.temporal_attention import temporal_attention
from sv3d_fast.model.attention import FeedForward, SelfAttention, SingleTokenAttention, VideoTransformer


class Weights(nn.Module):
    """A weight and a bias as buffers: nothing here is trained."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())


class Norm(Weights):
    """Group normalisation of (N, P, c); `skip` and `rows` as the op has them."""

    def __init__(self, norm: nn.GroupNorm, silu: bool = True):
        super().__init__(norm.weight, norm.bias)
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu

    def forward(self, x: Tensor, skip: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        return group_norm(x, self.weight, self.bias, self.groups, self.eps, self.silu, skip, rows)

    def with_residual(self, x: Tensor, residual: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """x + residual + rows and its normalisation."""
        return residual_group_norm(x, residual, self.weight, self.bias, self.groups, self.eps, self.silu, rows)


class Linear(Weights):
    """A linear layer of (M, k) with what is added behind it; the result takes the residual's place."""

    def forward(
        self, x: Tensor, residual: Tensor | None = None, rows: Tensor | None = None, gelu: bool = False
    ) -> Tensor:
        return linear(x, self.weight, self.bias, residual, rows, gelu, inplace=True)


class LayerNorm(Weights):
    """Layer normalisation of (M, c)."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__(norm.weight, norm.bias)
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


def join(*layers: nn.Linear) -> Tensor:
    """The layers' weights under each other, in memory that the layers share from here on: nothing is kept twice."""
    joined = torch.cat([layer.weight.detach() for layer in layers])
    for layer, part in zip(layers, joined.split([layer.out_features for layer in layers]), strict=True):
        layer.weight.data = part
    return joined


class FusedFeedForward(Weights):
    """GEGLU and the linear layer back, plus the residual, whose place the sum takes.

    The last layer's bias is left to what comes next: with a bias to add, a library's product takes one pass more.
    """

    def __init__(self, ff: FeedForward):
        gate: Any = ff.net[0]
        back: Any = ff.net[2]
        super().__init__(gate.proj.weight, gate.proj.bias)
        self.out = Linear(back.weight, None)
        self.left: Tensor
        self.register_buffer("left", back.bias.detach())

    def forward(self, x: Tensor, residual: Tensor, scale: Tensor | None = None) -> Tensor:
        """The sum without the bias `left`. scale: (1,), of what the layers add."""
        return self.out(geglu(x, self.weight, self.bias, scale), residual)


class FusedAttention(nn.Module):
    """Self-attention of (B * T * P, c), plus the residual, whose place the sum takes, and each orbit's context."""

    def __init__(self, attention: SelfAttention, context: SingleTokenAttention, heads: int):
        super().__init__()
        self.heads = heads
        out: Any = attention.to_out[0]
        added: Any = context.to_out[0]
        self.qkv = Linear(join(attention.to_q, attention.to_k, attention.to_v), None)
        self.out = Linear(out.weight, None)
        self.bias: Tensor
        self.register_buffer("bias", out.bias.detach())
        self.to_v = Linear(context.to_v.weight, None)
        self.to_context = Linear(added.weight, added.bias)

    def context(self, token: Tensor) -> Tensor:
        """(B, context_dim) to what the output projection adds for each orbit: (B, c)."""
        return F.linear(F.linear(token, self.to_v.weight), self.to_context.weight, self.to_context.bias) + self.bias

    def spatial(self, x: Tensor, residual: Tensor, context: Tensor, frames: int) -> Tensor:
        """Among the P pixels of each of `frames` = B * T frames."""
        mixed = spatial_attention(self.qkv(x).view(frames, -1, 3 * x.shape[-1]), self.heads)
        return self.out(mixed.reshape(x.shape), residual, context)

    def temporal(self, x: Tensor, residual: Tensor, context: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Among the T frames of each pixel; shape: (B, T, P)."""
        mixed = temporal_attention(self.qkv(x).view(*shape, -1), self.heads)
        return self.out(mixed.reshape(x.shape), residual, context)


class FusedTransformer(nn.Module):
    """`attention.VideoTransformer` for inference; the frame positions of `frames` frames are a table."""

    def __init__(self, block: VideoTransformer):
        super().__init__()
        spatial: Any = block.transformer_blocks[0]
        temporal: Any = block.temporal_transformer_blocks[0]
        self.norm = Norm(block.norm, silu=False)
        self.proj_in = Linear(block.proj_in.weight, block.proj_in.bias)
        self.norm1, self.norm3 = LayerNorm(spatial.norm1), LayerNorm(spatial.norm3)
        self.attention = FusedAttention(spatial.attn1, spatial.attn2, spatial.heads)
        self.ff = FusedFeedForward(spatial.ff)
        self.position_embedding = block.time_pos_embed
        self.temporal_norm_in = LayerNorm(temporal.norm_in)
        self.temporal_norm1, self.temporal_norm3 = LayerNorm(temporal.norm1), LayerNorm(temporal.norm3)
        self.temporal_ff_in = FusedFeedForward(temporal.ff_in)
        self.temporal_attention = FusedAttention(temporal.attn1, temporal.attn2, temporal.heads)
        self.temporal_ff = FusedFeedForward(temporal.ff)
        self.mix: Tensor
        self.register_buffer("mix", block.time_mixer.temporal_weight(block.proj_in.weight.dtype).detach().view(1))
        # what both branches' feed-forwards leave goes through their blend and the projection
        wide = torch.promote_types(block.proj_out.weight.dtype, torch.float32)
        left = torch.lerp(self.ff.left.to(wide), self.temporal_ff.left.to(wide), self.mix.to(wide))
        bias = block.proj_out.bias.detach().to(wide) + block.proj_out.weight.detach().to(wide) @ left
        self.proj_out = Linear(block.proj_out.weight, bias.to(block.proj_out.bias.dtype))

    def prepared(self) -> list[nn.Module]:
        """The layers that `context` and `positions` read, before a run's first step."""
        attentions = (self.attention, self.temporal_attention)
        return [self.position_embedding, *(layer for a in attentions for layer in (a.to_v, a.to_context))]

    def positions(self, frames: Tensor) -> Tensor:
        """(T, c) sinusoidal embeddings of the frame numbers to what the temporal branch adds to each frame."""
        return self.position_embedding(frames) + self.ff.left

    def forward(self, x: Tensor, contexts: tuple[Tensor, Tensor], positions: Tensor) -> Tensor:
        """x: (B, T, h, w, c), overwritten; contexts: (B, c) of both attentions; positions: (T, c)."""
        b, t, h, w, c = x.shape
        shape, flat = (b, t, h * w), x.view(-1, c)
        tokens = self.proj_in(self.norm(x.view(b * t, h * w, c)).view(-1, c))
        tokens = self.attention.spatial(self.norm1(tokens), tokens, contexts[0], b * t)
        spatial = self.ff(self.norm3(tokens), tokens)

        norm = self.temporal_norm_in
        total, hidden = positioned_layer_norm(
            spatial.view(*shape, c), positions, norm.weight, norm.bias, norm.eps, self.temporal_ff_in.left
        )
        tokens = self.temporal_ff_in(hidden.view(-1, c), total.view(-1, c))
        del hidden  # would lie beside the widest activations, the last feed-forward's
        tokens = self.temporal_attention.temporal(self.temporal_norm1(tokens), tokens, contexts[1], shape)
        norm = self.temporal_norm3  # both branches meet before the last feed-forward, which adds its share of the blend
        blend, hidden = blended_layer_norm(tokens, spatial, self.mix, norm.weight, norm.bias, norm.eps, inplace=True)
        del spatial
        return self.proj_out(self.temporal_ff(hidden, blend, self.mix), flat).view(x.shape)
