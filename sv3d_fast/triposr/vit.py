"""The image tokenizer: a ViT (Dosovitskiy et al. 2021; DINO's ViT-B/16, Caron et al. 2021), all of its tokens.

Parameters carry the names of transformers 4.35, the version TripoSR was released with; later ones renamed them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ViTConfig

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
NUDGE = 0.1  # patches; transformers 4.35 adds it to the target size before it forms the scale factor


class Embeddings(nn.Module):
    """(N, 3, H, W) -> (N, 1 + patches, width): a class token, then the patches in reading order, with positions."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.side = config.image_size // config.patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + self.side**2, config.width))
        self.patch_embeddings = nn.ModuleDict(
            {"projection": nn.Conv2d(3, config.width, config.patch, stride=config.patch)}
        )

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings of a grid of patches, (1, 1 + rows * columns, width), interpolated bicubically.

        The scale factors are (size + 0.1) / trained size, as the checkpoint was trained: 1e-3 off a plain resize.
        """
        if rows == columns == self.side:
            return self.position_embeddings
        grid = self.position_embeddings[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        scale = ((rows + NUDGE) / self.side, (columns + NUDGE) / self.side)
        # in float32: half precision would round the sampling positions
        resized = F.interpolate(grid.float(), scale_factor=scale, mode="bicubic", align_corners=False)
        return torch.cat([self.position_embeddings[:, :1], resized.flatten(2).transpose(1, 2).to(grid.dtype)], dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embeddings["projection"](pixels)
        tokens = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        return tokens + self.positions(*patches.shape[-2:])


class Layer(nn.Module):
    """A pre-norm transformer layer: self-attention of all tokens, then an MLP with an exact (erf) GELU."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        width, hidden = config.width, config.mlp_width
        self.heads = config.heads
        self.attention = nn.ModuleDict(
            {
                "attention": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
                "output": nn.ModuleDict({"dense": nn.Linear(width, width)}),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width)})
        self.layernorm_before = nn.LayerNorm(width, eps=config.norm_eps)
        self.layernorm_after = nn.LayerNorm(width, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.layernorm_before(x))
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))

    def _attend(self, x: Tensor) -> Tensor:
        projections: nn.ModuleDict = self.attention["attention"]  # type: ignore[assignment]
        q, k, v = (
            projections[name](x).unflatten(2, (self.heads, -1)).transpose(1, 2) for name in ("query", "key", "value")
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.attention["output"]["dense"](attended)  # type: ignore[index]


class Encoder(nn.Module):
    """All layers, one after the other."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x)
        return x


class ViT(nn.Module):
    """(N, 3, H, W), normalised -> (N, 1 + patches, width): all tokens after the final norm."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)
        # never used, here because every checkpoint has it
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.width, config.width)})

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layernorm(self.encoder(self.embeddings(pixels)))


class ImageTokenizer(nn.Module):
    """Pictures (N, 3, H, W) with RGB in [0, 1] -> tokens (N, 1 + patches, width)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.model = ViT(config)

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return self.model((images - mean) / std)
