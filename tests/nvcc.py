"""Compiles a CUDA source for Hopper as the build does, where a compiler is."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def messages(source: str, folder: Path) -> str:
    """What the compiler says of csrc/`source`: registers, spills and products that wait for each other."""
    flags = subprocess.run([sys.executable, "-m", "tvm_ffi.config", "--cxxflags"], capture_output=True, text=True)
    command = [
        "nvcc", *flags.stdout.split(), f"-I{ROOT / 'csrc'}", "-gencode=arch=compute_90a,code=sm_90a", "-O3",
        "--use_fast_math", "-Xptxas", "-v", "-cubin", str(ROOT / "csrc" / source), "-o", str(folder / "kernel.cubin"),
    ]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    return said.stderr
