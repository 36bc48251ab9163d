"""The video UNet for inference: the mathematics of `unet.py` with everything that a run repeats taken out of its steps.

What is exact algebra here, each part against `SV3DUNet` in float64 in tests/test_fused_unet.py:

- Attention to a context of one token is a vector per block and orbit, computed once per run.
- The embeddings of every noise level and camera, through every residual block's projection, are one product per run.
- The frame positions of each transformer are a table that the weights alone decide.
- The learned blends scale the last layer of their temporal branch, behind its product.
- A concatenated skip is read from its two parts: a norm over both, and a 1x1 convolution as the sum of two products.
- Nearest upsampling and the convolution behind it are four 2x2 convolutions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sv3d_fast.kernels.temporal_conv import temporal_conv
from sv3d_fast.kernels.upsample_conv import pack as pack_upsample
from sv3d_fast.kernels.upsample_conv import upsample_conv
from sv3d_fast.model.blocks import ResBlock, sinusoidal
from sv3d_fast.model.fused_transformer import FusedTransformer, Linear, Norm, Weights, join
from sv3d_fast.model.unet import SV3DUNet

LEVELS = 10  # noise levels that are embedded in one product: all of a run's take 0.3 GB on the way


@dataclass(frozen=True)
class Run:
    """What stays the same in every step of a run of S steps on B orbits (or guidance halves) of T frames.

    rows: (S, B * T * total) what the residual blocks add to their channels, all blocks of a step side by side.
    contexts: per transformer what its spatial and its temporal attention add for each orbit, (B, c) each.
    positions: per transformer its frame positions (T, c).
    image: (B, h, w, c) what the input view adds to the first convolution.
    """

    rows: Tensor
    contexts: list[tuple[Tensor, Tensor]]
    positions: list[Tensor]
    image: Tensor

    def constants(self) -> list[Tensor]:
        """All but the rows, in a fixed order."""
        return [*(vector for pair in self.contexts for vector in pair), *self.positions, self.image]


class Conv(Weights):
    """A 3x3 convolution of (N, h, w, c)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int = 1):
        super().__init__(weight.contiguous(memory_format=torch.channels_last), bias)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, self.stride, 1).permute(0, 2, 3, 1)


