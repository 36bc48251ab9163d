"""The embedded model on the held-out models: quality of its orbits against the true renders, and its size.

python -m bench.mini --data build/data/objects.pack [--sheet docs/held_out_orbits.png] [--no-record]
python -m bench.mini --data build/data/objects.pack --scenes 79     splats and meshes of its orbits instead: longer
"""

import argparse
import statistics
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from sv3d_fast.camera import Orbit
from sv3d_fast.mini.config import WEIGHTS as EMBEDDED_WEIGHTS
from sv3d_fast.mini.evaluate import ELEVATION, Score, contact_sheet, evaluate, generate, means, reconstruction_psnr
from sv3d_fast.mini.pack import Object, load_objects
from sv3d_fast.mini.scenes import Stage
from sv3d_fast.model.weights import SV3DModel, load_model
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.scene.metrics import compare, flip
from sv3d_fast.video import OrbitVideo

from .reconstruction import reconstruct, splat_psnr
from .results import record

ISSUE = "mini"
RESOLUTION = 128  # voxels along a side
SHOWN = 4  # models on the sheet: those of lowest crc32, not of best looks
GALLERY = 10  # models on each picture of the gallery; the random ones are those of lowest crc32
BARS = {"psnr": ("dB", ">= 19.0"), "ssim": ("", ">= 0.86"), "iou": ("", ">= 0.85")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, help="picture of the four models of lowest crc32")
    parser.add_argument("--gallery", type=Path, help="folder for pictures of the worst, the best and ten random models")
    parser.add_argument("--categories", action="store_true", help="print the means of each category too")
    parser.add_argument("--scenes", type=int, help="reconstruct the orbits of so many models, in order of crc32")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(EMBEDDED_WEIGHTS, device=device)
    objects = sorted(load_objects(args.data, split="held_out"), key=lambda o: (zlib.crc32(o.name.encode()), o.key))
    if args.scenes:
        judge_scenes(model, objects[: args.scenes], device, complete=args.scenes >= len(objects) and not args.no_record)
        return
    stage = Stage(objects, model.config.image_size, device)
    scores, rows = [], []
    for score, views, made in evaluate(model, stage, model.config.sampler):
        scores.append(score)
        rows.append((f"{score.name}   {score.psnr:.1f} dB", views.frames[0], made))
    if args.sheet:
        contact_sheet(rows[:SHOWN]).save(args.sheet)
    if args.gallery:
        ranked = [row for _, row in sorted(zip(scores, rows, strict=True), key=lambda pair: pair[0].psnr)]
        chosen = {"worst": ranked[:GALLERY], "best": ranked[: -GALLERY - 1 : -1], "random": rows[:GALLERY]}
        for name, shown in chosen.items():
            contact_sheet(shown, every=5).save(args.gallery / f"mini_{name}.jpg", quality=85)
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
        views = stage.standard(range(len(objects)), Orbit.static(ELEVATION))
        record(ISSUE, "VAE, held-out renders", reconstruction_psnr(model.vae, views), "dB", ">= 32")


def judge_scenes(model: SV3DModel, objects: Sequence[Object], device: torch.device, *, complete: bool) -> None:
    """Splats and meshes of generated orbits: how well the views agree, and how near the surface is.

    Prints the means and, where `complete`, records them.
    """
    stage, orbit = Stage(objects, model.config.image_size, device), Orbit.static(ELEVATION)
    rows = []
    for index, item in enumerate(objects):
        truth = stage.standard([index], orbit).frames[0].cpu()
        began = time.perf_counter()
        frames = generate(model, truth[-1:], [orbit], model.config.sampler, 0)[0]
        seconds = time.perf_counter() - began
        made = reconstruct(OrbitVideo(frames, orbit), RESOLUTION, device)
        surface = compare(made.mesh, Mesh(stage.vertices[index], stage.faces[index]), orbit)
        rows.append((splat_psnr(made.splats, OrbitVideo(frames, orbit)), surface["f_score@0.05"], seconds))
        rows[-1] += (float(flip(frames[:-1].float() / 255, truth[:-1].float() / 255).mean()),)
        print(item.name, [round(v, 3) for v in rows[-1]], flush=True)
    splats, surface_score, orbit_s, difference = (statistics.mean(column) for column in zip(*rows, strict=True))
    print(f"{len(rows)} scenes: splats {splats:.2f} dB, F 5 % {surface_score:.3f}, orbit {orbit_s:.2f} s, "
          f"FLIP {difference:.3f}")  # fmt: skip
    if complete:
        record(ISSUE, "splats against the generated frames", splats, "dB", ">= 27")
        record(ISSUE, "mesh of the generated orbit, F-score at 5 %", surface_score, "", ">= 0.75")
        record(ISSUE, "orbit, default steps", orbit_s, "s", "<= 60")


def print_categories(scores: Sequence[Score]) -> None:
    """A line of means for each category."""
    for category in sorted({s.category for s in scores}):
        group = [s for s in scores if s.category == category]
        print(f"{category:<16}{len(group):>3}", {k: round(v, 3) for k, v in means(group).items()})


if __name__ == "__main__":
    main()
