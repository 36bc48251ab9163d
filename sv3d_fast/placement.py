"""Where a model's networks rest while a plan is in force, and how they come to the GPU for their stage."""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .devices import give_back
from .memory import DECODING, DENOISING, RESIDENT, STREAMED, Plan
from .model.fused_unet import FusedUNet
from .model.unet import SV3DUNet
from .model.weights import SV3DModel
from .offload import packed, tensors_of
from .prediction import adopt, forget_graphs, release, reserve
from .streaming import WeightStream, streamable

E = TypeVar("E")
T = TypeVar("T")


@dataclass(frozen=True)
class _Place:
    placement: str
    device: torch.device
    network: FusedUNet
    stack: ExitStack


_places: WeakKeyDictionary[SV3DUNet, _Place] = WeakKeyDictionary()


def place(model: SV3DModel, plan: Plan, device: torch.device) -> None:
    """Brings the networks where the plan has them rest, the UNet fused; nothing moves if that is done already.

    The UNet's own weights stay in main memory, or go there: it is fused there, and what a step reads is copied in one
    piece. Only its first layer, by which callers know where it runs, goes along.
    """
    held = _places.get(model.unet)
    if held is None or (held.placement, held.device) != (plan.placement, device):
        leave(model)
        network, stack = FusedUNet(model.unet), ExitStack()
        blocks = streamable(network) if plan.placement == STREAMED else []
        moved = {id(tensor) for _, tensors in blocks for tensor in tensors}
        rest = [tensor for tensor in tensors_of(network, model.unet.conv_in) if id(tensor) not in moved]
        stack.enter_context(packed(rest, device))
        if plan.placement == STREAMED:
            stack.callback(WeightStream(network, blocks, device).close)
        if plan.placement == RESIDENT:
            stack.enter_context(packed(tensors_of(model.vae, model.image_encoder), device))
        held = _places[model.unet] = _Place(plan.placement, device, network, stack)
    adopt(model.unet, held.network, plan.arenas[DENOISING])


def leave(model: SV3DModel) -> None:
    """Ends what `place` began: all networks are in main memory, and what the GPU held of them is given back."""
    release(model.unet)
    if (held := _places.pop(model.unet, None)) is not None:
        held.stack.close()
    for network in (model.unet, model.vae, model.image_encoder):
        network.to("cpu")
    give_back()


@contextmanager
def stage(model: SV3DModel, plan: Plan | None, name: str) -> Iterator[Callable[[nn.Module], AbstractContextManager]]:
    """A stage of the plan. What it yields, called with a network, is a context in which that is where it runs, with its
    memory made ready; without a plan networks run where they are."""
    if plan is None:
        yield nullcontext
        return
    device, arena = next(model.unet.parameters()).device, plan.arenas[name]

    @contextmanager
    def visit(network: nn.Module) -> Iterator[None]:
        with packed([] if plan.placement == RESIDENT else tensors_of(network), device):
            if network is model.vae:  # the activations of the tower are small
                reserve(arena, device)
            yield
        give_back()

    give_back()
    yield visit
    if name == DENOISING and not plan.keeps_graph:
        forget_graphs(model.unet)
    give_back()


def during(model: SV3DModel, plan: Plan | None, name: str, running: Generator[E, None, T]) -> Generator[E, None, T]:
    """`running` within a stage of the plan, which begins when it does."""
    with stage(model, plan, name) as visit, visit(model.vae) if name == DECODING else nullcontext():
        return (yield from running)
