"""What a machine's memory and its matrix units reach where they do nothing else, measured in place."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

RUNS = 5
COPIED = {"cuda": 512 << 20, "cpu": 64 << 20}  # bytes, well beyond the caches
SIDE = {"cuda": 8192, "cpu": 1024}  # of square matrices


@dataclass(frozen=True)
class Ceilings:
    """Best of some runs. copy: bytes read and written in a second. product: operations in a second, two for each
    product and its sum, of matrices in 16 bits on a GPU and in float32 on a CPU."""

    copy: float
    product: float


def measure(device: torch.device) -> Ceilings:
    """Takes well below a second on a GPU and about one on a CPU."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)
    side = SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Ceilings(copy, 2 * side**3 / _seconds(lambda: torch.mm(a, b, out=out), device))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The least of some runs after one for warmth."""
    times = []
    for _ in range(1 + RUNS):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
