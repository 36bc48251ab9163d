"""Runs every Triton implementation in Triton's interpreter on the CPU and prints its errors as JSON.

A program of its own, since a process is either interpreted or compiles; needs TRITON_INTERPRET=1 in its environment.
Prints {op: [relative L2 error of each output of each example]}, inputs in float16, against the reference in float64.
"""

import importlib
import json
import pkgutil

import torch

import sv3d_fast.kernels
from sv3d_fast.kernels.op import registry


def cast(arguments: tuple, dtype: torch.dtype) -> list:
    """Tensors of floats in `dtype`, everything else as it is."""
    return [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def errors(op) -> list[float]:
    """Of every output on every example that the implementation takes."""
    (implementation,) = [i for i in op.implementations if i.name == "triton"]
    found = []
    for example in op.examples("cpu"):
        half = cast(example, torch.float16)
        assert not implementation.why_not(*half), implementation.why_not(*half)
        expected, got = op.reference(*cast(half, torch.float64)), implementation.run(*half)
        pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
        for a, b in pairs:
            assert a.shape == b.shape
            assert a.dtype in (torch.float16, torch.float32)
            found.append(float((a.double() - b).norm() / b.norm()))
    return found


if __name__ == "__main__":
    for module in pkgutil.iter_modules(sv3d_fast.kernels.__path__):
        importlib.import_module(f"sv3d_fast.kernels.{module.name}")
    ops = [op for op in registry.values() if any(i.name == "triton" for i in op.implementations)]
    print(json.dumps({op.name: errors(op) for op in ops}))
