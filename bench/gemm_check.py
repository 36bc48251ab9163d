"""The Hopper matrix product against float64: `python -m bench.gemm_check` runs every way of cutting it at odd shapes.

Each way runs in a process of its own with a limit of time, so that one that hangs or breaks the GPU's state says so and
nothing else. Results go into memory that held NaN, and are compared value by value, twice for equal bits.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sv3d_fast.kernels.hopper_gemm import WAYS, HopperTiles, fits, hopper_gemm

LIMIT = 1e-3  # of each value's error: relative to it, plus relative to all values' root mean square
SECONDS = 60
TOGETHER = 6  # processes; each needs up to 4 GB of the GPU


@dataclass(frozen=True)
class Problem:
    """A product of x (orbits, length, k) with n columns; `rows` counts the sets of rows, 0 for none."""

    orbits: int
    length: int
    k: int
    n: int
    taps: int = 1
    shift: int = 0
    bias: bool = False
    rows: int = 0
    residual: bool = False
    scale: bool = False
    geglu: bool = False
    gelu: bool = False
    inplace: bool = False


PROBLEMS = (
    Problem(1, 1, 64, 96),
    Problem(1, 45, 40, 64, bias=True, rows=5, residual=True),
    Problem(1, 333, 8, 32, bias=True),
    Problem(1, 300, 320, 960),
    Problem(1, 129, 72, 288, bias=True, gelu=True, residual=True),
    Problem(2, 1001, 328, 352, bias=True, rows=2, residual=True, inplace=True),
    Problem(1, 40000, 320, 960, residual=True, inplace=True),
    Problem(1, 30011, 320, 320, rows=1, residual=True),
    Problem(1, 20003, 640, 640, bias=True, gelu=True),
    Problem(1, 9001, 1280, 1280, bias=True, residual=True, inplace=True),
    Problem(1, 1, 64, 64, bias=True, geglu=True),
    Problem(1, 45, 40, 192, bias=True, geglu=True),
    Problem(1, 301, 320, 2560, geglu=True),
    Problem(1, 301, 320, 2560, bias=True, scale=True, geglu=True),
    Problem(1, 20011, 320, 2560, bias=True, geglu=True),
    Problem(1, 5003, 640, 1344, bias=True, geglu=True),
    Problem(2, 45, 40, 96, 3, 9, bias=True, rows=10),
    Problem(1, 1, 64, 64, 3, 1),
    Problem(1, 15, 32, 32, 3, 5, bias=True, residual=True, scale=True),
    Problem(2, 21 * 81, 320, 320, 3, 81, bias=True, residual=True, scale=True),
    Problem(2, 21 * 324, 104, 640, 3, 324, bias=True, rows=42),
)


def operands(problem: Problem, device: str = "cuda") -> dict[str, Tensor | None]:
    """Random values in float16, the same for equal problems."""
    generator = torch.Generator(device).manual_seed(1)
    width = problem.n // 2 if problem.geglu else problem.n

    def random(wanted, *shape):
        return torch.randn(shape, device=device, generator=generator).half() if wanted else None

    weight = torch.randn(problem.n, problem.taps * problem.k, device=device, generator=generator)
    return {
        "x": random(True, problem.orbits, problem.length, problem.k),
        "weight": (weight / (problem.taps * problem.k) ** 0.5).half(),
        "bias": random(problem.bias, problem.n),
        "rows": random(problem.rows, problem.rows, width),
        "residual": random(problem.residual, problem.orbits, problem.length, width),
        "scale": random(problem.scale, 1),
    }


def reference(problem: Problem, given: dict[str, Tensor | None], dtype: torch.dtype = torch.float64) -> Tensor:
    """The same in plain torch in a wider type."""
    x, weight, bias, rows, residual, scale = (None if t is None else t.to(dtype) for t in given.values())
    assert x is not None
    assert weight is not None
    y = x.new_zeros(problem.orbits, problem.length, problem.n)
    for tap, part in enumerate(weight.split(problem.k, 1)):
        offset = (tap - problem.taps // 2) * problem.shift
        first, last = max(0, -offset), min(problem.length, problem.length - offset)
        if first < last:
            y[:, first:last] += x[:, first + offset : last + offset] @ part.T
    y = y if bias is None else y + bias
    if problem.geglu:
        y = y[..., 0::2] * F.gelu(y[..., 1::2])
    y = F.gelu(y) if problem.gelu else y
    y = y if scale is None else y * scale
    y = y if rows is None else (y.view(len(rows), -1, y.shape[-1]) + rows[:, None]).view_as(y)
    return y if residual is None else y + residual


def product(problem: Problem, given: dict[str, Tensor | None], tiles: HopperTiles) -> Tensor:
    """The kernel on these operands."""
    x, weight, bias, rows, residual, scale = given.values()
    assert x is not None
    assert weight is not None
    return hopper_gemm(
        x, weight, bias, tiles, taps=problem.taps, shift=problem.shift, rows=rows, residual=residual, scale=scale,
        geglu=problem.geglu, gelu=problem.gelu, inplace=problem.inplace,
    )  # fmt: skip


def run(problem: Problem, given: dict[str, Tensor | None], tiles: HopperTiles) -> Tensor:
    """The kernel's result, written where NaN was; the operands stay as they are."""
    x, residual = given["x"], given["residual"]
    assert x is not None
    if not problem.inplace or residual is None:
        width = problem.n // 2 if problem.geglu else problem.n
        x.new_full((problem.orbits, problem.length, width), float("nan"))  # freed at once: the result gets its memory
        return product(problem, given, tiles)
    memory = x.new_full((residual.numel() + 1024,), float("nan"))
    place, guard = memory[: residual.numel()].view_as(residual), memory[residual.numel() :]
    got = product(problem, {**given, "residual": place.copy_(residual)}, tiles)
    assert bool(guard.isnan().all()), "written past the end"
    return got


