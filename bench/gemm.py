"""The Hopper matrix product at the shapes of a guided step: `python -m bench.gemm --output kernels/hopper_tiles.json`.

Checks every way of cutting it first, at odd shapes and then at each shape that it is timed at. Then, per product: what
the engine runs without it (Triton's kernel or cuBLAS, as tiles_sm90.json says), cuBLAS with nothing behind the product,
and each way; the fastest goes into the table, null where none beats what there was. Last, what it makes of a step.
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gemm_check import LIMIT, Problem, operands, passing, product, reference, run, worst
from bench.tune import FRAMES, LEVELS, ORBITS, milliseconds
from sv3d_fast.kernels.geglu import geglu
from sv3d_fast.kernels.hopper_gemm import HopperTiles, fits
from sv3d_fast.kernels.linear import linear
from sv3d_fast.kernels.temporal_conv import temporal_conv

# calls in a step: transformers and residual blocks of each level, and its shortcuts as (channels in, calls)
TRANSFORMERS, BLOCKS = (5, 5, 5, 1), (5, 5, 5, 7)
SHORTCUTS = (((640, 1), (320, 5)), ((1280, 1), (640, 4), (320, 2)), ((1280, 5), (640, 2)), ((1280, 6),))
LAGS, BANDS = (0, 1, 3), (4, 16, 32)  # tried with the two best ways, besides what WAYS have


def products() -> list[tuple[str, Problem, int]]:
    """Every product of a step: its kind in the tables, itself, and how often it runs."""
    found = []
    for (side, c), transformers, blocks, shortcuts in zip(LEVELS, TRANSFORMERS, BLOCKS, SHORTCUTS, strict=True):
        m, shift = ORBITS * FRAMES * side * side, side * side

        def linears(k, n, calls, m=m, **what):
            found.append(("linear", Problem(1, m, k, n, **what), calls))

        def convolutions(calls, m=m, c=c, shift=shift, **what):
            found.append(("temporal_conv", Problem(ORBITS, m // ORBITS, c, c, 3, shift, **what), calls))

        linears(c, 3 * c, 2 * transformers)
        linears(c, c, 2 * transformers, rows=ORBITS, residual=True, inplace=True)
        linears(c, c, transformers, bias=True)
        linears(c, c, transformers, bias=True, residual=True, inplace=True)
        linears(4 * c, c, 3 * transformers, residual=True, inplace=True)
        found.append(("geglu", Problem(1, m, c, 8 * c, bias=True, geglu=True), 3 * transformers))
        convolutions(blocks, rows=ORBITS * FRAMES)
        convolutions(blocks, bias=True, residual=True, scale=True)
        for k, calls in shortcuts:
            linears(k, c, calls, residual=True, inplace=True)
    return found


def key(kind: str, problem: Problem) -> str:
    """What the tables are asked for."""
    return f"{kind} {problem.orbits * problem.length} {problem.n} {problem.k}"


def teraflops(problem: Problem, ms: float) -> float:
    """Of the products alone."""
    return 2e-9 * problem.orbits * problem.length * problem.n * problem.k * problem.taps / ms


def calls_of(kind: str, problem: Problem) -> tuple[Callable, Callable, Callable]:
    """The engine's call without the Hopper kernel, cuBLAS's bare product, and the kernel with given tiles."""
    given = operands(problem)
    x, weight, bias, rows, residual, scale = given.values()
    assert x is not None
    assert weight is not None
    wide = x.repeat(1, 1, problem.taps) if problem.taps > 1 else x
    flat = None if residual is None else residual[0]

    def present() -> Tensor:
        if kind == "geglu":
            return geglu(x[0], weight, bias, implementation="triton")
        if kind == "linear":
            arguments = (x[0], weight, bias, flat, rows, problem.gelu, problem.inplace)
            (fused,) = [i for i in linear.implementations if i.name == "triton"]
            return linear(*arguments, implementation="cublas" if fused.why_not(*arguments) else "triton")
        frames = (problem.orbits, FRAMES, -1)
        return temporal_conv(
            x.view(*frames, problem.k), weight.view(problem.n, 3, -1), bias,
            None if rows is None else rows.view(frames),
            None if residual is None else residual.view(*frames, problem.n), scale, implementation="triton",
        )  # fmt: skip

    def ours(tiles: HopperTiles) -> Tensor:
        return product(problem, given, tiles)

    return present, lambda: F.linear(wide, weight), ours


def warm(index: int) -> None:
    """Compiles Triton's kernel for a product, in a process of its own."""
    calls_of(*products()[index][:2])[0]()
    torch.cuda.synchronize()


