"""Ahead-of-time compilation of Triton kernels for Hopper, which needs no GPU."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

SHARED_LIMIT = 227 * 1024  # bytes that a program may have on sm_90


def compile_sm90(
    kernel, types: dict[str, str], constants: dict[str, object], warps: int, stages: int = 3
) -> CompiledKernel:
    """Compiles a kernel for sm_90. types: of the arguments, "*fp16", "i32", "fp32" or "tensordesc<fp16[64,64]>", and
    "none" for a tensor that is not given; constants: its constexpr arguments."""
    absent = {name: None for name, kind in types.items() if kind == "none"}
    constants = {**constants, **absent}
    order = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in order}
    # pointers and strides as PyTorch's allocator hands them out
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(order) if signature[name].startswith("*")}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(order.index(n),): v for n, v in constants.items()},
        attrs=attributes,
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
