"""TripoSR's networks for inference: the mathematics of `vit.py` and `backbone.py`, without what no picture changes.

What is exact algebra here, against the plain networks in float64 in tests/test_triposr_fused.py:

- The normalisation of pixels is part of the patch projection, which is one product; the class token and the positions,
  interpolated once, are its residual.
- The learned triplane tokens go through the group norm, the input projection, the first self-attention and the queries
  of the first attention to the image once, when the network is built.
- The keys and values of the image tokens, of all layers, are one product.
- The output projection, its residual and the upsampler are linear: one product of their composition, plus a constant.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sv3d_fast.kernels.geglu import geglu
from sv3d_fast.kernels.linear import linear
from sv3d_fast.model.fused_transformer import LayerNorm, Linear, Weights, join

from .backbone import Backbone, Block, FeedForward, TriplaneTokens, Upsampler
from .picture import GREY
from .vit import MEAN, STD, ImageTokenizer, Layer


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that constants are computed in."""
    return torch.promote_types(dtype, torch.float32)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, L, heads, d) each, with views as they come -> (B * L, heads * d)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)


class FusedViTLayer(nn.Module):
    """`vit.Layer` of (B * M, width)."""

    def __init__(self, layer: Layer):
        super().__init__()
        projections: Any = layer.attention["attention"]
        out: Any = layer.attention["output"]
        up: Any = layer.intermediate["dense"]
        down: Any = layer.output["dense"]
        parts = [projections[name] for name in ("query", "key", "value")]
        self.heads = layer.heads
        self.norm1, self.norm2 = LayerNorm(layer.layernorm_before), LayerNorm(layer.layernorm_after)
        self.qkv = Linear(join(*parts), torch.cat([part.bias for part in parts]))
        self.out = Linear(out["dense"].weight, out["dense"].bias)
        self.up, self.down = Linear(up.weight, up.bias), Linear(down.weight, down.bias)

    def forward(self, x: Tensor, batch: int) -> Tensor:
        qkv = self.qkv(self.norm1(x)).view(batch, -1, 3, self.heads, x.shape[1] // self.heads)
        x = self.out(_attend(*qkv.unbind(2)), x)
        return self.down(self.up(self.norm2(x), gelu=True), x)


class FusedImageTokenizer(nn.Module):
    """`vit.ImageTokenizer` of pictures of one size: (B, 3, size, size) in [0, 1] -> (B * M, width)."""

    def __init__(self, tokenizer: ImageTokenizer, size: int):
        super().__init__()
        vit = tokenizer.model
        projection: Any = vit.embeddings.patch_embeddings["projection"]
        self.patch = projection.kernel_size[0]
        dtype = projection.weight.dtype
        embeddings: Any = copy.deepcopy(vit.embeddings).to(_wide(dtype))
        mean, std = (embeddings.cls_token.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        weight = embeddings.patch_embeddings["projection"].weight / std
        # pixels come less grey: the background is then zero, and the rounding of the others is finer
        bias = embeddings.patch_embeddings["projection"].bias + (weight * (GREY - mean)).sum((1, 2, 3))
        tokens = embeddings.positions(size // self.patch, size // self.patch)[0].clone()
        tokens[0] += embeddings.cls_token[0, 0]
        tokens[1:] += bias
        self.projection = Linear(weight.flatten(1).to(dtype), None)
        self.tokens: Tensor
        self.register_buffer("tokens", tokens.to(dtype))
        self.layers = nn.ModuleList(FusedViTLayer(layer) for layer in vit.encoder.layer)  # type: ignore[arg-type]
        self.norm = LayerNorm(vit.layernorm)

    def forward(self, pixels: Tensor) -> Tensor:
        p, batch = self.patch, len(pixels)
        patches = (pixels - GREY).unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)
        x = self.tokens.new_zeros(batch, len(self.tokens), self.projection.weight.shape[1])
        x[:, 1:] = patches.flatten(3).flatten(1, 2)  # the row before them becomes the class token
        x = self.projection(x.flatten(0, 1), self.tokens.repeat(batch, 1))
        for layer in self.layers:
            x = layer(x, batch)
        return self.norm(x)


class FusedFeedForward(nn.Module):
    """`backbone.FeedForward`, plus the residual."""

    def __init__(self, ff: FeedForward):
        super().__init__()
        gate: Any = ff.net[0]
        out: Any = ff.net[2]
        self.gate, self.out = Weights(gate.proj.weight, gate.proj.bias), Linear(out.weight, out.bias)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.out(geglu(x, self.gate.weight, self.gate.bias), residual)


class FusedBlock(nn.Module):
    """`backbone.Block` of (B * L, width), given the keys and values of the image tokens, (B, M, heads, d)."""

    def __init__(self, block: Block):
        super().__init__()
        own, image = block.attn1, block.attn2
        outs: list[Any] = [own.to_out[0], image.to_out[0]]
        self.heads = own.heads
        self.norm1, self.norm2, self.norm3 = (LayerNorm(norm) for norm in (block.norm1, block.norm2, block.norm3))
        self.qkv = Linear(join(own.to_q, own.to_k, own.to_v), None)
        self.to_q = Linear(image.to_q.weight, None)
        self.out1, self.out2 = (Linear(out.weight, out.bias) for out in outs)
        self.ff = FusedFeedForward(block.ff)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).view(len(k), -1, 3, *k.shape[2:])
        x = self.out1(_attend(*qkv.unbind(2)), x)
        return self.look(x, self.to_q(self.norm2(x)), k, v)

    def look(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All but the self-attention; q: (B * L, width) queries to the image."""
        x = self.out2(_attend(q.view(len(k), -1, *k.shape[2:]), k, v), x)
        return self.ff(self.norm3(x), x)


class FusedTripoSR(nn.Module):
    """Pictures (B, 3, size, size) in [0, 1] -> scene codes (B, 3, plane_channels, 2 * S, 2 * S).

    Shares the memory of the plain parts' weights where nothing had to be computed from them; parts whose weights are
    joined to one keep them as views of it.
    """

    @torch.no_grad()
    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        tokens: TriplaneTokens,
        backbone: Backbone,
        upsampler: Upsampler,
        image_size: int,
    ):
        super().__init__()
        blocks: list[Any] = list(backbone.transformer_blocks)
        self.image_tokenizer = FusedImageTokenizer(image_tokenizer, image_size)
        self.plane_size = tokens.embeddings.shape[-1]
        self.keys_values = Linear(join(*(part for b in blocks for part in (b.attn2.to_k, b.attn2.to_v))), None)
        self.blocks = nn.ModuleList(FusedBlock(block) for block in blocks)
        start, queries = _before_the_image(tokens, backbone)
        self.start: Tensor
        self.queries: Tensor
        self.register_buffer("start", start)
        self.register_buffer("queries", queries)
        weight, constant = _planes(tokens, backbone, upsampler)
        self.to_planes = Linear(weight, None)
        self.constant: Tensor
        self.register_buffer("constant", constant)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        blocks: list[Any] = list(self.blocks)
        batch, heads = len(pixels), blocks[0].heads
        keys_values = self.keys_values(self.image_tokenizer(pixels))
        pairs = keys_values.view(batch, -1, len(blocks), 2, heads, self.start.shape[1] // heads).unbind(2)
        x = blocks[0].look(self.start.repeat(batch, 1), self.queries.repeat(batch, 1), *pairs[0].unbind(2))
        for block, pair in zip(blocks[1:], pairs[1:], strict=True):
            x = block(x, *pair.unbind(2))
        y = linear(x, self.to_planes.weight, None, self.constant.repeat(batch, 1))
        y = y.view(batch, 3, self.plane_size, self.plane_size, -1, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
        return y.flatten(5).flatten(3, 4)


def _before_the_image(tokens: TriplaneTokens, backbone: Backbone) -> tuple[Tensor, Tensor]:
    """The triplane tokens after the first self-attention, and their queries to the image, (L, width) each."""
    dtype = tokens.embeddings.dtype
    first: Any = backbone.transformer_blocks[0]
    parts = (backbone.norm, backbone.proj_in, first.norm1, first.attn1, first.norm2, first.attn2.to_q)
    norm, proj_in, norm1, attention, norm2, to_q = (copy.deepcopy(part).to(_wide(dtype)) for part in parts)
    x = proj_in(norm(tokens().to(_wide(dtype))).transpose(1, 2))
    normed = norm1(x)
    x = x + attention(normed, normed)
    return x[0].to(dtype), to_q(norm2(x))[0].to(dtype)


def _planes(tokens: TriplaneTokens, backbone: Backbone, upsampler: Upsampler) -> tuple[Tensor, Tensor]:
    """What maps the last block's output x (L, width) to scene codes: x @ weight.T + constant, (L, plane_channels * 4).

    A row holds the 2x2 pixels of every channel that its token becomes.
    """
    dtype = tokens.embeddings.dtype
    wide = _wide(dtype)
    up = upsampler.upsample.weight.to(wide).flatten(1).T  # (plane_channels * 4, channels)
    assert upsampler.upsample.bias is not None
    out, learned = backbone.proj_out, tokens()[0].to(wide).T
    bias = upsampler.upsample.bias.to(wide).repeat_interleave(4)
    constant = (learned + out.bias.to(wide)) @ up.T + bias
    return (up @ out.weight.to(wide)).to(dtype), constant.to(dtype)
