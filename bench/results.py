"""The record of measured bars: one JSON line per figure in results/<machine>.jsonl."""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Name of the results file: the GPU, or the CPU's number of cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{os.cpu_count()}-cores"


def versions() -> dict[str, str]:
    """Of what the figure depends on."""
    import torch

    from sv3d_fast import __version__

    return {"sv3d_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}


def commit() -> str:
    """Short hash of the tree that was measured, "+" after it if files differ; "unknown" outside a checkout."""
    if given := os.environ.get("SV3D_FAST_COMMIT"):  # of a copy without its history
        return given
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def record(issue: str, figure: str, value: float, unit: str, bar: str, command: str | None = None) -> None:
    """Appends a measured figure. `bar` reads like "<= 135"; `command` repeats the measurement."""
    import torch

    line = {
        "issue": issue,
        "figure": figure,
        "value": float(f"{value:.6g}"),
        "unit": unit,
        "bar": bar,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": command or " ".join(["python", *sys.orig_argv[1:]]),
    }
    folder = Path(os.environ.get("SV3D_FAST_RESULTS", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{machine()}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{issue}: {figure} = {value:.4g} {unit} (bar {bar}, {'met' if met(value, bar) else 'MISSED'})", flush=True)


def met(value: float, bar: str) -> bool:
    """Whether a value meets a bar such as "<= 135" or ">= 0.86"."""
    relation, limit = bar.split()
    return value <= float(limit) if relation == "<=" else value >= float(limit)
