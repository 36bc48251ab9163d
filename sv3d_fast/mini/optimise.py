"""The optimiser loop that both networks of the embedded model are trained with."""

import copy
import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import torch

from .parallel import Workers

WARMUP = 200  # steps of linear growth of the learning rate
COOLDOWN = 0.45  # share of the time over which the learning rate falls to zero, as a cosine
CLIP = 1.0  # largest norm of the gradient
HORIZON = 0.1  # of the average of the weights, as a share of the steps so far
AGREE_EVERY = 10  # steps between two looks at the clock, which all processes have to wait for
SMOOTHING = 0.05  # weight of the newest step in the figures of the log


Network = TypeVar("Network", bound=torch.nn.Module)


class Average(Generic[Network]):
    """Moving average of a module's parameters over the last tenth, about, of the steps so far.

    The power-function average of Karras et al. 2024 ("Analyzing and Improving the Training Dynamics of Diffusion
    Models", section 3.1) with exponent gamma = 1 / HORIZON - 1: since the horizon grows with the run, short and long
    runs need no constant of their own. `module` is the averaged copy, without gradients.
    """

    def __init__(self, module: Network):
        self.module, self.updates = copy.deepcopy(module), 0
        self.module.requires_grad_(False)

    @torch.no_grad()
    def update(self, module: Network) -> None:
        """Takes in the parameters as they are after one more step; the first replace what the copy began with."""
        self.updates += 1
        weight = 1 - (1 - 1 / self.updates) ** (1 / HORIZON)
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)


def learning_rate(peak: float, step: int, elapsed: float) -> float:
    """`peak`, warmed up over the first WARMUP steps and cooled down over the last COOLDOWN of the time.

    elapsed: the share of the time that is gone. The time is what a run is given, so it sets the end, not the steps.
    """
    warm = min(1.0, (step + 1) / WARMUP)
    left = min(1.0, max(0.0, (1 - elapsed) / COOLDOWN))
    return peak * warm * (0.5 - 0.5 * math.cos(left * math.pi))


def optimise(
    network: torch.nn.Module,
    average: Average,
    loss_of: Callable[[int], tuple[torch.Tensor, dict[str, float | torch.Tensor]]],
    *,
    workers: Workers,
    minutes: float,
    peak: float,
    log: Path,
    weight_decay: float = 0.01,
    every: int = 50,
    between: Callable[[int], None] = lambda step: None,
    cooldown: bool = True,
) -> int:
    """Trains for `minutes` of wall clock, AGREE_EVERY steps at least; returns the number of steps.

    `loss_of(step)` computes the loss of a fresh batch and figures to show; `between(step)` runs after each step.
    cooldown: False keeps the learning rate up, for training that will go on. Every `every` steps a row of (step,
    seconds, learning rate, smoothed figures) is appended to the CSV `log`. The optimiser's moments start from zero.
    Raises ValueError for minutes that aren't positive.
    """
    if not minutes > 0:
        raise ValueError(f"minutes: expected a positive number, got {minutes}")
    parameters = [p for p in network.parameters() if p.requires_grad]
    fused = workers.device.type == "cuda"
    optimiser = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused)
    began, step, elapsed = time.monotonic(), 0, 0.0
    running: torch.Tensor | None = None
    while True:
        if step > 0 and step % AGREE_EVERY == 0:
            # the first process's clock is everybody's: rates that differ would let the weights drift apart
            elapsed = workers.agree((time.monotonic() - began) / (60 * minutes))
            if elapsed >= 1:
                return step
        rate = learning_rate(peak, step, elapsed if cooldown else 0.0)
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss, figures = loss_of(step)
        loss.backward()
        workers.average([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update(network)
        newest = torch.stack([torch.as_tensor(v, device=loss.device).detach().float() for v in figures.values()])
        running = newest if running is None else running.lerp(newest, SMOOTHING)
        if step % every == 0 and workers.first:
            _append(log, step, time.monotonic() - began, rate, running.tolist())
        between(step)
        step += 1


def _append(log: Path, step: int, seconds: float, rate: float, figures: list[float]) -> None:
    row = [step, round(seconds, 1), f"{rate:.3g}", *(f"{v:.5g}" for v in figures)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", newline="") as file:
        csv.writer(file).writerow(row)
    print(log.stem, *row, flush=True)
