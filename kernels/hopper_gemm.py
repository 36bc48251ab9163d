"""The matrix product of `gemm.py` in CUDA for Hopper, where loading, products and what follows them overlap.

One warp group loads tiles, two multiply, and one of them stores while the other multiplies; see csrc/gemm_kernel.h.
"""

from dataclasses import dataclass

from torch import Tensor

from sv3d_fast.kernels import native
from sv3d_fast.kernels.hopper_support import why_no_hopper


@dataclass(frozen=True)
class HopperTiles:
    """How the product is cut; a way that csrc/gemm.cu has compiled.

    height, columns: of a block's tile, or of a warp group's where the weight is `resident`, that is stays in shared
    memory. band: strips of rows that go through all columns together. lag: chunks of 64 channels by which one warp
    group follows the other, so that only one of them stores at a time.
    """

    height: int
    columns: int
    resident: bool = False
    band: int = 8
    lag: int = 2


WAYS = (
    HopperTiles(128, 256),
    HopperTiles(128, 192),
    HopperTiles(128, 160),
    HopperTiles(256, 160),
    HopperTiles(256, 128),
    HopperTiles(64, 256, resident=True),
    HopperTiles(64, 160, resident=True),
    HopperTiles(64, 128, resident=True),
)
RESIDENT_CHUNKS = {256: 5, 160: 5, 128: 10}  # of 64 channels, by columns: what fits in shared memory


def fits(tiles: HopperTiles, n: int, k: int, taps: int, geglu: bool, multiprocessors: int) -> bool:
    """Whether these tiles can work on a weight (n, taps * k), with or without gates."""
    if n % (64 if geglu else 32) or (geglu and tiles.columns % 64):
        return False
    if not tiles.resident:
        return True
    chunks, blocks = taps * -(-k // 64), -(-n // tiles.columns)
    return chunks <= RESIDENT_CHUNKS[tiles.columns] and blocks <= multiprocessors


def why_not(x: Tensor, weight: Tensor, *others: Tensor | None) -> list[str]:
    """Reasons why the kernel can't run on these operands. x: (..., K), weight: (N, ...)."""
    given = [t for t in (x, weight, *others) if t is not None]
    reasons = why_no_hopper(*given)
    if x.shape[-1] % 8 or len(weight) % 32:
        reasons.append(f"channels in multiples of 8 to 32 only, got {x.shape[-1]} to {len(weight)}")
    return reasons


def hopper_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: HopperTiles,
    *,
    taps: int = 1,
    shift: int = 0,
    rows: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    geglu: bool = False,
    gelu: bool = False,
    inplace: bool = False,
) -> Tensor:
    """As `gemm.gemm`, for float16 on a Hopper GPU. Raises ValueError for operands and tiles that it can't take."""
    orbits, length, _ = x.shape
    x, weight = x.detach(), weight.detach()
    bias, rows, scale = (None if t is None else t.detach() for t in (bias, rows, scale))
    if inplace and residual is not None:
        out = residual
    else:
        out = x.new_empty(orbits, length, len(weight) // 2 if geglu else len(weight))
    native.load("cuda").gemm_multiply(
        x, weight, bias, rows, residual, scale, out, taps, shift, geglu, gelu,
        tiles.height, tiles.columns, tiles.resident, tiles.band, tiles.lag,
    )  # fmt: skip
    return out
