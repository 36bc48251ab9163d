"""The compiled libraries of csrc/, loaded on first use."""

import functools
from pathlib import Path


class NativeLibraryError(RuntimeError):
    """A compiled library is missing or can't be loaded."""


def folder() -> Path:
    """Where the libraries are: beside the installed package, or in the source tree of an editable install."""
    import sv3d_fast

    return Path(sv3d_fast.__file__).resolve().parent / "native"


def available(kind: str) -> bool:
    """Whether the library of `kind` ("cpu" or "cuda") was built."""
    return (folder() / f"libsv3d_fast_{kind}.so").exists()


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
