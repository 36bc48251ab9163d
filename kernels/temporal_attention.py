"""Self-attention along the frames: every pixel and head attends over its T frames, and no others."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sv3d_fast.kernels.op import Implementation, Op

GRID_LIMIT = 65535  # CUDA's limit on the grid dimension that the fused kernels map the batch to


def reference(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over T for each of the B * P * heads sequences.

    qkv is (B, T, P, 3*c): queries, keys, values, each of `heads` times d = c / heads channels. Returns (B, T, P, c).
    """
    b, t, p, _ = qkv.shape
    # One copy into (3, B * P * heads, T, d); strided operands would cost the batched products one copy each.
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(3, 0, 2, 4, 1, 5).flatten(1, 3).unbind(0)
    weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5, dim=-1)
    return torch.bmm(weights, v).view(b, p, heads, t, -1).permute(0, 3, 1, 2, 4).flatten(3)


def _fused(qkv: Tensor, heads: int) -> Tensor:
    b, t, p, _ = qkv.shape
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(3, 0, 2, 4, 1, 5).flatten(1, 2).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v)  # (B * P, heads, T, d)
    return mixed.view(b, p, heads, t, -1).permute(0, 3, 1, 2, 4).flatten(3)


def _why_not_fused(qkv: Tensor, heads: int) -> list[str]:
    reasons = []
    if not qkv.is_cuda:
        reasons.append("needs a CUDA tensor: on a CPU it is slower than the reference on short sequences")
    if qkv.shape[0] * qkv.shape[2] > GRID_LIMIT:
        reasons.append(f"at most {GRID_LIMIT} pixels, got {qkv.shape[0] * qkv.shape[2]}")
    return reasons


def _examples(device: str):
    generator = torch.Generator().manual_seed(0)
    for shape, heads in [((2, 21, 64, 3 * 64), 2), ((1, 5, 7, 3 * 32), 1), ((1, 1, 1, 3 * 64), 1)]:
        yield torch.randn(shape, generator=generator).to(device), heads


temporal_attention = Op(
    name="temporal_attention",
    reference=reference,
    implementations=[Implementation("sdpa", _fused, _why_not_fused)],
    examples=_examples,
    source="Blattmann et al. 2023, Stable Video Diffusion: the attention of the temporal transformer blocks",
)
