"""One step of a fit, in three parts around the rasteriser; on a GPU each part is a CUDA graph.

What the rasteriser takes, what its images are worth and what becomes of the parameters are some four hundred small
tensor operations: launched one by one they take twice as long as they run. The rasteriser itself stays outside the
graphs, since the number of its tiles changes from step to step.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sv3d_fast.camera import Orbit
from sv3d_fast.kernels.splat_raster import splat_raster
from sv3d_fast.kernels.ssim import ssim

from .shape_terms import CHANNELS, bend, shape_channels, third_axes
from .splats import Splats

NEAR, EPS2D = 0.01, 0.3  # the rasteriser's near plane (world units) and screen-space dilation (px^2)


@dataclass(frozen=True)
class Weights:
    """Of the terms of the loss; `FitConfig` tells what they are. views: (T,) of each view."""

    views: Tensor
    dssim: float
    mask: float
    bend: float
    flatness: float
    opacity: float


@functools.cache
def side_stream(device: torch.device, index: int) -> torch.cuda.Stream:
    """Stream number `index` that fits on a GPU run on, made once: cuBLAS keeps 64 MB for every stream it ever saw."""
    return torch.cuda.Stream(device)


class Schedule:
    """What each step shows, and how far the parameters move; the number of the step lives on the device.

    order: (steps, V) views of each step. backgrounds: (steps, V, 3) colours behind them. rates: for each parameter
    its name, its first learning rate and what is left of it at the end; Adam moves them.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        rates: dict[str, tuple[float, float]],
        order: Tensor,
        backgrounds: Tensor,
    ):
        self.order, self.backgrounds = order, backgrounds
        device = order.device
        self.index = torch.zeros((), dtype=torch.long, device=device)
        self.parameters = [parameters[name] for name in rates]
        self._first, self._decay = torch.tensor(list(rates.values()), device=device).unbind(1)
        self._rates = self._first.clone()
        groups = [{"params": [p], "lr": rate} for p, rate in zip(self.parameters, self._rates, strict=True)]
        self._adam = torch.optim.Adam(
            groups, betas=(0.9, 0.99), eps=1e-15, fused=True, capturable=device.type == "cuda"
        )

    def shown(self) -> tuple[Tensor, Tensor]:
        """Views (V,) of this step, and the backgrounds (V, 3) behind them."""
        return self.order.index_select(0, self.index)[0], self.backgrounds.index_select(0, self.index)[0]

    def move(self, gradients: list[Tensor]) -> None:
        """Moves the parameters once, and on to the next step."""
        torch.mul(self._first, self._decay ** (self.index / len(self.order)), out=self._rates)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.contiguous()  # fused Adam takes no other layout than the parameter's
        self._adam.step()
        for parameter in self.parameters:
            parameter.grad = None  # in a graph's memory, which it would keep
        self.index += 1


