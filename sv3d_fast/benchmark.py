"""How fast a machine is: the embedded model's whole path, timed stage by stage, as a table and a file to compare."""

import datetime
import json
import platform
import statistics
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

from .ceilings import Ceilings, measure
from .devices import pick_device
from .events import Event, Progress, StageFinished
from .files import write_text
from .full_size import measure_orbit, why_not_measured
from .info import chosen_implementations, versions
from .model.config import ModelConfig
from .model.unet import SV3DUNet
from .orbit_stage import TIER, open_model
from .pipeline import running
from .prediction import why_not_fused
from .settings import Settings

SCHEMA = 1
REPEATS = 3  # measured after one for warmth
STAGE = "bench"
ORBIT = ("orbit",)  # stages of an orbit; a mesh takes all of them but the report's
REPORT = "report"
UNITS = {"peak_memory_bytes": 2**30, "copy_bytes_per_second": 1e9, "product_flops_per_second": 1e12}  # of the table


def measuring(device: str = "auto", *, quick: bool = False) -> Generator[Event, None, dict[str, Any]]:
    """Runs the embedded model on a drawn picture, and on a GPU SV3D's network at its real size, and returns the result,
    as docs/bench.md documents it.

    quick: one run in place of three after one for warmth. Yields a Progress per run.
    Raises ValueError for a device that isn't there.
    """
    place = pick_device(device)
    settings = Settings(device=device)
    ceilings = measure(place)
    model = open_model(settings)
    seconds: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    runs, full = 1 if quick else 1 + REPEATS, not why_not_measured(place)
    total = runs + full
    for index in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            photo = Path(folder) / "photo.png"
            draw_subject().save(photo)
            for event in running(photo, Path(folder) / "out", settings, model=model):
                if isinstance(event, StageFinished) and (quick or index > 0):
                    seconds.setdefault(event.stage, []).append(event.seconds)
                    memory[event.stage] = max(memory.get(event.stage, 0), event.peak_memory)
        yield Progress(STAGE, index + 1, total)
    full_size = None
    if full:
        full_size = _at_full_size(place, ceilings)
        yield Progress(STAGE, total, total)
    stages = {
        name: {"seconds": round(statistics.median(values), 3), "peak_memory_bytes": memory[name]}
        for name, values in seconds.items()
    }
    orbit = sum(stages[name]["seconds"] for name in ORBIT)
    flops = step_flops(model.config) * (settings.steps or model.config.sampler.steps)
    mesh = sum(stage["seconds"] for name, stage in stages.items() if name != REPORT)
    return {
        "schema": SCHEMA,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "model": settings.model,
        "tier": TIER,
        "unet": "plain" if why_not_fused(model.unet) else "fused",
        "runs": len(next(iter(seconds.values()))),
        "stages": stages,
        "orbits_per_hour": round(3600 / orbit, 1),
        "meshes_per_hour": round(3600 / mesh, 1),
        "peak_memory_bytes": max(memory.values()),
        "copy_bytes_per_second": round(ceilings.copy),
        "product_flops_per_second": round(ceilings.product),
        "orbit_flops": flops,
        "orbit_share_of_product_rate": round(flops / orbit / ceilings.product, 4),
        "full_size": full_size,
        "implementations": chosen_implementations(place.type),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }


def _at_full_size(device: torch.device, ceilings: Ceilings) -> dict[str, float]:
    """The entry of a result."""
    config = ModelConfig()
    step, decode = measure_orbit(config, device, torch.float16)
    return {
        "step_seconds": round(step, 4),
        "decode_seconds": round(decode, 3),
        "orbits_per_hour": round(3600 / (config.sampler.steps * step + decode), 1),
        "step_share_of_product_rate": round(step_flops(config) / step / ceilings.product, 4),
    }


def draw_subject() -> Image.Image:
    """A picture with a transparent background: the same everywhere, so that results compare."""
    image = Image.new("RGBA", (256, 256))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((60, 40, 196, 150), 24, fill=(52, 96, 168, 255))
    draw.rectangle((72, 150, 88, 220), fill=(120, 80, 48, 255))
    draw.rectangle((168, 150, 184, 220), fill=(120, 80, 48, 255))
    draw.ellipse((104, 70, 152, 118), fill=(240, 200, 64, 255))
    return image


def step_flops(config: ModelConfig) -> int:
    """Operations of the network in one guided step, two for each product and its sum: of its matrix products,
    convolutions and attention, as the plain network computes them."""
    unet, side = config.unet, config.image_size // config.vae.factor
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        latents = torch.empty(2, config.frames, unet.in_channels, side, side)
        context, vector = torch.empty(2, 1, unet.context_dim), torch.empty(2, config.frames, unet.vector_dim)
        SV3DUNet(unet)(latents, 0.0, context, vector)
    return counter.get_total_flops()


def write_result(result: dict[str, Any], path: Path) -> None:
    """A result as JSON; docs/bench.md says what each entry is. Raises OutputError."""
    write_text(path, json.dumps(result, indent=1) + "\n")


def read_result(path: Path) -> dict[str, Any]:
    """A result that `write_result` wrote. Raises ValueError for any other file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a result of `sv3d-fast bench`: {error}") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected a result of `sv3d-fast bench` with schema {SCHEMA}")
    return result


def table(result: dict[str, Any], other: dict[str, Any] | None = None) -> str:
    """The figures in lines; beside another result, both and how many times as much the second is."""
    rows: list[tuple[str, str, tuple[str, ...]]]
    rows = [(f"{name}, seconds", "{:.2f}", ("stages", name, "seconds")) for name in result["stages"]]
    rows += [("orbits an hour", "{:.0f}", ("orbits_per_hour",)), ("meshes an hour", "{:.0f}", ("meshes_per_hour",))]
    rows += [
        ("peak memory, GiB", "{:.2f}", ("peak_memory_bytes",)),
        ("copying, GB/s", "{:.0f}", ("copy_bytes_per_second",)),
        ("products, TFLOPS", "{:.2f}", ("product_flops_per_second",)),
        ("orbit, of that", "{:.1%}", ("orbit_share_of_product_rate",)),
        ("SV3D, a step, s", "{:.3f}", ("full_size", "step_seconds")),
        ("SV3D, decoding, s", "{:.2f}", ("full_size", "decode_seconds")),
        ("SV3D, orbits/hour", "{:.0f}", ("full_size", "orbits_per_hour")),
        ("SV3D, of products", "{:.1%}", ("full_size", "step_share_of_product_rate")),
    ]
    results = [result] if other is None else [result, other]
    head = [f"{r['device']}, {r['threads']} threads, UNet {r['unet']}, {r['tier']}, {r['date']}" for r in results]
    lines = [f"{'AB'[i]}: {text}" for i, text in enumerate(head)] if other else head
    for label, form, keys in rows:
        values = [_value(r, keys) for r in results]
        cells = ["-" if v is None else form.format(v) for v in values]
        ratio = f"{values[1] / values[0]:>9.2f}x" if other and None not in values and values[0] else ""
        lines.append(f"{label:<20}" + "".join(f"{cell:>12}" for cell in cells) + ratio)
    return "\n".join(lines)


def _value(result: dict[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = result
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value / UNITS.get(keys[-1], 1) if value is not None else None
