"""What the network says at each step of a run: the plain network anywhere, the fused one in CUDA graphs on a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from . import sampler
from .conditioning import Conditioning
from .diagnosis import first_non_finite
from .model.fused_unet import FusedUNet, Run
from .model.unet import SV3DUNet


class Prediction(Protocol):
    """The network's output (H * B, T, h, w, z) for B orbits and H guidance halves.

    index: of the step. noisy: (B, T, h, w, z) in the network's type, the noisy latents times c_in.
    """

    def __call__(self, index: int, noisy: Tensor) -> Tensor: ...

    def first_non_finite(self, index: int, noisy: Tensor) -> str | None:
        """Name of the layer whose output of this step is the first that holds other things than numbers."""


class PlainPrediction:
    """One call of the network per step."""

    def __init__(self, unet: SV3DUNet, halves: Sequence[Conditioning], levels: Sequence[float]):
        self.unet, self.levels, self.halves = unet, levels, len(halves)
        self.token = torch.cat([half.token for half in halves])
        self.vector = torch.cat([half.vector for half in halves])
        self.images = torch.cat([half.image_latents for half in halves])

    def __call__(self, index: int, noisy: Tensor) -> Tensor:
        noisy = torch.cat([noisy.movedim(-1, 2)] * self.halves)
        images = self.images[:, None].expand(-1, noisy.shape[1], -1, -1, -1)
        inputs = torch.cat([noisy, images], 2)
        return self.unet(inputs, sampler.c_noise(self.levels[index]), self.token, self.vector).movedim(2, -1)

    def first_non_finite(self, index: int, noisy: Tensor) -> str | None:
        return first_non_finite(self.unet, lambda: self(index, noisy))


class _GraphedStep:
    """One step of a fused network in a CUDA graph, its inputs in buffers that every run of the same shape fills.

    arena: bytes of the one segment from which the step's activations are cut, outside the graph and then in it.
    """

    def __init__(self, network: FusedUNet, run: Run, noisy: Tensor, arena: int):
        self.noisy, self.rows = torch.zeros_like(noisy), run.rows[0].clone()
        self.run = replace(run, rows=self.rows)  # all steps' rows are the run's to keep
        side = _side_stream(noisy.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose their algorithms outside the graph
            reserve(arena, noisy.device)
            network(self.noisy, self.rows, self.run)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()  # the graph takes memory of its own
        self.graph = torch.cuda.CUDAGraph()
        # torch's own default stream is of whichever GPU captured first; other threads may go on using this one
        with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
            reserve(arena, noisy.device)
            self.output = network(self.noisy, self.rows, self.run)

    def load(self, run: Run) -> None:
        """Takes another run's constants in."""
        for mine, given in zip(self.run.constants(), run.constants(), strict=True):
            mine.copy_(given)

    def free(self) -> None:
        """Gives the graph's memory back, whoever still refers to the step; it can't be replayed any more."""
        self.graph.reset()
        del self.output, self.noisy, self.rows, self.run


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device, with the workspace that the library of matrix products keeps for every stream."""
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
        with torch.cuda.stream(_side_streams[device]):
            small = torch.ones(16, 16, dtype=torch.float16, device=device)
            F.linear(small, small, small[0]).addmm_(small, small)
    return _side_streams[device]


def reserve(size: int, device: torch.device) -> None:
    """Makes the caching allocator take `size` bytes of a GPU in one piece, from which it cuts what is asked of it next:
    what would not fit the holes between pieces then shares one. A graph's capture takes it for the graph."""
    if size and device.type == "cuda":
        torch.empty(size, dtype=torch.uint8, device=device)


_graphs: WeakKeyDictionary[FusedUNet, dict[tuple, _GraphedStep]] = WeakKeyDictionary()


