"""The embedded model on the held-out models: quality of its orbits against the true renders, and its size.

python -m bench.mini --data build/data/objects.pack [--sheet docs/held_out_orbits.png] [--no-record]
"""

import argparse
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from sv3d_fast.mini.evaluate import Score, contact_sheet, evaluate, means
from sv3d_fast.mini.pack import load_objects
from sv3d_fast.mini.scenes import Stage
from sv3d_fast.model.weights import load_model
from sv3d_fast.pipeline import EMBEDDED_WEIGHTS

from .results import record

ISSUE = "mini"
SHOWN = 4  # models on the sheet: those of lowest crc32, not of best looks
BARS = {"psnr": ("dB", ">= 19.0"), "ssim": ("", ">= 0.86"), "iou": ("", ">= 0.85")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, help="picture of the four models of lowest crc32")
    parser.add_argument("--categories", action="store_true", help="print the means of each category too")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(EMBEDDED_WEIGHTS, device=device)
    objects = sorted(load_objects(args.data, split="held_out"), key=lambda o: (zlib.crc32(o.name.encode()), o.key))
    stage = Stage(objects, model.config.image_size, device)
    scores, rows = [], []
    for score, views, made in evaluate(model, stage, model.config.sampler):
        scores.append(score)
        if len(rows) < SHOWN:
            rows.append((f"{score.name}   {score.psnr:.1f} dB", views.frames[0], made))
    if args.sheet:
        contact_sheet(rows).save(args.sheet)
    figures = means(scores)
    print(f"{len(scores)} objects:", {k: round(v, 3) for k, v in figures.items()})
    if args.categories:
        print_categories(scores)
    size = sum(p.stat().st_size for p in EMBEDDED_WEIGHTS.rglob("*") if p.is_file()) / 1e6
    if not args.no_record:
        for name, (unit, bar) in BARS.items():
            record(ISSUE, f"held-out {name} of frames 0..19", figures[name], unit, bar)
        gain = figures["psnr"] - figures["input_psnr"]
        record(ISSUE, "held-out psnr over showing the input", gain, "dB", ">= 3")
        record(ISSUE, "weights, all parts", size, "MB", "<= 28")


def print_categories(scores: Sequence[Score]) -> None:
    """A line of means for each category."""
    for category in sorted({s.category for s in scores}):
        group = [s for s in scores if s.category == category]
        print(f"{category:<16}{len(group):>3}", {k: round(v, 3) for k, v in means(group).items()})


if __name__ == "__main__":
    main()
