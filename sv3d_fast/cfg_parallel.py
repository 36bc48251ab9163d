"""One orbit on two devices: the first predicts the conditional half of every step, the second the unconditional one.

Exact: the halves never meet inside the network, and what crosses in a step is one set of latents each way. One process
drives both devices: their streams wait for each other, so there are no launcher, ranks or rendezvous, and whatever
calls `run` on one GPU calls it on two. Between processes the same copies would be NCCL's, with all of those.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .conditioning import Conditioning
from .model.unet import SV3DUNet
from .model.vae import SV3DVAE
from .model.weights import SV3DModel
from .offload import tensors_of
from .prediction import fused, prediction, why_not_fused

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Twin:
    """Copies of a model's networks on another device."""

    unet: SV3DUNet
    vae: SV3DVAE


_twins: WeakKeyDictionary[SV3DUNet, tuple[tuple, Twin]] = WeakKeyDictionary()


def twin_of(model: SV3DModel, device: torch.device) -> Twin:
    """The model's twin on `device`, made once for as long as the model's weights stay the same."""
    if not why_not_fused(model.unet):
        with torch.cuda.device_of(model.unet.conv_in.weight):
            fused(model.unet)  # moves some weights together, once
    state = (device, *((t.data_ptr(), t._version) for t in tensors_of(model.unet, model.vae)))
    if model.unet not in _twins or _twins[model.unet][0] != state:
        _twins.pop(model.unet, None)  # before the next is made
        _twins[model.unet] = (state, Twin(_copied(model.unet, device), _copied(model.vae, device)))
    return _twins[model.unet][1]


def _copied(network: Network, device: torch.device) -> Network:
    moved: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to(device, copy=True), p.requires_grad) for p in network.parameters()
    }
    moved |= {id(b): b.to(device, copy=True) for b in network.buffers()}
    return copy.deepcopy(network, moved)  # takes these where it meets the originals


def even_chunk(count: int, chunk: int, devices: int) -> int:
    """At most `chunk`, such that `devices` that take chunks of `count` frames in turn get equally many of them."""
    rounds = -(-count // (chunk * devices))
    return -(-count // (rounds * devices))


class SplitPrediction:
    """A `Prediction` each of whose guidance halves runs on the device of its network; the last one's takes all in."""

    def __init__(self, unets: Sequence[SV3DUNet], halves: Sequence[Conditioning], levels: Sequence[float]):
        self.weights = [unet.conv_in.weight for unet in unets]
        self.parts = []
        for unet, half, weight in zip(unets, halves, self.weights, strict=True):
            placed = {name: value.to(weight.device) for name, value in vars(half).items()}
            with torch.cuda.device_of(weight):
                self.parts.append(prediction(unet, [replace(half, **placed)], levels))

    def __call__(self, index: int, noisy: Tensor) -> Tensor:
        outputs = []
        for part, weight in zip(self.parts, self.weights, strict=True):
            with torch.cuda.device_of(weight):
                outputs.append(part(index, noisy.to(weight.device, non_blocking=True)))
        return torch.cat([output.to(noisy.device, non_blocking=True) for output in outputs])

    def first_non_finite(self, index: int, noisy: Tensor) -> str | None:
        for part, weight in zip(self.parts, self.weights, strict=True):
            with torch.cuda.device_of(weight):
                if name := part.first_non_finite(index, noisy.to(weight.device)):
                    return name
        return None
