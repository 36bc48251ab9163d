"""Which tiles each matrix product uses: found offline by `bench/tune.py` and `bench/gemm.py`, never at run time.

A table belongs to the GPU architecture that it was measured on. Row counts between those measured take the nearest;
a product or a GPU without an entry takes a size that is safe everywhere, and `sv3d-fast info` says so.
"""

import functools
import json
import math
from pathlib import Path
from typing import TypeVar

import torch

from sv3d_fast.kernels.gemm import Tiles
from sv3d_fast.kernels.hopper_gemm import HopperTiles

T = TypeVar("T")
SAFE = Tiles(128, 128, 64, warps=8, stages=3)


@functools.cache
def table(capability: tuple[int, int]) -> dict[tuple[str, int, int], dict[int, Tiles | None]]:
    """Per (kind, columns, depth) the tiles for each number of rows, None where the library is faster; empty for a GPU
    that was never measured."""
    path = Path(__file__).with_name(f"tiles_sm{capability[0]}{capability[1]}.json")
    if not path.exists():
        return {}
    found: dict[tuple[str, int, int], dict[int, Tiles | None]] = {}
    for key, value in json.loads(path.read_text()).items():
        kind, m, n, k = key.split()
        found.setdefault((kind, int(n), int(k)), {})[int(m)] = None if value is None else Tiles(**value)
    return found


def choose(kind: str, device: torch.device, m: int, n: int, k: int) -> Tiles | None:
    """For a product of m rows, n columns and k channels (of each tap); None where the library is faster.

    kind: "linear", "geglu" (n counts values and gates) or "temporal_conv".
    """
    if device.type != "cuda":
        return Tiles(32, 32, 16)  # interpreted
    sizes = table(torch.cuda.get_device_capability(device)).get((kind, n, k))
    return _nearest(sizes, m) if sizes else SAFE


@functools.cache
def hopper_table() -> dict[tuple[str, int, int], dict[int, HopperTiles | None]]:
    """Per (kind, columns, depth) the tiles of `hopper_gemm` for each number of rows, None where others are faster."""
    path = Path(__file__).with_name("hopper_tiles.json")
    found: dict[tuple[str, int, int], dict[int, HopperTiles | None]] = {}
    for key, value in json.loads(path.read_text()).items():
        kind, m, n, k = key.split()
        found.setdefault((kind, int(n), int(k)), {})[int(m)] = None if value is None else HopperTiles(**value)
    return found


def choose_hopper(kind: str, m: int, n: int, k: int) -> HopperTiles | None:
    """As `choose`, for `hopper_gemm`; None where something else is faster, or nothing was measured."""
    sizes = hopper_table().get((kind, n, k))
    return _nearest(sizes, m) if sizes else None


def why_not_hopper(kind: str, m: int, n: int, k: int) -> list[str]:
    """The reason why `choose_hopper` has none, if so."""
    if choose_hopper(kind, m, n, k) is not None:
        return []
    return ["another implementation was measured to be faster at this shape, or none was measured"]


def _nearest(sizes: dict[int, T], m: int) -> T:
    return sizes[min(sizes, key=lambda size: abs(math.log(size / m)))]
