"""Sizes of memory as people write them."""

import pytest

from sv3d_fast.sizes import gibibytes, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GiB", 6 * 2**30), ("6000MB", 6_000_000_000), (" 6 gib ", 6 * 2**30), ("0.5GiB", 2**29),
        ("4.75GB", 4_750_000_000), ("123", 123), ("7B", 7), ("2KiB", 2048), ("3kb", 3000), ("1MiB", 2**20),
    ],
)  # fmt: skip
def test_sizes_are_read(text, size):
    assert parse_size("max_memory", text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "six", "-6GiB", "6 TiBs", "6GiB!", "1e9", "0", "0GiB", "0.0000001KB", "6,5GiB", "nan", "6\n7"]
)
def test_what_is_no_size_is_refused_by_name(text):
    with pytest.raises(ValueError, match=r"^max_memory: expected a size such as 6GiB or 6000MB, got ") as info:
        parse_size("max_memory", text)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("size", [1, 2**20, 3_109_351_936, 6 * 2**30, 6 * 2**30 + 1])
def test_what_is_named_as_enough_is_enough(size):
    assert size <= parse_size("x", gibibytes(size)) <= size + 0.01 * 2**30
    assert gibibytes(6 * 2**30) == "6.00GiB"
