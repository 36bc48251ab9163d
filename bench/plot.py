"""The README's plot of a guided step, from the newest figures: `python -m bench.plot --output docs/step.svg`."""

import argparse
import json
from pathlib import Path
from xml.sax.saxutils import escape

from .results import RESULTS

MACHINE = "nvidia-h100-80gb-hbm3"
STEP = "UNet, one guided step"
PEERS = {
    "diffusers, eager": f"{STEP}, of diffusers eager",
    "diffusers, torch.compile": f"{STEP}, of diffusers compiled",
}
WIDTH, ROW, LABEL, MARGIN = 640, 34, 180, 60  # pixels: of the picture, a bar's row, the names, beyond the longest bar
OURS, THEIRS, INK = "#0a7d5a", "#9aa5b1", "#6b7683"  # readable on light and on dark pages


def newest(machine: str) -> dict[str, dict]:
    """Of each of the engine's figures its newest line."""
    lines = (RESULTS / f"{machine}.jsonl").read_text().splitlines()
    return {line["figure"]: line for line in map(json.loads, lines) if line["issue"] == "engine"}


def milliseconds(lines: dict[str, dict]) -> dict[str, float]:
    """Of a step, by who runs it; a peer's is ours over the ratio that one process measured."""
    ours = lines[STEP]["value"]
    found = {name: ours / lines[ratio]["value"] for name, ratio in PEERS.items() if ratio in lines}
    for name, ratio in PEERS.items():
        if ratio in lines and lines[ratio]["commit"] != lines[STEP]["commit"]:
            raise ValueError(f"{name}: measured at {lines[ratio]['commit']}, our step at {lines[STEP]['commit']}")
    return found | {"sv3d-fast": ours}


def svg(times: dict[str, float], title: str) -> str:
    """Horizontal bars."""
    scale = (WIDTH - LABEL - MARGIN) / max(times.values())
    rows = []
    for row, (name, ms) in enumerate(times.items()):
        y = (row + 1) * ROW
        color = OURS if name == "sv3d-fast" else THEIRS
        rows.append(
            f'<text x="{LABEL - 10}" y="{y + 16}" text-anchor="end" fill="{INK}">{escape(name)}</text>'
            f'<rect x="{LABEL}" y="{y}" width="{ms * scale:.1f}" height="{ROW - 10}" rx="3" fill="{color}"/>'
            f'<text x="{LABEL + ms * scale + 8:.1f}" y="{y + 16}" fill="{INK}">{ms:.0f} ms</text>'
        )
    height = (len(times) + 1) * ROW + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="13" role="img" aria-label="{escape(title)}">'
        f'<text x="0" y="18" fill="{INK}">{escape(title)}</text>{"".join(rows)}</svg>\n'
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    lines = newest(MACHINE)
    title = f"One guided step of SV3D, 21 frames at 576², float16, {lines[STEP]['gpu']}"
    args.output.write_text(svg(milliseconds(lines), title))


if __name__ == "__main__":
    main()
