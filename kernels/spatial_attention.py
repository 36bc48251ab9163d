"""Self-attention among the pixels of each frame."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sv3d_fast.kernels import native
from sv3d_fast.kernels.hopper_support import why_no_hopper
from sv3d_fast.kernels.op import Implementation, Op

HEAD = 64  # channels of a head that csrc/attention_kernel.h is made for


def reference(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the N pixels of each frame and head, in float32 at least.

    qkv is (B, N, 3*c): queries, keys, values, each of `heads` times d = c / heads channels. Returns (B, N, c).
    """
    q, k, v = _parted(qkv, heads).to(torch.promote_types(qkv.dtype, torch.float32)).unbind(0)
    weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2).to(qkv.dtype)


def _parted(qkv: Tensor, heads: int) -> Tensor:
    """(3, B, heads, N, d), a view."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def _library(qkv: Tensor, heads: int) -> Tensor:
    return F.scaled_dot_product_attention(*_parted(qkv, heads).unbind(0)).transpose(1, 2).flatten(2)


def _hopper(qkv: Tensor, heads: int) -> Tensor:
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    native.load("cuda").attention_attend(qkv.detach(), out, heads)
    return out


def _why_not_hopper(qkv: Tensor, heads: int) -> list[str]:
    reasons = why_no_hopper(qkv)
    if qkv.shape[-1] != 3 * heads * HEAD:
        reasons.append(f"heads of {HEAD} channels, got {qkv.shape[-1] / 3 / heads:g}")
    return reasons


def _examples(device: str):
    generator = torch.Generator().manual_seed(0)
    for shape, heads in [((2, 49, 3 * 64), 2), ((3, 9, 3 * 96), 3), ((1, 1, 3 * 64), 1)]:
        yield torch.randn(shape, generator=generator).to(device), heads
    if device == "cuda":
        yield torch.randn(3, 449, 3 * 320, generator=generator).to(device, torch.float16), 5


spatial_attention = Op(
    name="spatial_attention",
    reference=reference,
    implementations=[
        Implementation("hopper", _hopper, _why_not_hopper),
        Implementation("library", _library),
    ],
    examples=_examples,
    source="Vaswani et al. 2017, Attention Is All You Need, equation 1",
)
