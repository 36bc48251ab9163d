"""The gated linear unit of every feed-forward here, with its weights as the fused op takes them."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sv3d_fast.kernels import geglu


class GEGLU(nn.Module):
    """value * gelu(gate), both linear in x: (..., channels) -> (..., hidden).

    The projection's rows are values and gates in turn, as the fused op takes them, so that a GPU holds them once.
    State dicts have the official order, all values first.
    """

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)
        self.register_state_dict_post_hook(_to_official)
        self.register_load_state_dict_pre_hook(_from_official)

    def forward(self, x: Tensor) -> Tensor:
        # Two products rather than halves of one: contiguous results, and no copy to join their gradients.
        (value, value_bias), (gate, gate_bias) = ((self.proj.weight[i::2], self.proj.bias[i::2]) for i in (0, 1))
        return F.linear(x, value, value_bias) * F.gelu(F.linear(x, gate, gate_bias))


def _to_official(module: nn.Module, state: dict[str, Any], prefix: str, *_) -> None:
    for name in ("proj.weight", "proj.bias"):
        state[prefix + name] = geglu.separated(state[prefix + name])


def _from_official(module: nn.Module, state: dict[str, Any], prefix: str, *_) -> None:
    for name in ("proj.weight", "proj.bias"):
        given = state.get(prefix + name)
        if given is not None and given.shape == module.get_parameter(name).shape:  # others are reported by the load
            state[prefix + name] = geglu.interleaved(given)
