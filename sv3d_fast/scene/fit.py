"""Fits Gaussian splats to an orbit: from the surface of its visual hull, a fixed number, no densification.

The image loss is that of Kerbl et al., "3D Gaussian Splatting for Real-Time Radiance Field Rendering", 2023
(0.8 L1 + 0.2 D-SSIM), without view dependence: light is static in an orbit. Random backgrounds and a loss on alpha
keep empty space empty; splats start flat on the hull and are kept flat, which ties them to a surface.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree

from sv3d_fast import events
from sv3d_fast.camera import Orbit
from sv3d_fast.devices import give_back
from sv3d_fast.kernels.splat_raster import splat_raster
from sv3d_fast.video import MIN_FRAMES, OrbitVideo

from .align import displacements, moved
from .fit_step import EPS2D, NEAR, Schedule, Step, Weights
from .hull import Hull, azimuth_scores, surface_points, visual_hull
from .masks import doubts, showing
from .splats import Splats

STAGE = "fit"
INVISIBLE = 1 / 255  # splats below this opacity draw nothing: the rasteriser skips them
REVERSED = 0.02  # how much more consistent the opposite orbit must be to warn about it


@dataclass(frozen=True)
class FitConfig:
    """How splats are fitted; the defaults are those of a GPU, `FitConfig.of` gives those of a device.

    Learning rates are Adam's at the first step; lr_means is in units of the splats' mean spacing. Each falls
    exponentially to `decay` of itself (the means' to decay^2) over the steps.
    """

    size: int = 576  # pixels: larger frames are averaged down to this
    count: int = 50_000
    steps: int = 400
    views_per_step: int = 4
    lr_means: float = 2.0
    lr_quats: float = 2e-2
    lr_scales: float = 2e-2
    lr_opacities: float = 1e-1
    lr_colors: float = 1e-2
    lr_gains: float = 2e-3  # of each view's own gain in each channel, which takes up changes of exposure
    decay: float = 0.1
    coarse: float = 0.5  # part of the steps that see the frames at half their size
    alignments: int = 7  # how often, evenly spread, the frames are moved to where they agree
    dssim: float = 0.2  # weight of D-SSIM; L1 has the rest
    mask: float = 0.5  # weight of the L1 loss on alpha
    flatness: float = 0.1  # weight of the smallest axis over the spacing
    bend: float = 0.05  # weight of how splats bend away from the depth map they make
    opacity: float = 1e-4  # weight of the mean opacity
    back_view: float = 0.5  # weight of the view opposite the input, whose own is 1
    initial_opacity: float = 0.8
    initial_flatness: float = 0.2  # the smallest axis over the other two, at the start

    def __post_init__(self):
        for name in ("size", "count", "steps", "views_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least one, got {getattr(self, name)}")
        if self.alignments < 0:
            raise ValueError(f"alignments: expected none or more, got {self.alignments}")

    @classmethod
    def of(cls, device: torch.device, size: int) -> "FitConfig":
        """What suits a device and frames of `size` pixels: on a CPU smaller, one view a step, within a minute."""
        if device.type != "cpu":
            return cls(size=size)
        size = min(size, 256)
        return cls(size=size, count=min(max(size * size // 4, 500), 8000), steps=800, views_per_step=1, lr_means=0.6)


def fitting(
    video: OrbitVideo,
    *,
    count: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    config: FitConfig | None = None,
) -> Generator[events.Event, None, Splats]:
    """Fits `count` splats in `steps` steps: yields Progress per step (loss, psnr in dB) and Warned, returns Splats.

    device: the frames' if None. config: FitConfig.of(device, size) if None. count, steps: the configuration's if
    None. Splats that ended invisible are left out of the result. On a CPU the result depends on the inputs and the
    seed alone; no global random state is used. Frames whose mask is empty are left out, with a warning.
    Raises ValueError for fewer than MIN_FRAMES frames, a count or steps below 1, masks that are empty or agree on
    no volume.
    """
    if len(video.orbit) < MIN_FRAMES:
        raise ValueError(f"video: expected at least {MIN_FRAMES} frames to fit splats to, got {len(video.orbit)}")
    device = torch.device(device) if device is not None else video.frames.device
    config = config or FitConfig.of(device, video.size)
    config = replace(
        config,
        count=config.count if count is None else count,
        steps=config.steps if steps is None else steps,
        size=min(config.size, video.size),
    )
    size, steps = config.size, config.steps
    generator = torch.Generator().manual_seed(seed)

    video, omissions = showing(video)
    assert video.alpha is not None
    alpha = video.alpha.to(device)
    for doubt in omissions + doubts(alpha):
        yield events.Warned(STAGE, doubt)
    given, other = azimuth_scores(alpha, video.orbit)
    if other > given + REVERSED:
        yield events.Warned(
            STAGE, f"masks agree better ({other:.2f}, not {given:.2f}) if the orbit turns the other way"
        )
    hull = visual_hull(alpha, video.orbit, tolerance=len(video.orbit) // 12, dilation=0)
    images, alpha = _resized(video.colors().to(device), size), _resized(alpha[..., None], size)
    splats, spacing = initial_splats(hull, images, alpha[..., 0], video.orbit, generator, config)
    parameters = {name: value.contiguous().requires_grad_() for name, value in vars(splats).items()}
    splats = Splats(**parameters)
    gains = torch.zeros(len(video.orbit), 3, device=device, requires_grad=True)
    order = _order(steps, min(config.views_per_step, len(video.orbit)), len(video.orbit), generator)
    backgrounds = torch.rand(*order.shape, 3, generator=generator)
    schedule = Schedule(
        parameters | {"gains": gains}, _rates(spacing, config), order.to(device), backgrounds.to(device)
    )
    weights = Weights(
        _view_weights(video.orbit, config.back_view).to(device),
        *(config.dssim, config.mask, config.bend, config.flatness, config.opacity),
    )
    small = round(config.coarse * steps)
    turns = {round(turn * steps / (config.alignments + 1)) for turn in range(1, config.alignments + 1)}
    figures: dict[str, float] = {}
    straight = images, alpha
    for side, begin, end in ((max(size // 2, 1), 0, small), (size, small, steps)):
        shown = (_resized(i, side).clone() for i in straight)  # the step's own, which `show` writes to
        step = Step(splats, gains, schedule, weights, spacing, video.orbit, *shown)
        for done in range(begin + 1, end + 1):
            step()
            if done in turns and done < steps:
                straight = moved(images, alpha, displacements(images, alpha, splats, video.orbit, side))
                step.show(*(_resized(i, side) for i in straight))
            if done % 10 == 1 or done == steps:  # reading a figure waits for a GPU
                figures = {"loss": float(step.loss), "psnr": -10 * math.log10(max(float(step.noise), 1e-12))}
            yield events.Progress(STAGE, done, steps, dict(figures))
    del step
    give_back()  # what graphs held is of use to no other, and other processes work on this GPU
    return _visible(splats)


def fit(video: OrbitVideo, **options) -> Splats:
    """Splats fitted to a video: `fitting` without its events; the same options and errors."""
    return events.finish(fitting(video, **options))


def render(
    splats: Splats, orbit: Orbit, size: int, background: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The T views of an orbit: rgb (T, size, size, 3), unclamped, and alpha (T, size, size), on the splats' device.

    background: a grey level, an RGB colour (3,) or one for each view (T, 3). Differentiable in the splats.
    """
    device, views = splats.means.device, len(orbit)
    backgrounds = torch.as_tensor(background, dtype=torch.float32, device=device).expand(views, 3).contiguous()
    rgb, alpha = splat_raster(
        splats.means, splats.quats, splats.scales, splats.opacities, splats.colors,
        orbit.world_to_camera().to(device), orbit.intrinsics(size).to(device), size, size, backgrounds, NEAR, EPS2D,
    )  # fmt: skip
    return rgb, alpha[..., 0]


def initial_splats(
    hull: Hull,
    images: torch.Tensor,
    alpha: torch.Tensor,
    orbit: Orbit,
    generator: torch.Generator,
    config: FitConfig,
) -> tuple[Splats, float]:
    """Flat splats on a hull's surface, coloured by the views that face them best, and their mean spacing.

    images (T, S, S, 3) on white and alpha (T, S, S): the orbit's frames; the spacing is in world units.
    """
    count = config.count
    points, normals = surface_points(hull, count, generator)
    if count > 1:  # what one splat has to cover: the distance to its neighbours, three of them on average
        cloud = points.double().cpu().numpy()
        distances, _ = cKDTree(cloud).query(cloud, k=min(4, count), workers=-1)
        gaps = torch.from_numpy(distances[:, 1:]).float().mean(-1)
    else:
        gaps = torch.full((1,), hull.voxel)
    gaps = gaps.to(points.device).clamp(min=hull.voxel / 20)
    scales = gaps[:, None] * torch.tensor([1.0, 1.0, config.initial_flatness], device=points.device)
    splats = Splats(
        means=points,
        quats=_facing(normals),
        log_scales=scales.log(),
        logit_opacities=torch.full_like(gaps, config.initial_opacity).logit(),
        colors=_best_facing_colors(points, normals, images, alpha, orbit),
    )
    return splats, float(gaps.mean())


def _facing(normals: torch.Tensor) -> torch.Tensor:
    """(N, 4) quaternions, w first, of rotations that take the z axis to unit normals (N, 3)."""
    x, y, z = normals.unbind(-1)
    quats = torch.stack([1 + z, -y, x, torch.zeros_like(z)], -1)
    upside_down = torch.tensor([0.0, 1.0, 0.0, 0.0], device=normals.device)
    return F.normalize(torch.where((z < -0.9999)[:, None], upside_down, quats), dim=-1)


def _best_facing_colors(points, normals, images, alpha, orbit) -> torch.Tensor:
    """(N, 3) the colour of points (N, 3) in the view that faces each best among those whose mask holds it."""
    size = images.shape[1]
    picture = torch.cat([images, alpha[..., None]], -1).permute(0, 3, 1, 2)
    best = torch.full_like(points[:, 0], -torch.inf)
    colors = torch.full_like(points, 0.5)
    pose, views = orbit.camera_to_world().to(points.device), orbit.world_to_camera().to(points.device)
    for view in range(len(orbit)):
        position = points @ views[view, :3, :3].T + views[view, :3, 3]
        grid = position[:, :2] / position[:, 2:] * (2 * orbit.focal(size) / size)
        sample = F.grid_sample(picture[view : view + 1], grid[None, None], align_corners=False)[0, :, 0].T
        facing = (F.normalize(pose[view, :3, 3] - points, dim=-1) * normals).sum(-1)
        score = facing + sample[:, 3]
        better = score > best
        best = torch.where(better, score, best)
        colors = torch.where(better[:, None], sample[:, :3], colors)
    return colors


def _rates(spacing: float, config: FitConfig) -> dict[str, tuple[float, float]]:
    """Of each parameter, in the order that the gains come last: the first learning rate, and what is left of it."""
    return {
        "means": (config.lr_means * spacing, config.decay**2),
        "quats": (config.lr_quats, config.decay),
        "log_scales": (config.lr_scales, config.decay),
        "logit_opacities": (config.lr_opacities, config.decay),
        "colors": (config.lr_colors, config.decay),
        "gains": (config.lr_gains, config.decay),
    }


def _order(steps: int, at_once: int, views: int, generator: torch.Generator) -> torch.Tensor:
    """(steps, at_once) which views each step shows: all of them once, in random order, before any comes again."""
    rounds = -(-steps // (views // at_once))
    turns = [torch.randperm(views, generator=generator)[: views // at_once * at_once] for _ in range(rounds)]
    return torch.cat(turns).view(-1, at_once)[:steps]


def _view_weights(orbit: Orbit, back_view: float) -> torch.Tensor:
    """(T,) 1 at the input view (the last), falling with the cosine to back_view opposite it."""
    angle = torch.deg2rad(orbit.azimuths - orbit.azimuths[-1])
    return back_view + (1 - back_view) * (1 + angle.cos()) / 2


def _resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """(T, size, size, D) images (T, S, S, D), averaged down."""
    if images.shape[1] == size:
        return images
    return F.interpolate(images.permute(0, 3, 1, 2), (size, size), mode="area").permute(0, 2, 3, 1).contiguous()


def _visible(splats: Splats) -> Splats:
    splats = splats.detach()
    keep = splats.opacities >= INVISIBLE
    return Splats(*(value[keep] for value in vars(splats).values()))
