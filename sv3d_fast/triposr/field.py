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

from .config import TripoSRConfig

PLANES = ((0, 1), (0, 2), (1, 2))  # the axes of each plane; the first runs along the plane's columns
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
        first = cast(nn.Linear, decoder.layers[0])
        if planes.ndim != 4 or len(planes) != 3 or 3 * planes.shape[1] != first.in_features:
            raise ValueError(
                f"scene_codes: expected planes of shape (3, {first.in_features // 3}, S, S), got {tuple(planes.shape)}"
            )
        self.radius = radius
        self.chunk_size = chunk_size
        self._rest = cast(nn.Sequential, decoder.layers[1:])
        self._dtype = first.weight.dtype
        with torch.no_grad():
            weights = first.weight.unflatten(1, (3, -1)).transpose(0, 1)  # (plane, neuron, channel)
            # in float32, whatever the decoder's type: half precision would round the places where planes are sampled
            self._planes = torch.einsum("pnc,pchw->pnhw", weights.float(), planes.float()).contiguous()
            self._bias = first.bias.float()

    @property
    def device(self) -> torch.device:
        return self._planes.device

    @torch.no_grad()
    def query(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Raw density (...) and sRGB colour (..., 3) in [0, 1] at points (..., 3), all float32; world coordinates."""
        shape = points.shape[:-1]
        scaled = points.reshape(-1, 3).float() / self.radius
        raw = self._in_chunks(len(scaled), lambda at: self._rest(self._sampled(scaled[at])), 4)
        return raw[:, 0].reshape(shape), raw[:, COLOR].sigmoid().reshape(*shape, 3)

    def _sampled(self, points: Tensor) -> Tensor:
        """The first layer's output (N, neurons) at points (N, 3) in [-1, 1]."""
        grid = torch.stack([points[:, axes] for axes in PLANES])[:, None]
        samples = F.grid_sample(self._planes, grid, align_corners=False)  # (3, neurons, 1, N)
        return (samples.sum(0)[:, 0].T + self._bias).to(self._dtype)

    def _in_chunks(self, count: int, run: Callable[[slice], Tensor], width: int) -> Tensor:
        step = self.chunk_size or max(count, 1)
        out = torch.empty(count, width, device=self.device)
        for start in range(0, count, step):
            at = slice(start, start + step)
            out[at] = run(at)[:, :width]
        return out

    @torch.no_grad()
    def on_grid(self, resolution: int) -> Callable[[Tensor], Tensor]:
        """The raw density on a grid of resolution ** 3 points whose outer ones lie on the cube's faces.

        Returns a function from grid indices (N, 3) int64 to values (N,) float32. Each plane is sampled once at all
        the resolution ** 2 places where grid points project, which takes 12 * neurons * resolution ** 2 bytes.
        """
        ticks = torch.linspace(-1, 1, resolution, device=self.device)
        grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="ij"), dim=-1).expand(3, -1, -1, -1)
        samples = F.grid_sample(self._planes, grid, align_corners=False)  # (3, neurons, R, R)
        tables = samples.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
        tables[0] += self._bias

        @torch.no_grad()
        def evaluate(indices: Tensor) -> Tensor:
            def run(at: slice) -> Tensor:
                i = indices[at]
                rows = [table[i[:, a] * resolution + i[:, b]] for table, (a, b) in zip(tables, PLANES, strict=True)]
                return self._rest(rows[0].add_(rows[1]).add_(rows[2]).to(self._dtype))

            return self._in_chunks(len(indices), run, 1)[:, 0]

        return evaluate
