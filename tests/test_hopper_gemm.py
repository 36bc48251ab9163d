"""The Hopper matrix product: layout and compilation anywhere, results on a GPU."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nvcc import ROOT, messages, needs_nvcc

from bench.gemm import products
from bench.gemm_check import LIMIT, PROBLEMS, Problem, errors, operands, product, reference
from sv3d_fast.kernels import geglu, hopper_gemm, linear, temporal_conv, tiles
from sv3d_fast.kernels.hopper_gemm import WAYS, HopperTiles, fits


def test_tiles_are_dealt_out_once_and_a_lane_has_successive_columns(tmp_path):
    program = tmp_path / "layout"
    source = Path(__file__).with_name("gemm_layout.cpp")
    subprocess.run(["g++", "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
@needs_nvcc
def test_every_kernel_compiles_for_hopper_and_keeps_its_accumulators_in_registers(tmp_path):
    said = messages("gemm.cu", tmp_path)
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", said)]
    assert len(spilled) == len(WAYS) + sum(way.columns % 64 == 0 for way in WAYS) + 2  # without, with gates, upsampling
    assert max(spilled) <= 64  # a few addresses, once a tile
    assert "serialized" not in said  # products that would wait for each other
    assert "setmaxnreg" not in said  # ignored


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_reference_of_the_checks_is_that_of_the_ops(problem: Problem):
    problem = replace(problem, length=min(problem.length, 2 * problem.rows * max(problem.shift, 1) or 45))
    if problem.taps == 3:
        problem = replace(problem, length=5 * 7, shift=7, rows=problem.orbits * 5 if problem.rows else 0)
    elif problem.rows:
        problem = replace(problem, length=problem.rows * 9)
    given = {k: None if t is None else t.double() for k, t in operands(problem, "cpu").items()}
    x, weight, bias, rows, residual, scale = given.values()
    got = reference(problem, given)
    if problem.geglu:
        expected = geglu.reference(x[0], weight, bias if bias is not None else torch.zeros(problem.n).double(), scale)
    elif problem.taps == 3:
        frames = (problem.orbits, 5, 7, -1)
        expected = temporal_conv.reference(
            x.view(frames), weight.view(problem.n, 3, -1), bias,
            None if rows is None else rows.view(problem.orbits, 5, -1),
            None if residual is None else residual.view(frames), scale,
        )  # fmt: skip
    else:
        flat = None if residual is None else residual.flatten(0, 1)
        expected = linear.reference(x.flatten(0, 1), weight, bias, flat, rows, problem.gelu)
    torch.testing.assert_close(got.flatten(), expected.flatten())


def test_cpu_tensors_and_odd_channels_are_reasons():
    x, weight = torch.zeros(4, 12), torch.zeros(40, 12)
    reasons = "; ".join(hopper_gemm.why_not(x, weight))
    for part in ("cuda tensors", "float16", "12 to 40"):
        assert part in reasons
    assert not [r for r in hopper_gemm.why_not(x.half()[:, :8].contiguous(), weight.half()[:32, :8].contiguous())
                if "channels" in r or "float16" in r]  # fmt: skip
    assert any("gradient" in r for r in hopper_gemm.why_not(x.requires_grad_(), weight))


def test_products_without_an_entry_are_left_to_others():
    assert tiles.choose_hopper("linear", 100, 17, 19) is None
    assert tiles.why_not_hopper("linear", 100, 17, 19)


def test_every_entry_of_the_table_is_a_way_that_was_compiled_and_fits():
    for (kind, n, k), sizes in tiles.hopper_table().items():
        for m, chosen in sizes.items():
            assert tiles.choose_hopper(kind, m, n, k) == chosen
            if chosen is not None:
                assert any(replace(chosen, band=w.band, lag=w.lag) == w for w in WAYS)
                assert fits(chosen, n, k, 3 if kind == "temporal_conv" else 1, kind == "geglu", 132)


def test_a_resident_weight_must_fit():
    narrow = HopperTiles(64, 256, resident=True)
    assert fits(narrow, 2560, 320, 1, True, 132)
    assert not fits(narrow, 2560, 328, 1, True, 132)
    assert not fits(narrow, 320, 128, 3, False, 132)
    assert not fits(narrow, 2560, 320, 1, True, 9)


def test_columns_come_in_whole_blocks():
    streamed = HopperTiles(128, 256)
    assert fits(streamed, 96, 64, 1, False, 132)
    assert not fits(streamed, 80, 64, 1, False, 132)
    assert not fits(streamed, 96, 64, 1, True, 132)
    assert not fits(HopperTiles(128, 160), 640, 64, 1, True, 132)


def test_the_bench_counts_the_calls_of_a_step():
    assert sum(calls for kind, _, calls in products() if kind == "geglu") == 3 * 16
    assert sum(calls for kind, _, calls in products() if kind == "temporal_conv") == 2 * 22


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_products_agree_with_float64_and_with_themselves(way: HopperTiles):
    found = list(errors(way))
    assert len(found) > len(PROBLEMS) // 3
    assert max(error for _, error in found) <= LIMIT, [f for f in found if not f[1] <= LIMIT]


@pytest.mark.gpu
def test_what_the_kernel_cannot_take_is_an_error():
    problem = Problem(1, 100, 648, 256)
    given = operands(problem)
    for wrong, said in (
        (HopperTiles(64, 256, resident=True), "shared memory"),
        (HopperTiles(100, 100), "no kernel was compiled"),
        (HopperTiles(128, 256, band=0), "band"),
    ):
        with pytest.raises(ValueError, match=said):
            product(problem, given, wrong)
    for n, gated in ((80, False), (96, True)):
        narrow = Problem(1, 100, 64, n, geglu=gated)
        with pytest.raises(ValueError, match="multiples of 8 and 32, n of 64"):
            product(narrow, operands(narrow), WAYS[0])
    with pytest.raises(ValueError, match="float16"):
        product(problem, {**given, "bias": torch.zeros(256, device="cuda")}, WAYS[0])
