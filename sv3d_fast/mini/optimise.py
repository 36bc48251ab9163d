"""The optimiser loop that both networks of the embedded model are trained with."""

import copy
import csv
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .parallel import Workers

WARMUP = 200  # steps of linear growth of the learning rate
COOLDOWN = 0.3  # share of the time over which the learning rate falls to zero, as a cosine
CLIP = 1.0  # largest norm of the gradient


class Average:
    """Exponential moving average of a module's parameters; young averages forget faster."""

    def __init__(self, module: torch.nn.Module, decay: float):
        self.module, self.decay, self.updates = copy.deepcopy(module).requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)


def learning_rate(peak: float, step: int, elapsed: float) -> float:
    """Peak with warm-up by steps and cool-down by the share `elapsed` of the time; time is what a lease limits."""
    warm = min(1.0, (step + 1) / WARMUP)
    left = min(1.0, max(0.0, (1 - elapsed) / COOLDOWN))
    return peak * warm * (0.5 - 0.5 * torch.cos(torch.tensor(left * torch.pi)).item())


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
    """Trains for `minutes` of wall clock; returns the number of steps.

    `loss_of(step)` computes the loss of a fresh batch; `between(step)` runs after each step. Appends a row of
    (step, seconds, learning rate, figures) to the CSV `log` every `every` steps.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    fused = workers.device.type == "cuda"
    optimiser = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused)
    began, step, running = time.monotonic(), 0, None
    while True:
        elapsed = (time.monotonic() - began) / (60 * minutes)
        if step % 10 == 0 and workers.agree(elapsed >= 1):
            return step
        rate = learning_rate(peak, step, elapsed if cooldown else 0.0)
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss, figures = loss_of(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        workers.average([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimiser.step()
        average.update(network)
        figures = torch.stack([torch.as_tensor(v, device=loss.device).detach().float() for v in figures.values()])
        running = figures if running is None else running.lerp(figures, 0.05)
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
