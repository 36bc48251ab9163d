"""gsplat as its own examples run it: the peer that `bench.reconstruction` compares with.

Random initialisation inside the cube that the cameras see, spherical harmonics of degree 0, 0.8 L1 + 0.2 D-SSIM,
one view a step, DefaultStrategy and Adam with the rates of gsplat's simple_trainer, 7,000 iterations.
"""

import math

import torch

from sv3d_fast.kernels.ssim import ssim
from sv3d_fast.scene.hull import view_half_extent
from sv3d_fast.scene.splats import SH_C0, Splats
from sv3d_fast.video import OrbitVideo

ITERATIONS = 7000
COUNT = 50_000
DSSIM = 0.2
FINAL = 0.01  # of the means' rate, at the last iteration


def fit_stock(video: OrbitVideo, seed: int = 0) -> Splats:
    """Splats fitted to frames on white by stock gsplat; runs on the frames' device, which must be CUDA."""
    import gsplat

    device, size = video.frames.device, video.size
    colors = video.colors()
    viewmats, Ks = video.orbit.world_to_camera().to(device), video.orbit.intrinsics(size).to(device)
    generator = torch.Generator().manual_seed(seed)
    reach = view_half_extent(video.orbit)
    parameters = _initial(reach, generator, device)
    rates = {"means": 1.6e-4 * reach, "scales": 5e-3, "quats": 1e-3, "opacities": 5e-2, "sh0": 2.5e-3}
    optimizers: dict[str, torch.optim.Optimizer] = {
        k: torch.optim.Adam([{"params": parameters[k], "lr": rate, "name": k}], eps=1e-15) for k, rate in rates.items()
    }
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizers["means"], FINAL ** (1 / ITERATIONS))
    strategy = gsplat.DefaultStrategy()
    strategy.check_sanity(parameters, optimizers)
    state = strategy.initialize_state(scene_scale=reach)
    white = torch.ones(1, 3, device=device)
    order: list[int] = []
    for step in range(ITERATIONS):
        order = order or torch.randperm(len(colors), generator=generator).tolist()
        view = order.pop()
        rgb, _, info = gsplat.rasterization(
            parameters["means"], parameters["quats"], parameters["scales"].exp(), parameters["opacities"].sigmoid(),
            parameters["sh0"], viewmats[view : view + 1], Ks[view : view + 1], size, size, sh_degree=0,
            backgrounds=white, packed=False,
        )  # fmt: skip
        strategy.step_pre_backward(parameters, optimizers, state, step, info)
        target = colors[view : view + 1]
        loss = (1 - DSSIM) * (rgb - target).abs().mean() + DSSIM * (1 - ssim(rgb, target)).mean()
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        schedule.step()
        strategy.step_post_backward(parameters, optimizers, state, step, info, packed=False)
    return Splats(
        parameters["means"].detach(), parameters["quats"].detach(), parameters["scales"].detach(),
        parameters["opacities"].detach(), parameters["sh0"].detach()[:, 0] * SH_C0 + 0.5,
    )  # fmt: skip


def _initial(reach: float, generator: torch.Generator, device: torch.device) -> torch.nn.ParameterDict:
    """Random splats in a cube, as large as their mean spacing, of random colours and opacity 0.1."""
    spacing = 2 * reach / COUNT ** (1 / 3)
    start = {
        "means": reach * (2 * torch.rand(COUNT, 3, generator=generator) - 1),
        "scales": torch.full((COUNT, 3), math.log(spacing)),
        "quats": torch.rand(COUNT, 4, generator=generator),
        "opacities": torch.full((COUNT,), 0.1).logit(),
        "sh0": (torch.rand(COUNT, 1, 3, generator=generator) - 0.5) / SH_C0,
    }
    return torch.nn.ParameterDict({k: torch.nn.Parameter(v.to(device)) for k, v in start.items()})
