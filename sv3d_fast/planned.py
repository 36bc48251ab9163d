"""An orbit made by the plan that its budget allows, and once more by a smaller one if memory runs out on the way."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from .camera import Orbit
from .events import Event, Warned
from .generation import STAGE, generating
from .memory import Plan, Shape, next_smaller, plan
from .model.config import SamplerConfig
from .model.weights import SV3DModel
from .placement import leave, place
from .sizes import parse_size


def budget_of(max_memory: str | None, device: torch.device) -> int | None:
    """Bytes of the setting. Raises ValueError for one that can't be read, and on a CPU, whose memory isn't planned."""
    if max_memory is None:
        return None
    if device.type == "cpu":
        raise ValueError(f"max_memory: expected a run on a GPU, whose memory it limits, got {max_memory} on a CPU")
    return parse_size("max_memory", max_memory)


def shape_of(model: SV3DModel, config: SamplerConfig, side: int, frames: int, batch: int = 1) -> Shape:
    """What orbits of `frames` frames of side² pixels by a model depend on."""
    guided = config.max_guidance > 1 or config.min_guidance != 1
    kinds = (next(n.parameters()).dtype for n in (model.unet, model.vae, model.image_encoder))
    return Shape(side, frames, batch, config.steps, 2 if guided else 1, *kinds)


def check_budget(model: SV3DModel, budget: int, side: int | None, frames: int, chunk: int) -> None:
    """Raises BudgetError where orbits of such frames (None for the model's own side) can't be made within a budget."""
    plan(model.config, shape_of(model, model.config.sampler, side or model.config.image_size, frames), budget, chunk)


def planned(
    model: SV3DModel,
    images: torch.Tensor,
    orbits: Sequence[Orbit],
    config: SamplerConfig,
    seeds: Sequence[int],
    *,
    device: torch.device,
    budget: int | None,
    chunk: int,
    note: Callable[..., None],
    **further: Any,
) -> Generator[Event, None, torch.Tensor]:
    """`generation.generating` within `budget` bytes of the device; without one, with the networks where they are.

    further: whatever else `generating` takes. note(plan=...): told which plan runs. Where the device runs out of memory
    the orbit is made anew, once, by the fastest plan that is smaller and fits what is free; a warning says so. Raises
    BudgetError for a budget that no plan fits, torch.OutOfMemoryError where no smaller plan is left, and what
    `generating` raises.
    """
    shape = shape_of(model, config, images.shape[-1], len(orbits[0]), len(images))
    chosen: Plan | None = None
    if budget is not None:
        chosen = plan(model.config, shape, budget, chunk)
        place(model, chosen, device)
        note(plan={"budget_bytes": budget, **chosen.to_dict()})
    try:
        return (yield from generating(model, images, orbits, config, seeds, chunk=chunk, plan=chosen, **further))
    except torch.OutOfMemoryError as error:
        failure = error.with_traceback(None)  # whose frames would hold what they allocated
    leave(model)
    before = chosen or plan(model.config, shape, None, chunk)
    smaller = next_smaller(model.config, shape, before, available(device))
    if smaller is None:
        raise failure
    yield Warned(STAGE, f"out of memory ({before.name}); made again with less ({smaller.name})")
    place(model, smaller, device)
    note(plan={"budget_bytes": budget, **smaller.to_dict(), "after_out_of_memory": before.name})
    return (yield from generating(model, images, orbits, config, seeds, chunk=chunk, plan=smaller, **further))


def available(device: torch.device) -> int:
    """Bytes that this process can take of a GPU now; of a CPU, any number."""
    if device.type == "cpu":
        return 2**62
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)
