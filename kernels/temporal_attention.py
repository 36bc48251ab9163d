"""Self-attention along the frames: every pixel and head attends over its T frames, and no others."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sv3d_fast.kernels.op import Implementation, Op
from sv3d_fast.kernels.triton_support import triton, why_no_triton

FRAMES = 32  # that a program holds, the sequence and what it is padded with
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


if triton is not None:
    import triton.language as tl

    @triton.jit
    def temporal_attention_kernel(
        qkv, out, frames, pixels, channels, scale,
        HEAD: tl.constexpr, FRAMES: tl.constexpr,
    ):  # fmt: skip
        """One warp, one pixel, one head: all of the sequence is in registers, and nothing is permuted in memory."""
        head, pixel, orbit = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        frame, channel = tl.arange(0, FRAMES), tl.arange(0, HEAD)
        row = (orbit * frames + frame).to(tl.int64) * pixels + pixel
        mask = (frame < frames)[:, None]
        at = qkv + row[:, None] * (3 * channels) + (head * HEAD + channel)[None, :]
        q = tl.load(at, mask, 0.0)
        k = tl.load(at + channels, mask, 0.0)
        v = tl.load(at + 2 * channels, mask, 0.0)
        logits = tl.dot(q, k.T) * (scale * 1.4426950408889634)  # for powers of two
        logits = tl.where((frame < frames)[None, :], logits, float("-inf"))
        weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
        total = tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype), v) / total[:, None]
        place = out + row[:, None] * channels + (head * HEAD + channel)[None, :]
        tl.store(place, mixed.to(out.dtype.element_ty), mask)


def _one_warp(qkv: Tensor, heads: int) -> Tensor:
    b, t, p, c = qkv.shape
    out = torch.empty(b, t, p, c // 3, dtype=qkv.dtype, device=qkv.device)
    head = c // 3 // heads
    temporal_attention_kernel[(heads, p, b)](qkv, out, t, p, c // 3, head**-0.5, head, FRAMES, num_warps=1)
    return out


def _why_not_one_warp(qkv: Tensor, heads: int) -> list[str]:
    reasons = why_no_triton(qkv)
    if qkv.shape[1] > FRAMES:
        reasons.append(f"at most {FRAMES} frames, got {qkv.shape[1]}")
    if qkv.shape[3] // 3 // heads not in (16, 32, 64):
        reasons.append(f"heads of 16, 32 or 64 channels, got {qkv.shape[3] // 3 // heads}")
    if not qkv.is_contiguous():
        reasons.append("a contiguous qkv only")
    if qkv.shape[2] > GRID_LIMIT:
        reasons.append(f"at most {GRID_LIMIT} pixels, got {qkv.shape[2]}")
    return reasons


def _examples(device: str):
    generator = torch.Generator().manual_seed(0)
    for shape, heads in [((2, 21, 64, 3 * 64), 2), ((1, 5, 7, 3 * 32), 1), ((1, 1, 1, 3 * 64), 1)]:
        yield torch.randn(shape, generator=generator).to(device), heads
    if device == "cuda":
        yield torch.randn(2, 21, 9, 3 * 320, generator=generator).to(device, torch.float16), 5


temporal_attention = Op(
    name="temporal_attention",
    reference=reference,
    implementations=[
        Implementation("triton", _one_warp, _why_not_one_warp),
        Implementation("sdpa", _fused, _why_not_fused),
    ],
    examples=_examples,
    source="Blattmann et al. 2023, Stable Video Diffusion: the attention of the temporal transformer blocks",
)