class TemporalConv(Weights):
    """A (3, 1, 1) convolution of (B, T, P, c)."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        kernel = weight.detach().flatten(2).mT  # (c', 3, c), the order in which the plain network stores it
        super().__init__(kernel.contiguous(), bias)

    def forward(
        self, x: Tensor, rows: Tensor | None = None, residual: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        return temporal_conv(x, self.weight, self.bias, rows, residual, scale)


class FusedResBlock(nn.Module):
    """`blocks.ResBlock` whose input may come in two parts, x and the `skip` channels that would follow it.

    The biases of both first convolutions are in the rows that each step brings; that of the second spatial one is added
    where the residual is, on the way into the temporal block's norm.
    """

    def __init__(self, block: ResBlock, skip: int = 0):
        super().__init__()
        spatial, temporal = block.spatial_res_block, block.temporal_res_block
        self.norm1, self.norm2 = Norm(spatial.norm1), Norm(spatial.norm2)
        self.conv1 = Conv(spatial.conv1.weight, None)
        self.conv2 = Conv(spatial.conv2.weight, None)
        assert spatial.conv2.bias is not None
        self.conv2_bias: Tensor
        self.register_buffer("conv2_bias", spatial.conv2.bias.detach()[None])
        self.shortcut: Linear | None = None
        self.shortcut_skip: Linear | None = None
        if spatial.conv_shortcut is not None:
            matrix = spatial.conv_shortcut.weight.detach().flatten(1)
            own = matrix.shape[1] - skip
            self.shortcut = Linear(matrix[:, :own].contiguous(), spatial.conv_shortcut.bias)
            self.shortcut_skip = Linear(matrix[:, own:].contiguous(), None) if skip else None
        self.mix: Tensor
        self.register_buffer("mix", block.time_mixer.temporal_weight(temporal.conv2.weight.dtype).detach().view(1))
        self.temporal_norm1, self.temporal_norm2 = Norm(temporal.norm1), Norm(temporal.norm2)
        self.temporal_conv1 = TemporalConv(temporal.conv1.weight, None)
        self.temporal_conv2 = TemporalConv(temporal.conv2.weight, temporal.conv2.bias)

    def forward(self, x: Tensor, skip: Tensor | None, rows: Tensor, temporal_rows: Tensor) -> Tensor:
        """x: (B, T, h, w, c), skip: (B, T, h, w, c2). rows, temporal_rows: (B, T, c') of this step."""
        b, t, h, w, c = x.shape
        images, pixels, frames, orbits = (b * t, h, w, -1), (b * t, h * w, -1), (b, t, h * w, -1), (b, t * h * w, -1)
        hidden = self.norm1(x.view(pixels), None if skip is None else skip.view(pixels))
        hidden = self.conv1(hidden.view(images))
        hidden = self.norm2(hidden.reshape(pixels), rows=rows.flatten(0, 1))
        base = x.view(-1, c)
        if self.shortcut is not None:
            base = self.shortcut(base)
        if self.shortcut_skip is not None:
            assert skip is not None
            base = self.shortcut_skip(skip.view(-1, skip.shape[-1]), base)
        x = self.conv2(hidden.view(images))
        x, hidden = self.temporal_norm1.with_residual(x.reshape(orbits), base.view(orbits), self.conv2_bias)
        hidden = self.temporal_conv1(hidden.view(frames), rows=temporal_rows)
        hidden = self.temporal_norm2(hidden.view(orbits))
        return self.temporal_conv2(hidden.view(frames), None, x.view(frames), self.mix).view(b, t, h, w, -1)


class Downsample(Conv):
    """Halves height and width of (B, T, h, w, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Upsample(Weights):
    """Doubles height and width of (B, T, h, w, c)."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(pack_upsample(conv.weight.detach()), conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return upsample_conv(x.flatten(0, 1), self.weight, self.bias).unflatten(0, x.shape[:2])


class Level(nn.Module):
    """The layers of one resolution on the way down or up."""

    def __init__(self, resnets: list[FusedResBlock], attentions: list[FusedTransformer], resample: nn.Module | None):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.resample = resample


class FusedUNet(nn.Module):
    """An `SV3DUNet` for inference. Its buffers share the network's memory, but for 0.2 GB of SV3D's 2.8: upsampling
    kernels and split shortcuts. Layers of the network whose weights are used as one become views of the whole.

    Build it where the weights are and move it afterwards: only what it needs moves along.
    """

    def __init__(self, unet: SV3DUNet):
        super().__init__()
        self.config, noise = unet.config, unet.config.out_channels
        weight = unet.conv_in.weight.detach()
        self.conv_noise, self.conv_image = Conv(weight[:, :noise], None), Conv(weight[:, noise:], unet.conv_in.bias)
        self.time_embedding, self.add_embedding = unet.time_embedding, unet.add_embedding

        blocks: list[ResBlock] = []
        widths = [unet.config.block_channels[0]]  # of the skips, in the order in which they are pushed
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        down: Any
        up: Any
        for channels, down in zip(unet.config.block_channels, unet.down_blocks, strict=True):
            blocks += down.resnets
            widths += [channels] * len(down.resnets)
            transformers = [FusedTransformer(a) for a in down.attentions] if down.attention else []
            resample: nn.Module | None = None
            if down.downsamplers is not None:
                conv = down.downsamplers[0].conv
                resample = Downsample(conv.weight, conv.bias, 2)
                widths.append(channels)
            self.down.append(Level([FusedResBlock(block) for block in down.resnets], transformers, resample))
        middle: Any = unet.mid_block
        blocks += middle.resnets
        self.middle = Level(
            [FusedResBlock(block) for block in middle.resnets], [FusedTransformer(a) for a in middle.attentions], None
        )
        for up in unet.up_blocks:
            blocks += up.resnets
            transformers = [FusedTransformer(a) for a in up.attentions] if up.attention else []
            resample = None if up.upsamplers is None else Upsample(up.upsamplers[0].conv)
            self.up.append(Level([FusedResBlock(block, widths.pop()) for block in up.resnets], transformers, resample))
        self.norm_out = Norm(unet.conv_norm_out)
        self.conv_out = Conv(unet.conv_out.weight, unet.conv_out.bias)

        # both projections of every residual block, in the order of the forward pass
        parts: list[Any] = [part for block in blocks for part in (block.spatial_res_block, block.temporal_res_block)]
        self.widths = [part.time_emb_proj.out_features for part in parts]
        self.projections = Weights(
            join(*(part.time_emb_proj for part in parts)),
            torch.cat([(part.time_emb_proj.bias + part.conv1.bias).detach() for part in parts]),
        )

    def blocks(self) -> list[nn.Module]:
        """Residual blocks, transformers and resamplings, in the order of the forward pass."""
        found: list[nn.Module] = []
        levels: list[Any] = [*self.down, self.middle, *self.up]
        for level in levels:
            for i, resnet in enumerate(level.resnets):
                found += [resnet, *level.attentions[i : i + 1]]
            found += [] if level.resample is None else [level.resample]
        return found

    def transformers(self) -> list[FusedTransformer]:
        """All of them, in the order of the forward pass."""
        return [block for block in self.blocks() if isinstance(block, FusedTransformer)]

    @torch.no_grad()
    def prepare(self, c_noise: Sequence[float], context: Tensor, vector: Tensor, image: Tensor) -> Run:
        """Everything that the S steps of a run share.

        c_noise: ln(sigma) / 4 of each step. context: (B, 1, context_dim). vector: (B, T, vector_dim). image:
        (B, z, h, w), the latents of the input view.
        """
        weight = self.projections.weight
        token, view = (t.to(weight.device, weight.dtype) for t in (context[:, 0], image))
        levels = torch.tensor(c_noise, dtype=torch.float32, device=weight.device)
        times = self.time_embedding(sinusoidal(levels, self.config.block_channels[0]))
        cameras = self.add_embedding(vector.to(weight.device))
        rows = weight.new_empty(len(levels), cameras[..., 0].numel() * len(weight))
        for first in range(0, len(levels), LEVELS):
            activated = F.silu(times[first : first + LEVELS, None, None] + cameras)  # (S, B, T, e)
            at = 0
            for part in F.linear(activated, weight, self.projections.bias).split(self.widths, -1):
                rows[first : first + LEVELS, at : at + part[0].numel()] = part.flatten(1)
                at += part[0].numel()
        numbers = torch.arange(vector.shape[1], device=weight.device)
        transformers = self.transformers()
        return Run(
            rows,
            [(t.attention.context(token), t.temporal_attention.context(token)) for t in transformers],
            [t.positions(sinusoidal(numbers, t.proj_in.weight.shape[0])) for t in transformers],
            self.conv_image(view.permute(0, 2, 3, 1).contiguous()),
        )

    @torch.no_grad()
    def forward(self, noisy: Tensor, rows: Tensor, run: Run) -> Tensor:
        """One step: the prediction (B, T, h, w, z).

        noisy: (N, T, h, w, z), the scaled noisy latents; B is a multiple of N, and the twins of guidance, which share
        theirs, are N apart. rows: (B * T * total,), this step's of `run.rows`.
        """
        b, t = len(run.image), noisy.shape[1]
        parts = iter([part.view(b, t, -1) for part in rows.split([b * t * width for width in self.widths])])
        tables = iter(zip(run.contexts, run.positions, strict=True))
        skips: list[Tensor] = []

        def attended(level: Any, i: int, x: Tensor) -> Tensor:
            return level.attentions[i](x, *next(tables)) if i < len(level.attentions) else x

        noise = self.conv_noise(noisy.flatten(0, 1)).unflatten(0, noisy.shape[:2])
        x = (noise + run.image.unflatten(0, (-1, len(noisy)))[:, :, None]).flatten(0, 1).contiguous()
        skips.append(x)
        level: Any
        for level in self.down:
            for i in range(len(level.resnets)):
                x = attended(level, i, level.resnets[i](x, None, next(parts), next(parts)))
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        for i in range(len(self.middle.resnets)):
            x = self.middle.resnets[i](x, None, next(parts), next(parts))
            x = attended(self.middle, i, x)
        for level in self.up:
            for i in range(len(level.resnets)):
                x = level.resnets[i](x, skips.pop(), next(parts), next(parts))
                x = attended(level, i, x)  # two lines: what went in and the skip are gone by now
            if level.resample is not None:
                x = level.resample(x)
        h, w = x.shape[2:4]
        x = self.conv_out(self.norm_out(x.view(b * t, h * w, -1)).view(b * t, h, w, -1))
        return x.unflatten(0, (b, t))
