"""Runs a stage: times it, takes its peak memory, and skips it when an earlier run already wrote its result."""

import hashlib
import json
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from .events import Event, StageFinished, StageResumed, StageStarted, Warned
from .files import write_text

T = TypeVar("T")
MANIFEST = "manifest.json"


class PeakMemory:
    """Peak memory in bytes since construction: of the GPU if the device is one, else of this process."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_resident_peak()

    def read(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident_peak()


def _reset_resident_peak() -> None:
    # Linux resets VmHWM on this write; elsewhere the peak is that of the whole process so far
    control = Path("/proc/self/clear_refs")
    if control.exists():
        try:
            control.write_text("5")
        except PermissionError:
            return


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Record:
    """The manifest of an output folder while it is being written: settings, stages, warnings.

    A stage's entry holds the fingerprint of all that its result depends on; a later run with the same fingerprint
    takes the files instead of running the stage.
    """

    folder: Path
    device: torch.device
    manifest: dict = field(default_factory=dict)
    before: dict = field(default_factory=dict)
    chain: str = ""

    @classmethod
    def open(cls, folder: Path, device: torch.device, overwrite: bool) -> "Record":
        """Reads what an earlier run left in the folder, unless `overwrite` forgets it."""
        path, before = folder / MANIFEST, {}
        if path.exists() and not overwrite:
            try:
                before = json.loads(path.read_text()).get("stages", {})
            except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}: not a manifest of an earlier run; give --overwrite to start anew") from error
        return cls(folder, device, {"stages": {}, "warnings": []}, before)

    def stage(
        self,
        name: str,
        depends: dict[str, Any],
        work: Callable[[], Generator[Event, None, T]],
        read: Callable[[], T] | None = None,
        files: tuple[str, ...] = (),
    ) -> Generator[Event, None, T]:
        """Runs `work`, or takes its result by `read` if an earlier run wrote `files` from the same `depends`.

        Fingerprints chain: a stage depends on all that the stages before it depended on.
        """
        self.chain = hashlib.sha256(json.dumps([self.chain, name, depends], sort_keys=True).encode()).hexdigest()[:16]
        entry = self.before.get(name, {})
        if read and entry.get("fingerprint") == self.chain and all((self.folder / f).exists() for f in files):
            value = read()
            self.manifest["stages"][name] = {**entry, "resumed": True}
            for message in entry.get("warnings", []):
                self.manifest["warnings"].append({"stage": name, "message": message})
            self.write()
            yield StageResumed(name, value)
            return value
        yield StageStarted(name)
        began, memory, warnings = time.perf_counter(), PeakMemory(self.device), []
        running = work()
        while True:
            try:
                event = next(running)
            except StopIteration as stop:
                value = stop.value
                break
            if isinstance(event, Warned):
                warnings.append(event.message)
                self.manifest["warnings"].append({"stage": name, "message": event.message})
            yield event
        seconds, peak = time.perf_counter() - began, memory.read()
        self.manifest["stages"][name] = {
            "fingerprint": self.chain, "seconds": round(seconds, 3), "peak_memory_bytes": peak,
            "files": list(files), "warnings": warnings,
        }  # fmt: skip
        self.write()
        yield StageFinished(name, value, seconds, peak)
        return value

    def write(self) -> None:
        """Writes the manifest under its final name, whole or not at all."""
        write_text(self.folder / MANIFEST, json.dumps(self.manifest, indent=2))
