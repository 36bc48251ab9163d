"""The compiled libraries of csrc/, loaded on first use."""

import functools
import os
from pathlib import Path

import torch

FOLDER_VARIABLE = "SV3D_FAST_NATIVE"  # a folder of libraries to use instead, such as a sanitizer build


class NativeLibraryError(RuntimeError):
    """A compiled library is missing or can't be loaded."""


def folder() -> Path:
    """Where the libraries are: beside the installed package, or in the source tree of an editable install."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    import sv3d_fast

    return Path(sv3d_fast.__file__).resolve().parent / "native"


def available(kind: str) -> bool:
    """Whether the library of `kind` ("cpu" or "cuda") was built."""
    return (folder() / f"libsv3d_fast_{kind}.so").exists()


_built = functools.cache(available)  # a call of an op must not wait for the file system


def why_not(kind: str, tensor: torch.Tensor) -> list[str]:
    """The reasons why the library of `kind` ("cpu" or "cuda") can't work on a tensor; empty if it can."""
    reasons = [] if tensor.device.type == kind else [f"needs {kind} tensors, got {tensor.device.type}"]
    return reasons if _built(kind) else [*reasons, f"the {kind} library is not built"]


@functools.cache
def load(kind: str):
    """The library of `kind` ("cpu" or "cuda"); its exported functions are attributes that take torch tensors.

    Raises NativeLibraryError, naming the file, where it was not built or does not load.
    """
    path = folder() / f"libsv3d_fast_{kind}.so"
    if not path.exists():
        raise NativeLibraryError(f"{path.name} is not built; run `pip install -e .` (the CUDA library needs nvcc)")
    import tvm_ffi

    try:
        return tvm_ffi.load_module(str(path))
    except (OSError, RuntimeError) as error:
        raise NativeLibraryError(f"{path} does not load: {error}") from error
