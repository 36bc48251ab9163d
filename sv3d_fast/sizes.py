"""Sizes of memory as people write them."""

import re

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(name: str, text: str) -> int:
    """Bytes of "6GiB", "6000 MB" or "6442450944". Raises ValueError, naming `name`, for anything else and for 0."""
    parts = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]*)\s*", text)
    unit = None if parts is None else UNITS.get(parts[2].upper())
    if parts is None or unit is None or (size := int(float(parts[1]) * unit)) < 1:
        raise ValueError(f"{name}: expected a size such as 6GiB or 6000MB, got {text!r}")
    return size


def gibibytes(size: int) -> str:
    """A size for people, rounded up: what is named as enough has to be enough."""
    return f"{-(-size * 100 // 2**30) / 100:.2f}GiB"
