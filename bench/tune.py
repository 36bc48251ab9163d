"""Finds the tiles of every matrix product of a network: `python -m bench.tune --output kernels/tiles_sm90.json`.

Compiles all candidates in parallel processes, then times each at the shapes of a guided step of SV3D, 21 frames at
576², and of TripoSR with 1 and 8 pictures. Where the library is faster than every candidate, the entry is null. Entries
of the output that are not measured stay. Run it on the GPU whose table it makes.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F

from sv3d_fast.kernels.gemm import Tiles, gemm

ORBITS, FRAMES = 2, 21
LEVELS = ((72, 320), (36, 640), (18, 1280), (9, 1280))
SKIPS = ((72, 640, 320), (72, 320, 320), (36, 1280, 640), (36, 640, 640), (36, 320, 640), (18, 1280, 1280),
         (18, 640, 1280), (9, 1280, 1280))  # fmt: skip
PICTURES = (1, 8)
IMAGE_TOKENS, TRIPLANE_TOKENS = 1025, 3072  # a picture
FEW_ROWS = 16384  # below it, small tiles are tried too: else there may be fewer tiles than multiprocessors
SMALL = (
    Tiles(64, 64, 64, 4, 4, 8, 3),
    Tiles(64, 128, 64, 4, 4, 8, 2),
    Tiles(64, 256, 64, 4, 3, 8, 1),
)
CANDIDATES = (
    Tiles(128, 128, 64, 4, 3, 8, 2),
    Tiles(128, 128, 64, 8, 4, 8, 1),
    Tiles(128, 256, 64, 8, 3, 8, 1),
    Tiles(256, 128, 64, 8, 3, 8, 1),
    Tiles(128, 64, 64, 4, 4, 8, 2),
    Tiles(256, 64, 64, 8, 4, 8, 1),
    Tiles(256, 64, 64, 4, 2, 8, 2),
)


@dataclass(frozen=True)
class Case:
    """A product as `gemm` runs it: kind "linear" | "geglu" | "temporal_conv", rows, columns, depth of a tap."""

    kind: str
    m: int
    n: int
    k: int
    bias: bool = False
    residual: bool = False
    rows: bool = False
    gelu: bool = False

    @property
    def key(self) -> str:
        """What the table is asked for."""
        return f"{self.kind} {self.m} {self.n} {self.k}"

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.m * self.n * self.k * (3 if self.kind == "temporal_conv" else 1)


def sv3d() -> Iterator[Case]:
    """Every product of a step."""
    for side, c in LEVELS:
        m = ORBITS * FRAMES * side * side
        yield Case("linear", m, 3 * c, c)
        yield Case("linear", m, c, c, residual=True, rows=True)
        yield Case("linear", m, c, 4 * c, bias=True, residual=True)
        yield Case("geglu", m, 8 * c, c, bias=True)
        yield Case("temporal_conv", m, c, c, rows=True)
        yield Case("temporal_conv", m, c, c, bias=True, residual=True)
    for side, k, n in SKIPS:
        yield Case("linear", ORBITS * FRAMES * side * side, n, k, residual=True)


def triposr() -> Iterator[Case]:
    """Every product of the fused networks; of those that share a shape, the one that runs most."""
    for pictures in PICTURES:
        m, width, hidden = pictures * IMAGE_TOKENS, 768, 3072
        yield Case("linear", m, 3 * width, width, bias=True)
        yield Case("linear", m, width, width, bias=True, residual=True)
        yield Case("linear", m, hidden, width, bias=True, gelu=True)
        yield Case("linear", m, width, hidden, bias=True, residual=True)
        yield Case("linear", m, 16 * 2 * 1024, width)  # keys and values of all layers
        m, width = pictures * TRIPLANE_TOKENS, 1024
        yield Case("linear", m, 3 * width, width)
        yield Case("linear", m, width, width, bias=True, residual=True)
        yield Case("geglu", m, 8 * width, width, bias=True)
        yield Case("linear", m, width, 4 * width, bias=True, residual=True)
        yield Case("linear", m, 160, width, residual=True)


NETWORKS = {"sv3d": sv3d, "triposr": triposr}


def operands(case: Case) -> tuple[Callable, Callable]:
    """Two calls: the product with given tiles, and the library's way to the same result."""

    def random(*shape):
        return torch.randn(shape, dtype=torch.float16, device="cuda") * 0.1

    taps = 3 if case.kind == "temporal_conv" else 1
    orbits = ORBITS if taps == 3 else 1
    length = case.m // orbits
    x, weight = random(orbits, length, case.k), random(case.n, taps * case.k)
    bias = random(case.n) if case.bias else None
    rows = random(ORBITS * FRAMES if taps == 3 else ORBITS, case.n) if case.rows else None
    residual = random(orbits, length, case.n) if case.residual else None
    shift = length // FRAMES

    def ours(tiles: Tiles) -> torch.Tensor:
        return gemm(
            x, weight, bias, tiles, taps=taps, shift=shift, rows=rows, residual=residual,
            geglu=case.kind == "geglu", gelu=case.gelu,
        )  # fmt: skip

    def library() -> torch.Tensor:
        if taps == 3:
            kernel = weight.view(case.n, 3, case.k).mT[..., None]
            y = F.conv2d(x.view(orbits, FRAMES, -1, case.k).permute(0, 3, 1, 2), kernel, bias, padding=(1, 0))
            y = y.permute(0, 2, 3, 1).reshape(orbits, length, case.n)
            y = y if rows is None else (y.view(len(rows), -1, case.n) + rows[:, None]).view_as(y)
        elif case.kind == "geglu":
            y = F.linear(x, weight, bias)
            value, gate = y.chunk(2, -1)
            return value * F.gelu(gate)
        else:
            y = F.linear(x, weight, bias)
            y = F.gelu(y) if case.gelu else y
            y = y if rows is None else (y.view(len(rows), -1, case.n) + rows[:, None]).view_as(y)
        return y if residual is None else y + residual

    return ours, library


