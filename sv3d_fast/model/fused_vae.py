"""The autoencoder's decoder for inference: the mathematics of `vae.py` in fewer passes over its activations.

Activations are (N, P, c) throughout. The bias of a first convolution rides on the norm behind it; a block's sum, with
the bias of its second convolution, is formed on the way into the norm of the block behind it. Queries, keys and values
are one product, and nearest upsampling is part of the convolution behind it. All of it is exact algebra.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sv3d_fast.kernels import upsample_conv

from .fused_transformer import Linear, Norm, Weights
from .vae import SV3DVAE, Attention, ResBlock
from .vae import Upsample as PlainUpsample


class Stream:
    """Activations on their way: x, plus `added` and its bias where a sum is still to be formed; height and width."""

    def __init__(self, x: Tensor, height: int, width: int, added: Tensor | None = None, bias: Tensor | None = None):
        self.x, self.height, self.width, self.added, self.bias = x, height, width, added, bias

    def normed(self, norm: Norm) -> Tensor:
        """The norm of the sum, which is formed."""
        if self.added is None:
            return norm(self.x)
        assert self.bias is not None
        self.x, normed = norm.with_residual(self.added, self.x, self.bias)
        self.added = None
        return normed

    def formed(self) -> Tensor:
        """The sum as (N, h, w, c)."""
        if self.added is not None:
            assert self.bias is not None
            self.x = self.x.add(self.added).add_(self.bias)
            self.added = None
        return self.x.unflatten(1, (self.height, self.width))


class Conv(Weights):
    """A 3x3 convolution of (N, P, c), its bias left to what follows."""

    def __init__(self, conv: nn.Conv2d):
        assert conv.bias is not None
        super().__init__(conv.weight, conv.bias[None])

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        images = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return F.conv2d(images, self.weight, padding=1).permute(0, 2, 3, 1).flatten(1, 2)


class FusedResBlock(nn.Module):
    """`vae.ResBlock`."""

    def __init__(self, block: ResBlock):
        super().__init__()
        self.norm1, self.norm2 = Norm(block.norm1), Norm(block.norm2)
        self.conv1, self.conv2 = Conv(block.conv1), Conv(block.conv2)
        shortcut = block.conv_shortcut
        self.shortcut = None if shortcut is None else Linear(shortcut.weight.detach().flatten(1), shortcut.bias)

    def forward(self, stream: Stream) -> Stream:
        at = stream.height, stream.width
        hidden = self.conv1(stream.normed(self.norm1), *at)
        hidden = self.conv2(self.norm2(hidden, rows=self.conv1.bias), *at)
        x = stream.x
        if self.shortcut is not None:
            x = self.shortcut(x.flatten(0, 1)).view(*x.shape[:2], -1)
        return Stream(x, *at, hidden, self.conv2.bias)


class FusedAttention(nn.Module):
    """`vae.Attention`."""

    def __init__(self, attention: Attention):
        super().__init__()
        parts = (attention.to_q, attention.to_k, attention.to_v)
        out: Any = attention.to_out[0]
        self.norm = Norm(attention.group_norm, silu=False)
        self.qkv = Linear(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))
        self.out = Linear(out.weight, out.bias)

    def forward(self, stream: Stream) -> Stream:
        normed = stream.normed(self.norm)
        shape = stream.x.shape
        q, k, v = self.qkv(normed.flatten(0, 1)).view(shape[0], 1, shape[1], 3, shape[2]).unbind(3)
        mixed = F.scaled_dot_product_attention(q, k, v).reshape(-1, shape[2])
        return Stream(self.out(mixed, stream.x.flatten(0, 1)).view(shape), stream.height, stream.width)


class Upsample(Weights):
    """`vae.Upsample`."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(upsample_conv.pack(conv.weight.detach()), conv.bias)

    def forward(self, stream: Stream) -> Stream:
        y = upsample_conv.upsample_conv(stream.formed(), self.weight, self.bias)
        return Stream(y.flatten(1, 2), 2 * stream.height, 2 * stream.width)


class FusedDecoder(nn.Module):
    """`SV3DVAE.decode`: latents (N, z, h, w), divided by the scaling -> (N, 3, f h, f w).

    Shares the memory of the autoencoder's weights but for those of the upsampling and of the attention.
    """

    @torch.no_grad()
    def __init__(self, vae: SV3DVAE):
        super().__init__()
        decoder, mid = vae.decoder, vae.decoder.mid_block
        blocks: list[Any] = list(decoder.up_blocks)
        layers: list[Any] = [mid.resnets[0], mid.attentions[0], mid.resnets[1]]
        layers += [layer for block in blocks for layer in (*block.resnets, *block.upsamplers)]
        self.post_quant_conv, self.conv_in, self.conv_out = vae.post_quant_conv, decoder.conv_in, decoder.conv_out
        self.layers = nn.ModuleList(_fused(layer) for layer in layers)
        self.norm_out = Norm(decoder.conv_norm_out)

    @torch.no_grad()
    def forward(self, latents: Tensor) -> Tensor:
        latents = latents.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(latents if self.post_quant_conv is None else self.post_quant_conv(latents))
        stream = Stream(x.permute(0, 2, 3, 1).flatten(1, 2), *x.shape[2:])
        for layer in self.layers:
            stream = layer(stream)
        normed = stream.normed(self.norm_out).unflatten(1, (stream.height, stream.width))
        return self.conv_out(normed.permute(0, 3, 1, 2))


def _fused(layer: nn.Module) -> nn.Module:
    if isinstance(layer, ResBlock):
        return FusedResBlock(layer)
    if isinstance(layer, Attention):
        return FusedAttention(layer)
    assert isinstance(layer, PlainUpsample)
    return Upsample(layer.conv)


def why_not_fused(vae: SV3DVAE) -> list[str]:
    """Reasons why latents are decoded by the plain decoder."""
    weight = vae.decoder.conv_in.weight
    reasons = [] if weight.is_cuda else ["needs a GPU"]
    if weight.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"needs 16-bit weights, got {weight.dtype}")
    return reasons


_decoders: WeakKeyDictionary[SV3DVAE, tuple[tuple, FusedDecoder]] = WeakKeyDictionary()


def fused_decoder(vae: SV3DVAE) -> FusedDecoder:
    """The fused decoder of `vae`, made once for as long as its weights stay the same."""
    state = tuple((p.data_ptr(), p._version) for p in vae.parameters())
    if vae not in _decoders or _decoders[vae][0] != state:
        _decoders[vae] = (state, FusedDecoder(vae))
    return _decoders[vae][1]
