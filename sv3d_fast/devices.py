"""Which device runs, and one clear line for a machine whose GPU can't."""

import re

import torch

from .kernels.triton_support import LEAST_CAPABILITY

DEVICES = "auto, cpu, cuda or cuda:N"


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one. Raises ValueError for a device that this machine lacks, or that can't run
    this package: a GPU that is too old, or one whose driver is."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    parts = re.fullmatch(r"cpu|cuda(?::(\d{1,9}))?", name)
    if parts is None:
        raise ValueError(f"device: expected {DEVICES}, got {name!r}")
    if name == "cpu":
        return torch.device(name)
    number = int(parts[1] or 0)
    if number >= torch.cuda.device_count():
        raise ValueError(f"device: {name} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    try:
        capability = torch.cuda.get_device_capability(number)
    except RuntimeError as error:  # devices are counted without the driver's help; it is asked here for the first time
        raise ValueError(f"device: {name} can't be used: {str(error).splitlines()[0]}") from error
    if capability < LEAST_CAPABILITY:
        least, its = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, capability))
        raise ValueError(
            f"device: {name} ({torch.cuda.get_device_name(number)}) has compute capability {its}, "
            f"and {least} is the least; --device cpu runs anywhere"
        )
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of a name in `settings.DTYPES`: "auto" is float16 on a GPU and float32 on a CPU. Raises ValueError for float16 on
    a CPU."""
    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    if name == "float16" and device.type == "cpu":
        raise ValueError("dtype: expected float32 or bfloat16 on a CPU, which is many times slower in float16")
    return getattr(torch, name)


def second_device(first: torch.device) -> torch.device:
    """The GPU that works beside `first`. Raises ValueError where there is none."""
    count = torch.cuda.device_count()
    if first.type != "cuda":
        raise ValueError(f"cfg_parallel: needs two GPUs, and device is {first}")
    if count < 2:
        raise ValueError(f"cfg_parallel: needs two GPUs, and this machine has {count}")
    return torch.device("cuda", ((first.index or 0) + 1) % count)


def give_back() -> None:
    """Returns the memory that the caching allocator holds for nothing."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