def worst(got: Tensor, expected: Tensor) -> float:
    """The largest error of a value, in units of its own size plus the root mean square; infinite where it is NaN."""
    error = (got.to(expected.dtype) - expected).abs()
    scale = expected.square().mean().sqrt()
    return float((error / (expected.abs() + scale)).nan_to_num(nan=float("inf")).max())


def errors(tiles: HopperTiles) -> Iterator[tuple[Problem, float]]:
    """Of every problem that these tiles fit; infinite where two runs differ."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for problem in PROBLEMS:
        if fits(tiles, problem.n, problem.k, problem.taps, problem.geglu, multiprocessors):
            given = operands(problem)
            got, again = run(problem, given, tiles), run(problem, given, tiles)
            same = torch.equal(got, again)
            yield problem, worst(got, reference(problem, given)) if same else float("inf")


def check_apart(index: int) -> tuple[bool, str]:
    """Runs `errors` of WAYS[index] in a process of its own: whether all is well, and what it said."""
    command = [sys.executable, "-m", "bench.gemm_check", "--way", str(index)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False, f"no answer in {SECONDS} s"
    return done.returncode == 0, (done.stdout + done.stderr[-1500:]).strip()


def passing() -> list[HopperTiles]:
    """The ways that are right, several checked side by side; prints one line each."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        answers = list(pool.map(check_apart, range(len(WAYS))))
    for tiles, (good, said) in zip(WAYS, answers, strict=True):
        print(f"{'right' if good else 'WRONG'} {tiles}: {said}", flush=True)
    return [tiles for tiles, (good, _) in zip(WAYS, answers, strict=True) if good]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gemm_check", description=__doc__)
    parser.add_argument("--way", type=int, help="only this one, in this process")
    args = parser.parse_args()
    if args.way is None:
        sys.exit(len(passing()) != len(WAYS))
    found = list(errors(WAYS[args.way]))
    wrong = [(problem, error) for problem, error in found if not error <= LIMIT]
    for problem, error in wrong:
        print(f"error {error:.2e}: {problem}")
    print(f"{len(found) - len(wrong)} of {len(found)} problems, worst error {max(error for _, error in found):.2e}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