class FusedPrediction:
    """The fused network: on a GPU one graph replay per step, elsewhere one call."""

    def __init__(self, network: FusedUNet, halves: Sequence[Conditioning], levels: Sequence[float], arena: int = 0):
        token = torch.cat([half.token for half in halves])
        vector = torch.cat([half.vector for half in halves])
        images = torch.cat([half.image_latents for half in halves])
        self.network, self.arena = network, arena
        self.run = network.prepare([sampler.c_noise(level) for level in levels], token, vector, images)
        self.step: _GraphedStep | None = None

    def __call__(self, index: int, noisy: Tensor) -> Tensor:
        if not noisy.is_cuda:
            return self.network(noisy, self.run.rows[index], self.run)
        if self.step is None:
            self.step = self._graph(noisy)
        self.step.noisy.copy_(noisy)
        self.step.rows.copy_(self.run.rows[index])
        self.step.graph.replay()
        return self.step.output

    def first_non_finite(self, index: int, noisy: Tensor) -> str | None:
        return first_non_finite(self.network, lambda: self.network(noisy, self.run.rows[index], self.run))

    def _graph(self, noisy: Tensor) -> _GraphedStep:
        known = _graphs.setdefault(self.network, {})
        key = (noisy.shape, self.run.image.shape)
        if key not in known:
            known.clear()  # a graph keeps the memory of its step: one shape at a time
            known[key] = _GraphedStep(self.network, self.run, noisy, self.arena)
        else:
            known[key].load(self.run)
        return known[key]


@dataclass(frozen=True)
class _Held:
    """What a network runs as. state: of its weights when they were fused; None for what was adopted.

    arena: bytes of a step's activations, 0 where nobody counted them.
    """

    network: FusedUNet
    state: tuple | None
    arena: int = 0


_held: WeakKeyDictionary[SV3DUNet, _Held] = WeakKeyDictionary()


def why_not_fused(unet: SV3DUNet) -> list[str]:
    """Reasons why a network runs as it is rather than fused."""
    if unet in _held and _held[unet].state is None:
        return []
    weight = unet.conv_in.weight
    reasons = [] if weight.is_cuda else ["needs a GPU"]
    if weight.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"needs 16-bit weights, got {weight.dtype}")
    if any(p.device != weight.device for p in unet.parameters()):
        reasons.append("needs all weights on the GPU")
    return reasons


def fused(unet: SV3DUNet) -> FusedUNet:
    """The fused network of `unet`, made once for as long as its weights stay the same, or the one that was adopted."""
    if unet not in _held or _held[unet].state not in (None, _state(unet)):
        network = FusedUNet(unet)
        _held[unet] = _Held(network, _state(unet))  # as they are now: some have moved together
    return _held[unet].network


def _state(unet: SV3DUNet) -> tuple:
    return tuple((p.data_ptr(), p._version) for p in unet.parameters())


def adopt(unet: SV3DUNet, network: FusedUNet, arena: int) -> None:
    """Until `release`, `unet` runs as `network`, where that lies; arena: bytes of a step's activations."""
    if unet in _held and _held[unet].network is not network:
        release(unet)
    _held[unet] = _Held(network, None, arena)


def forget_graphs(unet: SV3DUNet) -> None:
    """Lets go of a step's graph and its memory; the next run captures it anew."""
    if unet in _held:
        for step in _graphs.pop(_held[unet].network, {}).values():
            step.free()


def release(unet: SV3DUNet) -> None:
    """Lets go of the fused network, its graphs and the weights that it keeps on the GPU."""
    forget_graphs(unet)
    _held.pop(unet, None)


def prediction(unet: SV3DUNet, halves: Sequence[Conditioning], levels: Sequence[float]) -> Prediction:
    """What predicts the steps of a run at the noise levels `levels`, for guidance halves conditioned as given."""
    if why_not_fused(unet):
        return PlainPrediction(unet, halves, levels)
    network = fused(unet)
    return FusedPrediction(network, halves, levels, _held[unet].arena)
