"""The scene as a field: density and colour anywhere in the cube that three feature planes span.

A point is projected on the planes xy, xz and yz, which are sampled bilinearly (zero outside, pixel centres half a
pixel from the border); the concatenated features go through an MLP (TripoSR, section 3; EG3D, Chan et al. 2022).
"""

import itertools
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sv3d_fast.kernels.triplane_mlp import triplane_grid, triplane_points

from .config import TripoSRConfig

COLOR = slice(1, 4)  # channels of the decoder's output; channel 0 is the raw density


class Decoder(nn.Module):
    """Features (..., 3 * plane_channels) -> raw density and raw colour (..., 4)."""

    def __init__(self, config: TripoSRConfig):
        super().__init__()
        widths = [3 * config.plane_channels] + [config.neurons] * config.hidden_layers
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.SiLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Linear(config.neurons, 4))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class Field:
    """One scene code with its decoder, ready for queries; nothing here is differentiated.

    planes: (3, plane_channels, S, S) scene code. radius: half the side of the cube. chunk_size: points that go
    through the decoder at a time, 0 for all of them; it bounds memory and changes no result beyond rounding.

    Sampling is linear and so is the decoder's first layer, so they change places: the layer is applied to the planes
    once, and each query sums three samples of its output (exact but for rounding).
    """

    def __init__(self, planes: Tensor, decoder: Decoder, radius: float, chunk_size: int = 0):
        first, *middle, last = cast(list[nn.Linear], list(decoder.layers)[::2])
        if planes.ndim != 4 or len(planes) != 3 or 3 * planes.shape[1] != first.in_features:
            raise ValueError(
                f"scene_codes: expected planes of shape (3, {first.in_features // 3}, S, S), got {tuple(planes.shape)}"
            )
        self.radius = radius
        self.chunk_size = chunk_size
        self._dtype = first.weight.dtype
        with torch.no_grad():
            own = first.weight.unflatten(1, (3, -1)).transpose(0, 1)  # (plane, neuron, channel)
            self._planes = torch.einsum("pnc,pchw->phwn", own.float(), planes.float())
            self._bias = first.bias.float()
            weights, biases = (
                first.weight.new_empty(0, *last.weight.shape[1:] * 2),
                first.bias.new_empty(0, len(first.bias)),
            )
            if middle:
                weights = torch.stack([layer.weight for layer in middle])
                biases = torch.stack([layer.bias for layer in middle])
            self._mlp = [t.detach() for t in (weights, biases, last.weight, last.bias)]

    @property
    def device(self) -> torch.device:
        return self._planes.device

    @torch.no_grad()
    def query(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Raw density (...) and sRGB colour (..., 3) in [0, 1] at points (..., 3), all float32; world coordinates."""
        shape = points.shape[:-1]
        scaled = points.reshape(-1, 3).float() / self.radius
        planes, bias = self._planes.to(self._dtype), self._bias.to(self._dtype)
        raw = self._in_chunks(scaled, lambda part: triplane_points(planes, bias, part, *self._mlp))
        return raw[:, 0].reshape(shape), raw[:, COLOR].sigmoid().reshape(*shape, 3)

    def _in_chunks(self, places: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        if not 0 < self.chunk_size < len(places):
            return run(places)
        return torch.cat([run(part) for part in places.split(self.chunk_size)])

    @torch.no_grad()
    def on_grid(self, resolution: int) -> Callable[[Tensor], Tensor]:
        """The raw density on a grid of resolution ** 3 points whose outer ones lie on the cube's faces.

        Returns a function from places (N,), (x * resolution + y) * resolution + z, to values (N,) float32. Each plane
        is sampled once at all the resolution ** 2 places where grid points project, which takes 12 * neurons *
        resolution ** 2 bytes.
        """
        ticks = torch.linspace(-1, 1, resolution, device=self.device)
        grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="ij"), dim=-1).expand(3, -1, -1, -1)
        samples = F.grid_sample(self._planes.permute(0, 3, 1, 2), grid, align_corners=False)  # (3, neurons, R, R)
        tables = samples.permute(0, 2, 3, 1).contiguous()
        tables[0] += self._bias
        tables, (weights, biases, last, last_bias) = tables.to(self._dtype), self._mlp
        density = weights, biases, last[:1], last_bias[:1]

        @torch.no_grad()
        def evaluate(indices: Tensor) -> Tensor:
            return self._in_chunks(indices, lambda part: triplane_grid(tables, part, *density))[:, 0]

        return evaluate
