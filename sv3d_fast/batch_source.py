"""What a batch converts: the pictures of a folder, or the rows of a CSV list with settings of their own."""

import csv
import types
import typing
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path

from .settings import NAMES, Settings, with_purpose

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
PICTURE, NAME = "picture", "name"  # columns of a list; every other column is a setting


@dataclass(frozen=True)
class Job:
    """One picture: where it is, the folder below the output that it fills, and its settings."""

    picture: Path
    name: str
    settings: Settings


def read_jobs(source: Path, settings: Settings) -> list[Job]:
    """The pictures of a folder in order of their names, or the rows of a CSV file.

    The list's header has `picture` (a path, relative to the list), perhaps `name`, and settings that differ by row; an
    empty cell leaves a setting as it is; a row's purpose sets what the row leaves open. Several formats stand in a cell
    with spaces between them. A name is the picture's stem, or its whole name where stems are the same.
    Raises ValueError for a source that is neither, has no pictures, names a folder twice or holds a bad setting.
    """
    if source.is_dir():
        pictures = sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        stems = Counter(p.stem for p in pictures)
        jobs = [Job(p, p.stem if stems[p.stem] == 1 else p.name, settings) for p in pictures]
    elif source.is_file():
        jobs = _read_list(source, settings)
    else:
        raise ValueError(f"source: expected a folder of pictures or a CSV list, found nothing at {source}")
    if not jobs:
        raise ValueError(f"source: expected at least one picture, {source} has none ({', '.join(SUFFIXES)})")
    twice = [name for name, count in Counter(job.name.lower() for job in jobs).items() if count > 1]
    if twice:
        raise ValueError(f"source: expected a folder of its own for each picture, {twice[0]!r} is there twice")
    return jobs


def _read_list(path: Path, settings: Settings) -> list[Job]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or [], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"source: {path} is no CSV list: {error}") from error
    known = {f.name: f.type for f in fields(Settings)}
    for column in columns:
        if column not in (PICTURE, NAME) and column not in known:
            raise ValueError(f"source: {path}: no setting {column!r}; there are {', '.join(known)}")
    if PICTURE not in columns:
        raise ValueError(
            f"source: {path}: expected a column {PICTURE!r}, got {', '.join(map(repr, columns)) or 'none'}"
        )
    jobs = []
    for number, row in enumerate(rows, start=2):
        try:
            given = {k: _value(row[k], known[k], k in NAMES) for k in columns if k in known and row[k]}
            if None in row or not row[PICTURE]:
                raise ValueError(f"expected {len(columns)} cells, the picture's among them")
            name = row.get(NAME) or Path(row[PICTURE]).stem
            if Path(name).name != name or name.startswith("."):
                raise ValueError(f"name: expected a plain file name, got {name!r}")
            jobs.append(Job(path.parent / row[PICTURE], name, replace(settings, **with_purpose(given))))
        except ValueError as error:
            raise ValueError(f"source: {path}, line {number}: {error}") from error
    return jobs


def _value(text: str, kind: typing.Any, several: bool) -> typing.Any:
    """A cell as its setting's type."""
    if several:
        return text.split()
    kinds = [k for k in (kind.__args__ if isinstance(kind, types.UnionType) else (kind,)) if k is not type(None)]
    if kinds == [bool]:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"expected true or false, got {text!r}")
        return text.lower() == "true"
    return kinds[0](text)
