"""Files appear under their final name complete or not at all: they are written beside it, then renamed.

Whatever keeps a file from being written (a full disk, a folder that can't be written) becomes an OutputError.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


class OutputError(ValueError):
    """A file could not be written; the message is one line with its path and the reason."""


def make_folder(path: str | os.PathLike) -> Path:
    """Makes a folder and its parents where they are missing; returns it. Raises OutputError."""
    path = Path(path)
    with _as_output_error(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a name beside `path`, of the same suffix, to write to; renames it to `path` if the block succeeds.

    If the block raises, the unfinished file is removed and what stood at `path` stays. Raises OutputError in
    place of an OSError.
    """
    path = Path(path)
    partial = _beside(path)
    with _as_output_error(path):
        try:
            yield partial
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a new empty folder beside `path`; puts it in the place of `path` if the block succeeds.

    The folder that stood there is replaced as a whole, so no file of an earlier, longer run remains in it. If the
    block raises, the earlier folder stays. Raises OutputError in place of an OSError.
    """
    path = Path(path)
    partial, old = _beside(path), _beside(path)
    with _as_output_error(path):
        try:
            partial.mkdir()
            yield partial
            if path.is_dir():
                os.replace(path, old)
            os.replace(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def write_bytes(path: str | os.PathLike, data: bytes) -> Path:
    """Writes a file atomically; returns its path. Raises OutputError."""
    with atomic_file(path) as partial, open(partial, "xb") as file:
        file.write(data)
    return Path(path)


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Writes a UTF-8 text file atomically; returns its path. Raises OutputError."""
    return write_bytes(path, text.encode())


def natural_order(name: str) -> list:
    """Sort key that reads runs of digits as numbers: frame2 before frame10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part.lower()) for part in re.findall(r"\d+|\D+", name)]


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")


@contextlib.contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror or error}") from error
