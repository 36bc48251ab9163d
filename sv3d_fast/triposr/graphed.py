"""Scene codes by the fused network on a GPU, in CUDA graphs of a few batch sizes."""

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .fused import FusedTripoSR

if TYPE_CHECKING:
    from .system import TripoSR

BATCHES = (8, 4, 2, 1)  # other numbers of pictures are sums of these


class _Graph:
    """The network at one batch size; its buffers are overwritten by each run."""

    def __init__(self, network: FusedTripoSR, like: Tensor, pool: Any):
        with torch.inference_mode(False):  # or later calls could write to it in that mode alone
            self.pixels = torch.zeros_like(like)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose their algorithms outside the graph
            network(self.pixels)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.codes = network(self.pixels)


class GraphedTripoSR:
    """A fused network and its graphs, each captured when its batch size first comes.

    The graphs share their memory: only one runs at a time, and codes are copied out of it.
    """

    def __init__(self, network: FusedTripoSR):
        self.network = network
        self.graphs: dict[int, _Graph] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, size, size) float32 in [0, 1] -> scene codes."""
        parts = []
        with torch.cuda.device(pixels.device):
            for part in pixels.split(batches(len(pixels))):
                if len(part) not in self.graphs:
                    self.graphs[len(part)] = _Graph(self.network, part, self.pool)
                graph = self.graphs[len(part)]
                graph.pixels.copy_(part)
                graph.graph.replay()
                parts.append(graph.codes.clone())
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def batches(count: int) -> list[int]:
    """The graphs' batch sizes that a number of pictures is split into, the largest first."""
    found = []
    for size in BATCHES:
        found += [size] * (count // size)
        count %= size
    return found


def fuse(model: "TripoSR") -> FusedTripoSR:
    """The fused network of a model."""
    return FusedTripoSR(
        model.image_tokenizer, model.tokenizer, model.backbone, model.post_processor, model.config.image_size
    )


def why_not_fused(model: "TripoSR") -> list[str]:
    """Reasons why a model runs as it is rather than fused."""
    place, dtype = model.device, model.tokenizer.embeddings.dtype
    reasons = [] if place.type == "cuda" else ["needs a GPU"]
    if dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"needs 16-bit weights, got {dtype}")
    weights = _weights(model)
    if any(p.device != place or p.dtype != dtype for p in weights):
        reasons.append("needs all weights on one device and of one type")
    if torch.is_grad_enabled() and any(p.requires_grad for p in weights):
        reasons.append("forward only, and a gradient is asked for")
    return reasons


_graphed: WeakKeyDictionary["TripoSR", tuple[tuple, GraphedTripoSR]] = WeakKeyDictionary()


def graphed(model: "TripoSR") -> GraphedTripoSR:
    """The fused network of a model on a GPU, made once for as long as its weights stay the same."""
    if model not in _graphed or _graphed[model][0] != _state(model):
        _graphed.pop(model, None)  # first: its memory is free for the new one
        network = GraphedTripoSR(fuse(model))
        _graphed[model] = (_state(model), network)  # joined weights have moved
    return _graphed[model][1]


def _state(model: "TripoSR") -> tuple:
    return tuple((p.data_ptr(), p._version) for p in _weights(model))


def _weights(model: "TripoSR") -> list[nn.Parameter]:
    """Of all that is fused: not of the decoder. `parameters()` would take longer than to launch the graph."""
    found: list[nn.Parameter] = []
    parts: list[Any] = [model.image_tokenizer, model.tokenizer, model.backbone, model.post_processor]
    while parts:
        part = parts.pop()
        found += [p for p in part._parameters.values() if p is not None]
        parts += part._modules.values()
    return found
