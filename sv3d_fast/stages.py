"""Runs a stage: times it, takes its peak memory, and skips it when an earlier run already wrote its result."""

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from . import __version__
from .events import Event, FileWritten, StageFinished, StageResumed, StageStarted, Warned
from .files import OutputError, make_folder, tidy, write_text

T = TypeVar("T")
MANIFEST = "manifest.json"


class PeakMemory:
    """Peak memory in bytes since construction: of the GPU if the device is one, else of this process."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.init()  # the first stage of a process may be one that finds its orbit made
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_resident_peak()

    def read(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident_peak()


def _reset_resident_peak() -> None:
    # Linux resets VmHWM on this write; where that is not allowed, the peak is that of the whole process so far
    control = Path("/proc/self/clear_refs")
    if control.exists():
        try:
            control.write_text("5")
        except OSError:
            return


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Product(Generic[T]):
    """What a stage made. entry: of the manifest once it is saved; None if an earlier run saved it."""

    name: str
    value: T
    entry: dict[str, Any] | None


@dataclass
class Record:
    """The manifest of an output folder, and which of an earlier run's results in it can be taken.

    A stage's entry holds the fingerprint of all that its result depends on; a later run with the same fingerprint
    takes the files instead of running the stage. At every moment the manifest on disk is true of the files beside it:
    an earlier run's stay until a stage has its result, and then go together with all that was made from them.
    """

    folder: Path
    device: torch.device
    plan: Mapping[str, tuple[str, ...]]
    manifest: dict
    before: dict
    _notes: dict = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        device: torch.device,
        plan: Mapping[str, tuple[str, ...]],
        header: Mapping[str, Any],
        *,
        overwrite: bool = False,
    ) -> "Record":
        """Makes the folder and reads what an earlier run left in it, unless `overwrite` forgets that.

        plan: stages and the names of what they write into the folder. header: the manifest's entries that are known
        from the start. Raises OutputError for a folder that can't be written, ValueError for one that holds a broken
        manifest, or files of these names that no run wrote.
        """
        folder = make_folder(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"can't write {folder}: permission denied")
        tidy(folder)
        before = {} if overwrite else _read_stages(folder, plan)
        return cls(folder, device, plan, {**header, "stages": {}, "warnings": []}, before)

    def stage(
        self,
        name: str,
        depends: Mapping[str, Any],
        work: Callable[[], Generator[Event, None, T]],
        save: Callable[[T], Iterable[Path]],
        read: Callable[[], T] | None = None,
    ) -> Generator[Event, None, T]:
        """Runs `work` and then `save`, or takes the result by `read` if an earlier run saved it from equal `depends`.

        depends: what tells one result from another, plain values for JSON; this package's version is added.
        """
        product = yield from self.make(name, depends, work, read)
        return (yield from self.save(product, save))

    def make(
        self,
        name: str,
        depends: Mapping[str, Any],
        work: Callable[[], Generator[Event, None, T]],
        read: Callable[[], T] | None = None,
    ) -> Generator[Event, None, Product[T]]:
        """The first part of `stage`, without saving: record and result may go on to `save` in another process."""
        fingerprint, entry = _fingerprint(name, depends), self.before.get(name, {})
        if read and self.is_finished(name, depends):
            try:
                value = read()
            except (ValueError, OSError) as error:
                yield self.warn(name, f"the earlier result is damaged and is made again: {error}")
            else:
                self.manifest["stages"][name] = {**entry, "resumed": True}
                for message in entry["warnings"]:
                    yield self.warn(name, message)
                yield StageResumed(name, value)
                return Product(name, value, None)
        yield StageStarted(name)
        began, memory, warnings = time.perf_counter(), PeakMemory(self.device), []
        self._notes = {}
        running = work()
        while True:
            try:
                event = next(running)
            except StopIteration as stop:
                value = stop.value
                break
            if isinstance(event, Warned):
                warnings.append(event.message)
                self.warn(name, event.message)
            yield event
        entry = {
            "fingerprint": fingerprint, "seconds": time.perf_counter() - began, "peak_memory_bytes": memory.read(),
            "files": list(self.plan[name]), "warnings": warnings, **self._notes,
        }  # fmt: skip
        return Product(name, value, entry)

    def save(self, product: Product[T], write: Callable[[T], Iterable[Path]]) -> Generator[Event, None, T]:
        """The second part of `stage`: writes what `make` made, if it did, and enters it in the manifest."""
        name, value = product.name, product.value
        if product.entry is None:
            return value
        began, memory = time.perf_counter(), PeakMemory(self.device)
        self._remove_stale()
        for path in write(value):
            yield FileWritten(path)
        seconds = product.entry["seconds"] + time.perf_counter() - began
        peak = max(product.entry["peak_memory_bytes"], memory.read())
        self.manifest["stages"][name] = product.entry | {"seconds": round(seconds, 3), "peak_memory_bytes": peak}
        self.write()
        yield StageFinished(name, value, seconds, peak)
        return value

    def is_finished(self, name: str, depends: Mapping[str, Any]) -> bool:
        """Whether an earlier run left this stage's files, made from equal `depends`."""
        complete = all((self.folder / file).exists() for file in self.plan[name])
        return complete and self.before.get(name, {}).get("fingerprint") == _fingerprint(name, depends)

    def note(self, **values: Any) -> None:
        """Adds to the entry of the stage that runs."""
        self._notes.update(values)

    def keep(self, name: str) -> None:
        """Carries a stage of the earlier run, which this run has no part in, over to its manifest."""
        if name in self.before:
            self.manifest["stages"][name] = self.before[name]

    def warn(self, stage: str, message: str) -> Warned:
        """Notes a warning in the manifest; returns its event."""
        self.manifest["warnings"].append({"stage": stage, "message": message})
        return Warned(stage, message)

    def write(self) -> None:
        """Writes the manifest under its final name, whole or not at all."""
        write_text(self.folder / MANIFEST, json.dumps(plain(self.manifest), indent=2, allow_nan=False) + "\n")

    def fingerprint(self, name: str) -> str:
        """Of a stage that is done."""
        return self.manifest["stages"][name]["fingerprint"]

    def _remove_stale(self) -> None:
        """Takes out of the manifest, then off the disk, what this run has neither made nor resumed."""
        self.write()
        for name, files in self.plan.items():
            if name not in self.manifest["stages"]:
                for path in map(self.folder.joinpath, files):
                    _remove(path)


def _fingerprint(name: str, depends: Mapping[str, Any]) -> str:
    told = json.dumps([__version__, name, depends], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """The value as JSON can hold it: numbers that are not finite become None, undecodable bytes of names "?"."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str | Path):
        return str(value).encode("utf-8", "replace").decode()
    return value


def _read_stages(folder: Path, plan: Mapping[str, tuple[str, ...]]) -> dict:
    """The stages of the manifest that stands in a folder, by name."""
    path = folder / MANIFEST
    if not path.exists():
        found = [file for files in plan.values() for file in files if (folder / file).exists()]
        if found:
            raise ValueError(
                f"{folder}: holds {', '.join(found)} but no {MANIFEST} of an earlier run; "
                f"give another folder, or --overwrite to replace them"
            )
        return {}
    refusal = f"{path}: not a manifest of an earlier run; give another folder, or --overwrite to start anew"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(refusal) from error
    stages = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(stages, dict) or not all(map(_is_entry, stages.values())):
        raise ValueError(refusal)
    return stages


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("fingerprint"), str):
        return False
    warnings = entry.get("warnings")
    return isinstance(warnings, list) and all(isinstance(message, str) for message in warnings)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"can't replace {path}: {error.strerror or error}") from error
