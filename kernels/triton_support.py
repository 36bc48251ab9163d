"""Triton where it is installed, and the reasons why its kernels can't run on some inputs."""

import torch
from torch import Tensor

try:
    import triton

    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:  # a platform that has no Triton: references and native libraries run
    triton = None
    INTERPRETED = False

LEAST_CAPABILITY = (8, 0)


def why_no_triton(*tensors: Tensor | None, capability: tuple[int, int] = LEAST_CAPABILITY) -> list[str]:
    """Reasons why a forward-only Triton kernel can't take these tensors, all of one 16-bit type."""
    if triton is None:
        return ["triton is not installed"]
    given = [t for t in tensors if t is not None]
    reasons = []
    if not all(t.is_cuda for t in given):
        if not INTERPRETED:
            reasons.append("needs CUDA tensors")
    elif torch.cuda.get_device_capability(given[0].device) < capability:
        reasons.append(f"needs a GPU of compute capability {'.'.join(map(str, capability))}")
    if given[0].dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"16-bit tensors only, got {given[0].dtype}")
    if any(t.dtype != given[0].dtype for t in given):
        reasons.append("tensors of one type only")
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        reasons.append("forward only, and a gradient is asked for")
    return reasons


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 where the interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
