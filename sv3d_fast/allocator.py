"""PyTorch's caching allocator for CUDA, simulated: what a sequence of births and deaths reserves on the GPU.

Its rules (c10/cuda/CUDACachingAllocator.cpp): sizes are rounded to 512 bytes; up to 1 MiB they are cut from segments of
2 MiB, up to 10 MiB from segments of 20 MiB, above that from a segment of their own, rounded to 2 MiB; the smallest free
block that fits is taken and the rest split off; neighbours that are free join again. Segments stay until
`release`, which is `torch.cuda.empty_cache`.
"""

import bisect
from collections.abc import Iterable

from .dry_run import Change

MIB = 2**20
ROUND, SMALL, LARGE = 512, MIB, 10 * MIB
STEP = 2 * MIB


class Allocator:
    """The state of one pool. arena: bytes of a first segment from which large blocks are cut."""

    def __init__(self, arena: int = 0):
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # small or not: (size, address), sorted
        self._segments: dict[int, tuple[bool, int]] = {}  # address -> small or not, size
        self._blocks: dict[int, tuple[bool, int, int]] = {}  # number -> small or not, address, size
        self._end = 0
        if arena:
            self._grow(False, _up(arena, STEP))

    @property
    def reserved(self) -> int:
        """Bytes of all segments."""
        return sum(size for _, size in self._segments.values())

    def run(self, changes: Iterable[Change]) -> int:
        """Lets the changes happen; returns the most that was reserved meanwhile."""
        most = self.reserved
        for number, size in changes:
            if size:
                self._allocate(number, size)
                most = max(most, self.reserved)
            else:
                self._give_back(*self._blocks.pop(number))
        return most

    def release(self) -> None:
        """Gives segments back that nothing lies in."""
        for small, free in self._free.items():
            for block in list(free):
                if self._segments.get(block[1]) == (small, block[0]):
                    free.remove(block)
                    del self._segments[block[1]]

    def _allocate(self, number: int, size: int) -> None:
        size = _up(size, ROUND)
        small = size <= SMALL
        free = self._free[small]
        place = bisect.bisect_left(free, (size, 0))
        if place == len(free):
            self._grow(small, 2 * MIB if small else 20 * MIB if size < LARGE else _up(size, STEP))
            place = bisect.bisect_left(free, (size, 0))
        found, address = free.pop(place)
        rest = found - size
        if rest >= ROUND if small else rest > SMALL:
            bisect.insort(free, (rest, address + size))
            found = size
        self._blocks[number] = (small, address, found)

    def _give_back(self, small: bool, address: int, size: int) -> None:
        free = self._free[small]
        for block in [b for b in free if b[1] + b[0] == address or address + size == b[1]]:
            free.remove(block)
            address, size = min(address, block[1]), size + block[0]
        bisect.insort(free, (size, address))

    def _grow(self, small: bool, size: int) -> None:
        address = self._end
        self._end += size + STEP  # segments are no neighbours
        self._segments[address] = (small, size)
        bisect.insort(self._free[small], (size, address))


def arena_for(changes: list[Change]) -> int:
    """The least arena, in steps of 1 % of the live peak, that no large block of `changes` has to leave."""
    peak = live_peak(changes)
    size = _up(peak, STEP)
    while Allocator(size).run([*_large(changes)]) > size:
        size += _up(peak // 100, STEP)
    return size


def live_peak(changes: Iterable[Change]) -> int:
    """The most bytes that are alive at one time."""
    sizes: dict[int, int] = {}
    live = peak = 0
    for number, size in changes:
        live += size or -sizes.pop(number)
        peak = max(peak, live)
        if size:
            sizes[number] = size
    return peak


def _large(changes: Iterable[Change]) -> Iterable[Change]:
    known = set()
    for number, size in changes:
        if size > SMALL:
            known.add(number)
        if number in known:
            yield number, size


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
