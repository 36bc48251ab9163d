"""What the network says at each step of a run: the plain network anywhere, the fused one in CUDA graphs on a GPU."""

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
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
    """One step of a fused network in a CUDA graph, its inputs in buffers that every run of the same shape fills."""

    def __init__(self, network: FusedUNet, run: Run, noisy: Tensor):
        self.noisy, self.rows, self.run = torch.zeros_like(noisy), run.rows[0].clone(), run
        side = torch.cuda.Stream(noisy.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose their algorithms outside the graph
            network(self.noisy, self.rows, self.run)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()  # the graph takes memory of its own
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=side):  # torch's own default is of whichever GPU captured first
            self.output = network(self.noisy, self.rows, self.run)

    def load(self, run: Run) -> None:
        """Takes another run's constants in."""
        for mine, given in zip(self.run.constants(), run.constants(), strict=True):
            mine.copy_(given)


_graphs: WeakKeyDictionary[FusedUNet, dict[tuple, _GraphedStep]] = WeakKeyDictionary()


class FusedPrediction:
    """The fused network, one graph replay per step."""

    def __init__(self, network: FusedUNet, halves: Sequence[Conditioning], levels: Sequence[float]):
        token = torch.cat([half.token for half in halves])
        vector = torch.cat([half.vector for half in halves])
        images = torch.cat([half.image_latents for half in halves])
        self.network = network
        self.run = network.prepare([sampler.c_noise(level) for level in levels], token, vector, images)
        self.step: _GraphedStep | None = None

    def __call__(self, index: int, noisy: Tensor) -> Tensor:
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
            known[key] = _GraphedStep(self.network, self.run, noisy)
        else:
            known[key].load(self.run)
        return known[key]


_fused: WeakKeyDictionary[SV3DUNet, tuple[tuple, FusedUNet]] = WeakKeyDictionary()


def why_not_fused(unet: SV3DUNet) -> list[str]:
    """Reasons why a network runs as it is rather than fused."""
    weight = unet.conv_in.weight
    reasons = [] if weight.is_cuda else ["needs a GPU"]
    if weight.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"needs 16-bit weights, got {weight.dtype}")
    if any(p.device != weight.device for p in unet.parameters()):
        reasons.append("needs all weights on the GPU")
    return reasons


def fused(unet: SV3DUNet) -> FusedUNet:
    """The fused network of `unet`, made once for as long as its weights stay the same."""
    if unet not in _fused or _fused[unet][0] != _state(unet):
        network = FusedUNet(unet)
        _fused[unet] = (_state(unet), network)  # as they are now: some have moved together
    return _fused[unet][1]


def _state(unet: SV3DUNet) -> tuple:
    return tuple((p.data_ptr(), p._version) for p in unet.parameters())


def release(unet: SV3DUNet) -> None:
    """Lets go of the fused network, its graphs and the weights that it keeps on the GPU."""
    _fused.pop(unet, None)


def prediction(unet: SV3DUNet, halves: Sequence[Conditioning], levels: Sequence[float]) -> Prediction:
    """What predicts the steps of a run at the noise levels `levels`, for guidance halves conditioned as given."""
    if why_not_fused(unet):
        return PlainPrediction(unet, halves, levels)
    return FusedPrediction(fused(unet), halves, levels)
