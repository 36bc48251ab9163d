"""Why the kernels that csrc/ has for Hopper GPUs alone can't run on given tensors."""

import torch
from torch import Tensor

from sv3d_fast.kernels import native


def why_no_hopper(*tensors: Tensor) -> list[str]:
    """The reasons, those that all of these kernels share; empty if there is none. The first tensor tells the device."""
    first, reasons = tensors[0], native.why_not("cuda", tensors[0])
    if first.is_cuda and torch.cuda.get_device_capability(first.device) != (9, 0):
        reasons.append("needs a GPU of compute capability 9.0")
    if any(t.dtype != torch.float16 for t in tensors):
        reasons.append("float16 tensors only")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        reasons.append("forward only, and a gradient is asked for")
    if not all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors):
        reasons.append("contiguous operands that start at a multiple of 16 bytes only")
    return reasons
