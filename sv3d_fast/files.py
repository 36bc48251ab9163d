"""Files appear under their final name complete or not at all: they are written beside it, then renamed.

Whatever keeps a file from being written (a full disk, a folder that can't be written) becomes an OutputError. What a
process that was killed left unfinished tells by its name whose it was, and `tidy` removes it.
"""

import contextlib
import functools
import os
import re
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

ABANDONED = 86_400.0  # seconds after which an unfinished file is nobody's, wherever its writer ran
UNFINISHED = re.compile(
    r"\.(?P<stem>.+)\.(?P<writer>[0-9a-f]+-[0-9]+-[0-9]+)-[0-9a-f]+\.(?P<kind>partial|old)(?P<suffix>.*)"
)


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
    partial, old = _beside(path), _beside(path, "old")
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


def tidy(folder: str | os.PathLike) -> None:
    """Removes what dead processes left unfinished in a folder, and puts back a folder that one was about to replace.

    A process is dead if it ran here and has ended, or if what it wrote is a day old. Raises OutputError.
    """
    folder = Path(folder)
    with _as_output_error(folder):
        for left in sorted(folder.glob(".*-*-*.*")):
            match = UNFINISHED.fullmatch(left.name)
            if match is None or not _is_abandoned(left, match["writer"]):
                continue
            path = folder / (match["stem"] + match["suffix"])
            if match["kind"] == "old" and not path.exists():
                os.replace(left, path)
            elif left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def natural_order(name: str) -> list:
    """Sort key that reads runs of digits as numbers: frame2 before frame10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part.lower()) for part in re.findall(r"\d+|\D+", name)]


def _beside(path: Path, kind: str = "partial") -> Path:
    pid = os.getpid()
    return path.with_name(f".{path.stem}.{_here()}-{pid}-{_began(pid)}-{secrets.token_hex(4)}.{kind}{path.suffix}")


@functools.cache
def _here() -> str:
    """Tells machines, and containers with processes of their own, apart."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return f"{zlib.crc32(f'{socket.gethostname()} {processes}'.encode()):08x}"


def _began(pid: int) -> int:
    """When a process of this machine began, in ticks since Linux booted; 0 for one that isn't there, or unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])  # the name, in brackets, may hold anything


def _is_abandoned(left: Path, writer: str) -> bool:
    place, pid, began = writer.split("-")
    try:
        age = time.time() - left.lstat().st_ctime  # which a rename sets, unlike the time of its content
    except FileNotFoundError:  # its writer has just finished it
        return False
    if age > ABANDONED:
        return True
    if place != _here():
        return False
    if int(began):
        return _began(int(pid)) != int(began)
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False


@contextlib.contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror or error}") from error