class Step:
    """Calling it moves splats and gains on by one step of the schedule, at one size of the frames.

    splats: of leaf parameters; gains (T, 3), of each view's colours; frames (T, S, S, 3) on white and masks
    (T, S, S, 1). `loss` and `noise` (mean squared error) are those of the last step.
    """

    def __init__(
        self,
        splats: Splats,
        gains: Tensor,
        schedule: Schedule,
        weights: Weights,
        spacing: float,
        orbit: Orbit,
        frames: Tensor,
        masks: Tensor,
    ):
        self.splats, self.gains, self.schedule, self.weights, self.spacing = splats, gains, schedule, weights, spacing
        self.frames, self.masks, self.orbit, self.size = frames, masks, orbit, frames.shape[1]
        device, views = frames.device, schedule.order.shape[1]
        self.viewmats, self.Ks = orbit.world_to_camera().to(device), orbit.intrinsics(self.size).to(device)
        self.image = torch.zeros(views, self.size, self.size, 3 + CHANNELS, device=device)
        self.alpha = torch.zeros(views, self.size, self.size, 1, device=device)
        self.gradients: list[Tensor] = []
        self._stream = _stream(device)
        self._parts: list[Callable[[], None]] | None = None

    def __call__(self) -> None:
        if self._stream is None:
            self._run([self._activate, self._judge, self._update])
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            if self._parts is None:  # libraries and the optimizer set themselves up outside the graphs
                self._run([self._activate, self._judge, self._update])
                self._parts = []
            else:
                self._parts = self._parts or self._captured()
                self._run(self._parts)
        torch.cuda.current_stream().wait_stream(self._stream)

    def show(self, frames: Tensor, masks: Tensor) -> None:
        """Other frames and masks of the same shapes from the next step on."""
        self.frames.copy_(frames)
        self.masks.copy_(masks)

    def _captured(self) -> list[Callable[[], None]]:
        pool, replays = torch.cuda.graph_pool_handle(), []
        for part in (self._activate, self._judge, self._update):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            part()
            graph.capture_end()
            replays.append(graph.replay)
        return replays

    def _run(self, parts: list[Callable[[], None]]) -> None:
        activate, judge, update = parts
        activate()
        leaves = [t.detach().requires_grad_() for t in self.inputs]
        drawn = splat_raster(
            *leaves, self.viewmats_shown, self.Ks_shown, self.size, self.size, self.behind, NEAR, EPS2D
        )
        self.image.copy_(drawn[0].detach())
        self.alpha.copy_(drawn[1].detach())
        judge()
        gradients = torch.autograd.grad(drawn, leaves, (self.image_gradient, self.alpha_gradient))
        if not self.gradients:
            self.gradients = [torch.empty_like(g) for g in gradients]
        torch._foreach_copy_(self.gradients, list(gradients))
        update()

    def _activate(self) -> None:
        """Parameters to what the rasteriser takes, and the part of the loss that is theirs alone."""
        self.views, backgrounds = self.schedule.shown()
        self.behind = F.pad(backgrounds, (0, CHANNELS))
        self.viewmats_shown, self.Ks_shown = self.viewmats[self.views], self.Ks[self.views]
        splats = self.splats
        shape = shape_channels(splats.means, third_axes(splats.quats), self.viewmats_shown, self.orbit.radius)
        channels = torch.cat([splats.colors.expand(len(shape), -1, -1), shape], -1)
        self.inputs = (splats.means, splats.quats, splats.scales, splats.opacities, channels)
        thin = splats.log_scales[:, 2].exp().mean() / self.spacing
        self.own = self.weights.flatness * thin + self.weights.opacity * splats.opacities.mean()

    def _judge(self) -> None:
        """Images to their loss and its gradients."""
        weights, views = self.weights, self.views
        behind = self.behind[:, None, None, :3]
        image, alpha = self.image.detach().requires_grad_(), self.alpha.detach().requires_grad_()
        target = (self.frames[views] + (1 - self.masks[views]) * (behind - 1)).clamp(0, 1)  # the frames are on white
        own = (self.gains - self.gains.mean(0))[views, None, None]
        rgb = image[..., :3]
        rgb = rgb + own * (rgb - (1 - alpha) * behind)  # the background has no gain
        error = (rgb - target).abs().mean((1, 2, 3))
        structure = 1 - ssim(rgb, target)
        silhouette = (alpha - self.masks[views]).abs().mean((1, 2, 3))
        bent = bend(image[..., 3:], self.orbit.focal(self.size), self.orbit.radius)
        per_view = (1 - weights.dssim) * error + weights.dssim * structure
        per_view = per_view + weights.mask * silhouette + weights.bend * bent
        self.loss = (weights.views[views] * per_view).sum() / weights.views[views].sum()
        self.image_gradient, self.alpha_gradient, self.gains_gradient = torch.autograd.grad(
            self.loss, (image, alpha, self.gains)
        )
        self.loss, self.noise = self.loss.detach(), (rgb.detach() - target).square().mean()

    def _update(self) -> None:
        """Gradients of the rasteriser's inputs to those of the parameters, which move."""
        *parameters, _ = self.schedule.parameters  # the gains come last
        gradients = torch.autograd.grad((*self.inputs, self.own), parameters, (*self.gradients, None))
        self.schedule.move([*gradients, self.gains_gradient])


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """The current stream of a GPU, or another where it is the default one, on which no graph can be captured."""
    if device.type != "cuda":
        return None
    current = torch.cuda.current_stream(device)
    return side_stream(device, 0) if current == torch.cuda.default_stream(device) else current