def usable(case: Case) -> list[Tiles]:
    """Candidates for a case."""
    return [*CANDIDATES, *(SMALL if case.m < FEW_ROWS else ())]


def compile_one(task: tuple[Case, Tiles]) -> str | None:
    """Compiles by running once; returns what went wrong, if anything."""
    case, tiles = task
    try:
        operands(case)[0](tiles)
        torch.cuda.synchronize()
    except Exception as error:  # too much shared memory, above all
        return f"{type(error).__name__}: {str(error)[:100]}"
    return None


def milliseconds(call: Callable[[], object], calls: int = 8, runs: int = 7) -> float:
    """Of one call: median of `runs` replays of a graph of `calls`, so that launching costs nothing."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in pairs:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in pairs)[runs // 2] / calls


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the table, JSON")
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=list(NETWORKS), help="whose products")
    args = parser.parse_args()
    cases = [case for name in args.network for case in NETWORKS[name]()]
    tasks = [(case, tiles) for case in cases for tiles in usable(case)]
    seen: set[tuple] = set()  # one compilation serves all shapes with the same epilogue
    distinct = []
    for case, tiles in tasks:
        kind = (case.kind, case.bias, case.residual, case.rows, case.gelu, tiles)
        if kind not in seen:
            seen.add(kind)
            distinct.append((case, tiles))
    with ProcessPoolExecutor(15, mp_context=get_context("spawn")) as pool:
        for task, error in zip(distinct, pool.map(compile_one, distinct), strict=True):
            if error:
                print("skipped", task, error, flush=True)
    table: dict[str, dict | None] = json.loads(args.output.read_text()) if args.output.exists() else {}
    best_ms: dict[str, float] = {}
    for case in cases:
        ours, library = operands(case)
        peer = milliseconds(library)
        timed = []
        for tiles in usable(case):
            try:
                timed.append((milliseconds(functools.partial(ours, tiles)), tiles))
            except Exception:  # reported above
                torch.cuda.synchronize()
        timed.sort(key=lambda pair: pair[0])
        ms, tiles = timed[0]
        line = " ".join(f"{t.m}x{t.n}/{t.warps}w{t.stages}s{t.resident}r:{v:.3f}" for v, t in timed[:7])
        print(
            f"{case.key:34s} {ms:.3f} ms {case.flops / ms / 1e9:4.0f} TFLOPS, library {peer:.3f} | {line}", flush=True
        )
        if best_ms.get(case.key, 1e9) > ms:
            best_ms[case.key] = ms
            table[case.key] = asdict(tiles) if ms < peer else None
    args.output.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
