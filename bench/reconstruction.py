"""Orbit to mesh on true renders of 14 small CC0 models: geometry, novel views, time and memory, against the bars.

    python -m bench.reconstruction --pack build/data/reconstruction.pack          once, with a network: the models
    python -m bench.reconstruction --size 256 --models crate,chair2               a look
    python -m bench.reconstruction --device cuda --size 576 --record              the bars
    python -m bench.reconstruction --device cuda --size 576 --spoilt --stock --models crate,couch2 --record

A sine orbit of 21 views with exact cameras and masks goes through what `sv3d-fast reconstruct` runs. Both surfaces
are compared where those 21 views see them. --spoilt does the same with frames that disagree (colour gains, smooth
warps, blurred back views) or went through H.264; --stock fits stock gsplat to the same frames.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from sv3d_fast.camera import Orbit
from sv3d_fast.kernels.marching_cubes import marching_cubes
from sv3d_fast.kernels.mesh_raster import mesh_render
from sv3d_fast.scene.align import straightened
from sv3d_fast.scene.export import save_mesh
from sv3d_fast.scene.fit import fit, render
from sv3d_fast.scene.hull import visual_hull
from sv3d_fast.scene.masks import foreground
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.scene.metrics import compare, psnr
from sv3d_fast.scene.splats import Splats
from sv3d_fast.scene.surface import extract, is_closed
from sv3d_fast.scene.texture import bake
from sv3d_fast.stages import PeakMemory
from sv3d_fast.video import OrbitVideo

from .ground_truth import MODELS, Truth, blurred, compressed, jittered, novel_views, read_models, warped, write_models
from .results import record

ISSUE = "reconstruction"
PACK = Path("build/data/reconstruction.pack")
ORBIT = Orbit.sine(10.0, 30.0)
HULL_VOXELS = 160  # of the hull that the mesh must beat
SHOWN = (1, 9, 15)  # of the novel views, in pictures
SAMPLES = 200_000  # points on each surface
TEXTURE = 1024
SPOILT: dict[str, tuple[str, Callable[[OrbitVideo], OrbitVideo], str]] = {  # and how many dB they may cost
    "gain": ("colour gain 0.9..1.1 per view", jittered, "<= 3"),
    "warp": ("warp of 2 px", warped, "<= 3"),
    "blur": ("blurred back views", blurred, "<= 3"),
    "h264": ("H.264 crf 23", compressed, "<= 1.5"),
}


@dataclass(frozen=True)
class Reconstruction:
    """What came of one orbit. seconds: by stage. memory: peak bytes on a GPU, of the process elsewhere."""

    splats: Splats
    mesh: Mesh
    seconds: dict[str, float]
    memory: int


def reconstruct(video: OrbitVideo, resolution: int, device: torch.device) -> Reconstruction:
    """Frames to splats, mesh, texture and a GLB, as the pipeline does it."""
    peak, seconds = PeakMemory(device), {}

    def timed(stage, call):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        value = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[stage] = time.perf_counter() - start
        return value

    masked = timed("masks", lambda: replace(video, alpha=foreground(video)))
    splats = timed("fit", lambda: fit(masked, device=device))
    straight = timed("align", lambda: straightened(masked, splats))
    hull = timed("hull", lambda: visual_hull(foreground(straight), video.orbit))
    surface = timed("surface", lambda: extract(splats, straight, hull, resolution=resolution))
    mesh = timed("texture", lambda: bake(surface, straight, resolution=TEXTURE))
    with tempfile.TemporaryDirectory() as folder:
        timed("glb", lambda: save_mesh(mesh, Path(folder) / "mesh.glb"))
    return Reconstruction(splats, mesh, seconds, peak.read())


def hull_mesh(video: OrbitVideo) -> Mesh:
    """The surface of the plain visual hull, all views believed."""
    hull = visual_hull(foreground(video), video.orbit, HULL_VOXELS, tolerance=0, dilation=0)
    vertices, faces = marching_cubes(-hull.field)
    return Mesh((vertices + 0.5) * hull.voxel - hull.half_extent, faces)


@torch.no_grad()
def splat_psnr(splats: Splats, truth: OrbitVideo) -> float:
    """Mean over views, dB."""
    rgb, _ = render(splats, truth.orbit, truth.size)
    return _mean_psnr(rgb.clamp(0, 1), truth)


def unlit(mesh: Mesh, orbit: Orbit, size: int) -> torch.Tensor:
    """(T, size, size, 3) uint8: the texture as it is, without light, on white."""
    device = mesh.vertices.device
    cameras = orbit.world_to_camera().to(device), orbit.intrinsics(size).to(device)
    rgb, _ = mesh_render(
        mesh.vertices, mesh.faces, mesh.uvs, mesh.texture, None, *cameras, size, torch.zeros((0, 4), device=device),
        1.0, (1.0, 1.0, 1.0), 3,
    )  # fmt: skip
    return rgb


def mesh_psnr(mesh: Mesh, truth: OrbitVideo) -> float:
    """Mean over views, dB, of the texture as it is, without light."""
    return _mean_psnr(unlit(mesh, truth.orbit, truth.size).float() / 255, truth)


def picture(models: Sequence[Truth], size: int, resolution: int) -> Image.Image:
    """A row per model at views that were not given: the truth on the left, its reconstruction on the right."""
    unseen = novel_views(ORBIT)
    sheet = Image.new("RGB", (2 * len(SHOWN) * size, len(models) * size), "white")
    for y, truth in enumerate(models):
        made = reconstruct(truth.orbit(ORBIT, size), resolution, truth.mesh.vertices.device)
        sides = truth.orbit(unseen, size).frames, unlit(made.mesh, unseen, size)
        for x, frame in enumerate([side[view] for side in sides for view in SHOWN]):
            sheet.paste(Image.fromarray(frame.cpu().numpy()), (x * size, y * size))
    return sheet


def _mean_psnr(images: torch.Tensor, truth: OrbitVideo) -> float:
    return statistics.mean(psnr(a, b) for a, b in zip(images.cpu(), truth.colors().cpu(), strict=True))


def measure(truth: Truth, size: int, resolution: int) -> dict[str, float]:
    """The figures of one model."""
    video, unseen = truth.orbit(ORBIT, size), truth.orbit(novel_views(ORBIT), size)
    made = reconstruct(video, resolution, video.frames.device)
    figures = compare(made.mesh, truth.mesh, ORBIT, SAMPLES)
    hull = compare(hull_mesh(video), truth.mesh, ORBIT, SAMPLES)
    figures |= {"hull_f_score@0.01": hull["f_score@0.01"], "hull_chamfer": hull["chamfer"]}
    figures |= {"splat_psnr": splat_psnr(made.splats, unseen), "mesh_psnr": mesh_psnr(made.mesh, unseen)}
    figures |= {"splat_fitted_psnr": splat_psnr(made.splats, video), "mesh_fitted_psnr": mesh_psnr(made.mesh, video)}
    figures |= {"closed": is_closed(made.mesh), "faces": len(made.mesh.faces), "splats": len(made.splats)}
    figures |= {"seconds": sum(made.seconds.values()), "memory_gb": made.memory / 1e9}
    return figures | {f"{stage}_s": seconds for stage, seconds in made.seconds.items()}


def measure_spoilt(
    truth: Truth, size: int, resolution: int, clean: dict[str, float], ways: Sequence[str]
) -> dict[str, tuple[float, bool]]:
    """By way of spoiling the frames: the dB that splats and mesh lose at novel views at most, and whether closed."""
    video, unseen = truth.orbit(ORBIT, size), truth.orbit(novel_views(ORBIT), size)
    losses = {}
    for way in ways:
        name, spoil, _ = SPOILT[way]
        made = reconstruct(spoil(video), resolution, video.frames.device)
        splat_loss = clean["splat_psnr"] - splat_psnr(made.splats, unseen)
        mesh_loss = clean["mesh_psnr"] - mesh_psnr(made.mesh, unseen)
        closed = is_closed(made.mesh)
        print(f"  {truth.name:22}{name:32} splats lose {splat_loss:5.2f} dB, mesh {mesh_loss:5.2f} dB, closed {closed}")
        losses[way] = max(splat_loss, mesh_loss), closed
    return losses


def measure_stock(truth: Truth, size: int, ours: dict[str, float]) -> tuple[float, float]:
    """(dB by which our splats are better at novel views, our fit's time over stock gsplat's)."""
    from .stock_gsplat import fit_stock

    video, unseen = truth.orbit(ORBIT, size), truth.orbit(novel_views(ORBIT), size)
    torch.cuda.synchronize()
    start = time.perf_counter()
    splats = fit_stock(video)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    theirs = splat_psnr(splats, unseen)
    print(
        f"  {truth.name:22}stock gsplat {theirs:.2f} dB (fitted {splat_psnr(splats, video):.2f}) in {seconds:.1f} s, "
        f"{len(splats)} splats; "
        f"ours {ours['splat_psnr']:.2f} dB in {ours['fit_s']:.2f} s",
        flush=True,
    )
    return ours["splat_psnr"] - theirs, ours["fit_s"] / seconds


def warm_up(device: torch.device, size: int, resolution: int) -> None:
    """Compiles and loads what the first reconstruction on a GPU would wait for."""
    if device.type == "cuda":
        from .fit import shaded_orbit, shapes

        video = shaded_orbit(shapes()["torus"], ORBIT, size)
        reconstruct(OrbitVideo(video.frames.to(device), ORBIT), resolution, device)


COLUMNS = {  # of the table: figure and how it is written
    "F 1%": ("f_score@0.01", ".3f"), "hull": ("hull_f_score@0.01", ".3f"), "F 2%": ("f_score@0.02", ".3f"),
    "F 5%": ("f_score@0.05", ".3f"), "Chamfer": ("chamfer", ".4f"), "hull C": ("hull_chamfer", ".4f"),
    "normals": ("normal_consistency", ".3f"), "splats dB": ("splat_psnr", ".2f"),
    "(fitted)": ("splat_fitted_psnr", ".2f"),
    "mesh dB": ("mesh_psnr", ".2f"), "(frames)": ("mesh_fitted_psnr", ".2f"), "faces": ("faces", ".0f"),
    "closed": ("closed", ".2f"), "fit s": ("fit_s", ".2f"), "align s": ("align_s", ".2f"),
    "hull s": ("hull_s", ".2f"), "surf s": ("surface_s", ".2f"),
    "tex s": ("texture_s", ".2f"), "glb s": ("glb_s", ".2f"), "sum s": ("seconds", ".2f"), "GB": ("memory_gb", ".2f"),
}  # fmt: skip


def print_row(name: str, figures: dict[str, float]) -> None:
    """A line of the table."""
    cells = (f"{format(figures[key], spec):>{max(len(title), 6) + 2}}" for title, (key, spec) in COLUMNS.items())
    print(f"{name:20}" + "".join(cells), flush=True)


def record_bars(rows: Sequence[dict[str, float]], size: int, cuda: bool) -> None:
    """The bars that this run measured."""

    def mean(figure: str) -> float:
        return statistics.mean(row[figure] for row in rows)

    beaten = sum(row["f_score@0.01"] > row["hull_f_score@0.01"] for row in rows)
    record(ISSUE, f"F-score at 1 %, {size}²", mean("f_score@0.01"), "", ">= 0.86")
    record(ISSUE, f"models above their hull, {size}²", beaten, f"of {len(rows)}", ">= 12")
    record(ISSUE, f"Chamfer / diagonal, {size}²", mean("chamfer"), "", "<= 0.0065")
    record(ISSUE, f"splats at novel views, {size}²", mean("splat_psnr"), "dB", ">= 31")
    record(ISSUE, f"textured mesh at novel views, {size}²", mean("mesh_psnr"), "dB", ">= 26")
    closed = sum(row["closed"] for row in rows)
    record(ISSUE, f"watertight and consistently wound, {size}²", closed, f"of {len(rows)}", f">= {len(MODELS)}")
    seconds = statistics.median(row["seconds"] for row in rows)
    record(ISSUE, f"frames -> GLB, {size}²", seconds, "s", "<= 4" if cuda else "<= 90")
    if cuda:
        record(ISSUE, "peak GPU memory", max(row["memory_gb"] for row in rows), "GB", "<= 3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, help="only write the models to this file")
    parser.add_argument("--cache", type=Path, default=Path("build/data/cache"), help="where downloads are kept")
    parser.add_argument("--data", type=Path, default=PACK, help="what --pack wrote")
    parser.add_argument("--size", type=int, default=256, help="pixels of a frame")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resolution", type=int, help="voxels of the surface; 256 on a GPU, else 128")
    parser.add_argument("--models", help=f"names, by commas; all of {','.join(MODELS)} if not given")
    parser.add_argument(
        "--spoilt",
        nargs="*",
        choices=SPOILT,
        help="also frames that disagree or are compressed; all ways if none is named",
    )
    parser.add_argument("--stock", action="store_true", help="also stock gsplat (CUDA)")
    parser.add_argument("--picture", type=Path, help="only draw truth and reconstruction of the models")
    parser.add_argument("--record", action="store_true", help="write the bars to results")
    args = parser.parse_args()
    if args.pack:
        write_models(args.pack, args.cache)
        print(f"{args.pack}: {len(MODELS)} models, {args.pack.stat().st_size / 1e6:.1f} MB")
        return
    device = torch.device(args.device)
    resolution = args.resolution or (256 if device.type == "cuda" else 128)
    models = read_models(args.data, args.models.split(",") if args.models else MODELS, device)
    if args.picture:
        picture(models, args.size, resolution).save(args.picture)
        return
    warm_up(device, args.size, resolution)
    print(f"{'':20}" + "".join(f"{title:>{max(len(title), 6) + 2}}" for title in COLUMNS))
    rows = []
    for truth in models:
        rows.append(measure(truth, args.size, resolution))
        print_row(truth.name, rows[-1])
    print_row("mean", {key: statistics.mean(row[key] for row in rows) for key, _ in COLUMNS.values()})
    if args.record and len(models) == len(MODELS):
        record_bars(rows, args.size, device.type == "cuda")
    if args.spoilt is not None:
        ways = args.spoilt or list(SPOILT)
        losses = [measure_spoilt(t, args.size, resolution, row, ways) for t, row in zip(models, rows, strict=True)]
        for way in ways:
            name, _, bar = SPOILT[way]
            mean, closed = (statistics.mean(loss[way][i] for loss in losses) for i in (0, 1))
            print(f"{name}: {mean:.2f} dB lost, {closed:.0%} closed")
            if args.record:
                record(ISSUE, f"dB lost at novel views: {name}", mean, "dB", bar)
    if args.stock:
        gains = [measure_stock(t, args.size, row) for t, row in zip(models, rows, strict=True)]
        gain, share = (statistics.mean(g[i] for g in gains) for i in (0, 1))
        print(f"against stock gsplat: {gain:+.2f} dB in {share:.3f} of its time")
        if args.record:
            record(ISSUE, "splats at novel views over stock gsplat", gain, "dB", ">= 0")
            record(ISSUE, "fit's time over stock gsplat's", share, "", "<= 0.1")


if __name__ == "__main__":
    main()
