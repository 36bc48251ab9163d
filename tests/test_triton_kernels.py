"""The Triton kernels without a GPU: interpreted against their references, and compiled ahead of time for Hopper."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from triton_tools import SHARED_LIMIT, compile_sm90

import sv3d_fast.kernels
from sv3d_fast.kernels import euler_step, group_norm, layer_norm, temporal_attention, tiles, triplane_mlp, upsample_conv
from sv3d_fast.kernels.gemm import Tiles, gemm_kernel
from sv3d_fast.kernels.op import registry

for module in pkgutil.iter_modules(sv3d_fast.kernels.__path__):
    importlib.import_module(f"sv3d_fast.kernels.{module.name}")
NAMES = [op.name for op in registry.values() if any(i.name == "triton" for i in op.implementations)]
ROUNDING = 4e-4  # of float16: 2^-11 at most for each value, once or twice
LAYERED = {"triplane_grid": 1e-3, "triplane_points": 1e-3}  # nine layers, each of which rounds
INTEGERS = ("orbits", "length", "n", "k", "shift", "row_period", "first", "second", "row_stride", "strip", "splits",
            "channels", "group", "rows", "frames", "pixels", "images", "height", "width", "count", "side")  # fmt: skip


@pytest.fixture(scope="module")
def interpreted():
    program = Path(__file__).parent / "interpret_kernels.py"
    done = subprocess.run(
        [sys.executable, str(program)], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_triton_op_was_interpreted(interpreted):
    assert set(interpreted) == set(NAMES)
    assert len(NAMES) >= 8


@pytest.mark.parametrize("name", NAMES)
def test_interpreted_kernel_equals_its_reference_in_float64(interpreted, name):
    assert len(interpreted[name]) >= 2
    assert max(interpreted[name]) <= LAYERED.get(name, ROUNDING)


def compiled(kernel, constants, warps, stages=3, descriptors=None, absent=(), half="fp16", **types):
    arguments = {}
    for name in kernel.arg_names:
        arguments[name] = "i32" if name in INTEGERS else f"*{half}"
    arguments.update(types)
    arguments.update(descriptors or {})
    arguments.update(dict.fromkeys(absent, "none"))
    return compile_sm90(kernel, arguments, constants, warps, stages)


def check(made, *, products: bool):
    assert made.metadata.shared <= SHARED_LIMIT
    assert ("wgmma.mma_async" in made.asm["ptx"]) == products
    assert ".local" not in made.asm["ptx"]


TUNED = sorted(
    {(kind, t) for (kind, _, _), sizes in tiles.table((9, 0)).items() for t in sizes.values() if t}
    | {(kind, tiles.SAFE) for kind in ("linear", "geglu", "temporal_conv")},
    key=str,
)


def check_product(kind, size: Tiles, gelu, half="fp16"):
    constants = {
        "TAPS": 3 if kind == "temporal_conv" else 1, "HAS_BIAS": True, "HAS_ROWS": False,
        "HAS_RESIDUAL": kind != "geglu", "HAS_SCALE": kind == "temporal_conv", "GEGLU": kind == "geglu", "GELU": gelu,
        "BLOCK_M": size.m, "BLOCK_N": size.n, "BLOCK_K": size.k, "GROUP": size.group, "PROGRAMS": 132,
    }  # fmt: skip
    descriptors = {
        "a_desc": f"tensordesc<{half}[1,{size.m},{size.k}]>",
        "b_desc": f"tensordesc<{half}[{size.n},{size.k}]>",
    }
    made = compiled(gemm_kernel, constants, size.warps, size.stages, descriptors, half=half, rows=f"*{half}")
    check(made, products=True)
    assert "cp.async.bulk.tensor" in made.asm["ptx"]
    assert made.metadata.shared * size.resident <= SHARED_LIMIT + 1024


@pytest.mark.parametrize(
    ("kind", "size", "gelu"),
    [*((kind, size, False) for kind, size in TUNED), ("linear", tiles.SAFE, True)],
    ids=[*(f"{k}-{t.m}x{t.n}-{t.warps}-{t.stages}" for k, t in TUNED), "linear with GELU"],
)
def test_matrix_products_compile_for_hopper(kind, size: Tiles, gelu):
    check_product(kind, size, gelu)


@pytest.mark.parametrize("kind", ["linear", "geglu", "temporal_conv"])
def test_matrix_products_of_bfloat16_compile_for_hopper(kind):
    check_product(kind, tiles.SAFE, False, half="bf16")


def test_every_product_of_the_table_has_a_positive_size():
    table = tiles.table((9, 0))
    assert {kind for kind, _, _ in table} == {"linear", "geglu", "temporal_conv"}
    assert all(size > 0 for sizes in table.values() for size in sizes)
    assert tiles.table((1, 2)) == {}


@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_group_norm_compiles_for_hopper(skip, residual, half):
    absent = [*([] if skip else ["skip"]), *([] if residual else ["residual", "total"])]
    floats = dict.fromkeys(("means", "squares", "scale", "shift"), "*fp32")
    flags = {"HAS_SKIP": skip, "HAS_ROWS": True, "BLOCK_P": group_norm.BLOCK_P, "BLOCK_C": 64}
    statistics = compiled(
        group_norm.statistics_kernel, {**flags, "HAS_RESIDUAL": residual}, 4, absent=absent, half=half,
        rows=f"*{half}", means="*fp32", squares="*fp32",
    )  # fmt: skip
    check(statistics, products=False)
    applied = compiled(
        group_norm.apply_kernel, {**flags, "SILU": True}, 4, absent=absent[:1] if not skip else [], half=half,
        rows=f"*{half}", scale="*fp32", shift="*fp32",
    )  # fmt: skip
    check(applied, products=False)
    constants = {"BLOCK_S": 64, "BLOCK_G": 16}
    check(compiled(group_norm.combine_kernel, constants, 4, eps="fp32", **floats), products=False)


@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("way", "absent"),
    [
        ("", ["positions", "extra", "other", "share", "total"]),
        ("HAS_POSITIONS", ["other", "share"]),
        ("BLENDS", ["positions", "extra"]),
    ],
)
def test_layer_norm_compiles_for_hopper(way, absent, half):
    constants = {"HAS_POSITIONS": False, "BLENDS": False, "BLOCK_M": 2, "BLOCK_C": 2048}
    constants |= {way: True} if way else {}
    made = compiled(layer_norm.layer_norm_kernel, constants, 4, absent=absent, half=half, eps="fp32")
    check(made, products=False)


@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize("guided", [False, True])
def test_euler_step_compiles_for_hopper(guided, half):
    constants = {"GUIDED": guided, "BLOCK_P": euler_step.BLOCK, "BLOCK_C": 4}
    tensors = dict.fromkeys(("latents", "scales", "moved"), "*fp32")
    numbers = dict.fromkeys(("of_output", "of_latents", "stride", "seen"), "fp32")
    check(compiled(euler_step.euler_step_kernel, constants, 4, half=half, **tensors, **numbers), products=False)


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_temporal_attention_compiles_for_hopper(half):
    kernel = temporal_attention.temporal_attention_kernel
    made = compiled(kernel, {"HEAD": 64, "FRAMES": 32}, 1, half=half, scale="fp32")
    check(made, products=False)
    assert "mma.sync" in made.asm["ptx"]  # one warp: the products of its own


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_upsample_conv_compiles_for_hopper(half):
    u = upsample_conv
    constants = {"BLOCK_M": u.BLOCK_M, "BLOCK_N": u.BLOCK_N, "BLOCK_K": u.BLOCK_K, "GROUP": u.GROUP}
    descriptors = {"w_desc": f"tensordesc<{half}[{u.BLOCK_N},{u.BLOCK_K}]>"}
    check(compiled(u.upsample_conv_kernel, constants, 8, 3, descriptors, half=half), products=True)


@pytest.mark.parametrize(
    ("kernel", "how", "outputs"),
    [
        (triplane_mlp.grid_kernel, triplane_mlp.GRID, 1),
        (triplane_mlp.points_kernel, triplane_mlp.POINTS, 4),
    ],
    ids=["grid", "points"],
)
def test_triplane_mlp_compiles_for_hopper(kernel, how, outputs):
    block, stages, resident = how
    constants = {"LAYERS": 8, "N": 64, "OUTPUTS": outputs, "BLOCK": block}
    places = {"indices": "*i32"} if "indices" in kernel.arg_names else {"points": "*fp32"}
    made = compiled(kernel, constants, triplane_mlp.WARPS, stages, out="*fp32", **places)
    check(made, products=True)
    assert (made.metadata.shared + 1024) * resident <= SHARED_LIMIT + 1024  # of a multiprocessor
    # every layer's weights wait in shared memory: its loop loads points and planes alone
    loop = made.asm["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
    assert loop.count("warp_group_dot %") == 8
    assert loop.count("local_alloc") <= 1