def timed(kind: str, problem: Problem, ways: list[HopperTiles], until: float) -> dict[HopperTiles | str, float]:
    """Milliseconds of "present", "bare" and every way that fits and is right here; variants until that time."""
    present, bare, ours = calls_of(kind, problem)
    apart = replace(problem, inplace=False)
    given = operands(apart)
    expected = reference(apart, given, torch.float32)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    found: dict[HopperTiles | str, float] = {"present": milliseconds(present), "bare": milliseconds(bare)}

    def add(tiles: HopperTiles) -> None:
        shape = problem.n, problem.k, problem.taps, problem.geglu
        if tiles in found or not fits(tiles, *shape, multiprocessors):
            return
        error = worst(run(apart, given, tiles), expected)
        if error <= LIMIT:
            found[tiles] = milliseconds(lambda: ours(tiles))
        else:
            print(f"WRONG {tiles} at {key(kind, problem)}: error {error:.2e}", flush=True)

    for tiles in ways:
        add(tiles)
    streamed = [(ms, t) for ms, t in ranked(found) if not t.resident]
    for _, tiles in streamed[:2]:
        for variant in [replace(tiles, lag=lag) for lag in LAGS] + [replace(tiles, band=band) for band in BANDS]:
            if time.monotonic() < until:
                add(variant)
    return found


def ranked(found: dict[HopperTiles | str, float]) -> list[tuple[float, HopperTiles]]:
    """The ways among them, fastest first."""
    return sorted(((ms, t) for t, ms in found.items() if isinstance(t, HopperTiles)), key=lambda pair: pair[0])


def short(tiles: HopperTiles) -> str:
    """For a line of results."""
    name = f"{tiles.height}x{tiles.columns}"
    return f"{name} resident" if tiles.resident else f"{name} band {tiles.band} lag {tiles.lag}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gemm", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the table, JSON")
    parser.add_argument("--seconds", type=float, default=90, help="after which no more variants are tried")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    cases = products()
    torch.backends.cuda.matmul.allow_tf32 = False
    with ProcessPoolExecutor(6, mp_context=get_context("spawn")) as pool:
        compiling = pool.map(warm, range(len(cases)))
        ways = passing()
        list(compiling)
    times: dict[str, list[tuple[int, Problem, dict[HopperTiles | str, float]]]] = {}
    try:
        for kind, problem, calls in cases:
            found = timed(kind, problem, ways, until)
            times.setdefault(key(kind, problem), []).append((calls, problem, found))
            extra = "+".join(n for n in ("bias", "rows", "residual", "scale") if getattr(problem, n))
            print(
                f"{key(kind, problem)} {extra}: present {found['present']:.3f} bare {found['bare']:.3f} | "
                + ", ".join(f"{short(t)} {ms:.3f}" for ms, t in ranked(found)[:9]),
                flush=True,
            )
    finally:
        report(times, args.output)


def report(times: dict, output: Path) -> None:
    """Writes the table, and prints what each product gains and what that makes of a step."""
    table: dict[str, dict | None] = json.loads(output.read_text()) if output.exists() else {}
    gain = work = before = after = 0.0
    for name, measured in times.items():
        shared = set.intersection(*(set(found) for _, _, found in measured)) - {"present", "bare"}
        total = {t: sum(calls * found[t] for calls, _, found in measured) for t in (*shared, "present", "bare")}
        best = min(shared, key=lambda t: total[t], default=None)
        wins = best is not None and total[best] < total["present"]
        table[name] = asdict(best) if wins else None
        chosen = total[best] if wins else total["present"]
        flop = sum(calls * teraflops(problem, 1.0) for calls, problem, _ in measured)
        gain, work = gain + total["present"] - chosen, work + flop
        before, after = before + total["present"], after + chosen
        print(
            f"{name:30s} {total['present']:6.2f} -> {chosen:6.2f} ms a step, {flop / total['present']:4.0f} -> "
            f"{flop / chosen:4.0f} TFLOPS, bare cuBLAS {flop / total['bare']:4.0f}  {short(best) if wins else '-'}"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(table, indent=1) + "\n")
    print(
        f"all products of a step: {before:.1f} -> {after:.1f} ms, {work / before:.0f} -> {work / after:.0f} TFLOPS; "
        f"the step gains {gain:.1f} ms"
    )


if __name__ == "__main__":
    main()
