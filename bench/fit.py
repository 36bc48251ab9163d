"""Orbit frames to splats: quality and time per stage on exact renders of meshes, one JSON line a run.

    python -m bench.fit --size 128 --device cpu

Reports the PSNR of the fitted views and of views between them, the hull's silhouette IoU, the elevation that the
masks give, and how long masks, hull and fit took in this process. Timings compare within one run only.
"""

import argparse
import json
import time

import torch
import trimesh

from sv3d_fast.camera import Orbit
from sv3d_fast.kernels.mesh_raster import mesh_raster
from sv3d_fast.scene.fit import FitConfig, fit, render
from sv3d_fast.scene.hull import azimuth_scores, estimate_elevation, silhouette_iou, visual_hull
from sv3d_fast.scene.masks import foreground
from sv3d_fast.scene.metrics import iou, psnr
from sv3d_fast.video import OrbitVideo

SUPERSAMPLING = 2


def shapes() -> dict[str, trimesh.Trimesh]:
    """Meshes that fit the orbit's view, from easy to hard for silhouettes."""
    knot = trimesh.creation.torus(0.3, 0.1)
    knot.apply_transform(trimesh.transformations.rotation_matrix(1.1, [1, 0.3, 0]))
    capsule = trimesh.creation.capsule(height=0.35, radius=0.14)
    blocks = trimesh.util.concatenate(
        [
            trimesh.creation.box([0.5, 0.3, 0.2]).apply_translation([0, 0, -0.1]),
            trimesh.creation.box([0.15, 0.3, 0.3]).apply_translation([-0.1, 0, 0.1]),
        ]
    )
    return {"capsule": capsule, "torus": knot, "blocks": blocks}


def shaded_orbit(mesh: trimesh.Trimesh, orbit: Orbit, size: int) -> OrbitVideo:
    """Anti-aliased frames of a mesh whose colour varies over the surface, on white."""
    fine = size * SUPERSAMPLING
    vertices = torch.tensor(mesh.vertices, dtype=torch.float32)
    faces = torch.tensor(mesh.faces, dtype=torch.int32)
    ids, _, depth = mesh_raster(vertices, faces, orbit.world_to_camera(), orbit.intrinsics(fine), fine, fine)
    pixel = (torch.arange(fine) + 0.5 - fine / 2) / orbit.focal(fine)
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], -1)
    normals = torch.tensor(mesh.face_normals, dtype=torch.float32)[ids.clamp(min=0).long()]
    pose, hit = orbit.camera_to_world(), depth.isfinite()
    points = rays * depth.nan_to_num(posinf=0)[..., None]
    points = points @ pose[:, None, :3, :3].mT + pose[:, None, None, :3, 3]
    albedo = 0.5 + 0.4 * torch.sin(14 * points + torch.tensor([0.0, 2.0, 4.0]))
    light = torch.nn.functional.normalize(torch.tensor([0.5, -0.3, 0.8]), dim=0)
    color = torch.where(hit[..., None], albedo * (0.7 + 0.3 * (normals @ light)[..., None]), 1.0)

    def shrink(image):
        return torch.nn.functional.avg_pool2d(image.permute(0, 3, 1, 2), SUPERSAMPLING).permute(0, 2, 3, 1)

    frames = (shrink(color).clamp(0, 1) * 255).round().to(torch.uint8)
    return OrbitVideo(frames, orbit, shrink(hit[..., None].float())[..., 0])


def timed(function, device):
    """A function's value and how many seconds it took."""
    start = time.perf_counter()
    value = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return value, round(time.perf_counter() - start, 3)


def measure(mesh: trimesh.Trimesh, size: int, device: torch.device, config: FitConfig) -> dict:
    """The figures of one mesh."""
    orbit = Orbit.static(15)
    truth = shaded_orbit(mesh, orbit, size)
    between = Orbit(orbit.elevations, orbit.azimuths + 180 / len(orbit))
    unseen = shaded_orbit(mesh, between, size)
    video = OrbitVideo(truth.frames.to(device), orbit)
    alpha, masks_s = timed(lambda: foreground(video), device)
    hull, hull_s = timed(lambda: visual_hull(alpha, orbit, 96), device)
    splats, fit_s = timed(lambda: fit(video, config=config), device)
    elevation, _ = estimate_elevation(alpha, Orbit.static(10))
    given, other = azimuth_scores(alpha, orbit)
    with torch.no_grad():
        rgb, fitted_alpha = (image.cpu() for image in render(splats, orbit, size))
        rgb_between = render(splats, between, size)[0].cpu()
    inside = truth.alpha >= 0.5
    colors = truth.colors()
    return {
        "psnr": psnr(rgb.clamp(0, 1), colors),
        "psnr_worst_view": min(psnr(a.clamp(0, 1), b) for a, b in zip(rgb, colors, strict=True)),
        "psnr_foreground": psnr(rgb.clamp(0, 1)[inside], colors[inside]),
        "psnr_between": psnr(rgb_between.clamp(0, 1), unseen.colors()),
        "mask_iou": iou(alpha.cpu(), truth.alpha),
        "splat_iou": iou(fitted_alpha, truth.alpha),
        "hull_iou": float(silhouette_iou(hull, alpha, orbit).mean()),
        "elevation_error": abs(elevation - 15),
        "consistency": given,
        "consistency_reversed": other,
        "splats": len(splats),
        "seconds": {"masks": masks_s, "hull": hull_s, "fit": fit_s},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--shape", choices=list(shapes()), action="append")
    options = parser.parse_args()
    device = torch.device(options.device)
    defaults = FitConfig.of(device, options.size)
    config = FitConfig(
        size=defaults.size,
        count=options.count or defaults.count,
        steps=options.steps or defaults.steps,
        views_per_step=defaults.views_per_step,
    )
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    for name, mesh in shapes().items():
        if options.shape and name not in options.shape:
            continue
        figures = measure(mesh, options.size, device, config)
        setting = {"count": config.count, "steps": config.steps, "views_per_step": config.views_per_step}
        line = {"bench": "fit", "shape": name, "size": options.size, "device": device.type, "gpu": gpu}
        print(json.dumps(line | {"torch": torch.__version__, "dtype": "float32"} | setting | figures), flush=True)


if __name__ == "__main__":
    main()
