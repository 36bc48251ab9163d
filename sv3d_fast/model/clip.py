"""The CLIP image tower that gives SV3D its context token, and the resampling that feeds it.

Architecture of OpenCLIP's vision transformers (Radford et al. 2021; ViT-H-14 of laion2b_s32b_b79k by default);
parameters carry the names that transformers' CLIPVisionModelWithProjection gives them.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .config import CLIPConfig

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


class Embeddings(nn.Module):
    """(N, 3, S, S) -> (N, 1 + patches, width): a class token, then the patches in reading order, with positions."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        patches = (config.image_size // config.patch) ** 2
        self.class_embedding = nn.Parameter(_normal(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)
        self.position_embedding = nn.Embedding(1 + patches, config.width, _weight=_normal(1 + patches, config.width))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        token = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([token, patches], dim=1) + self.position_embedding.weight


def _normal(*shape: int) -> torch.Tensor:
    """Normal numbers, but on the meta device, where torch would import sympy to draw none: 3 s."""
    values = torch.empty(*shape)
    return values if values.is_meta else nn.init.normal_(values)


class SelfAttention(nn.Module):
    """(N, L, width) -> same: multi-head attention of all tokens to all."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with an exact (erf) GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = SelfAttention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Layers(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionTransformer(nn.Module):
    """(N, 3, S, S) -> (N, width): the class token after the last layer, normalised."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)  # transformers' spelling, part of the checkpoint
        self.encoder = Layers(config)
        self.post_layernorm = nn.LayerNorm(config.width)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(tokens[:, 0])


class CLIPImageTower(nn.Module):
    """Pooled and projected image embeddings, not normalised to unit length (as SV3D takes them).

    Raises ValueError for heads that don't divide the width, a patch that doesn't divide the image, and for pixels of
    a wrong shape.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__()
        if config.heads < 1 or config.width % config.heads:
            raise ValueError(f"heads: expected a divisor of the width {config.width}, got {config.heads}")
        if config.patch < 1 or config.image_size < 1 or config.image_size % config.patch:
            raise ValueError(f"patch: expected a divisor of the image size {config.image_size}, got {config.patch}")
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.visual_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) from `preprocess`, S = `config.image_size` -> (N, projection)."""
        size = self.config.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels: expected (N, 3, {size}, {size}), got {tuple(pixels.shape)}")
        return self.visual_projection(self.vision_model(pixels))


def preprocess(image: torch.Tensor, size: int) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1], any H and W -> (N, 3, size, size), normalised as CLIP expects.

    The official resize (kornia's with antialias): along each side that shrinks, a Gaussian whose width grows with the
    factor, then bicubic interpolation between aligned corners. Computed in float32 (float64 stays float64).
    Raises ValueError for other shapes, integer pixels and sizes below 1.
    """
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape or not image.is_floating_point():
        raise ValueError(f"image: expected floating-point (N, 3, H, W), got {image.dtype} {tuple(image.shape)}")
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    x = image if image.dtype == torch.float64 else image.float()
    for dim in (2, 3):
        x = _blur(x, dim, image.shape[dim] / size)
    x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=True)
    mean = x.new_tensor(MEAN).view(3, 1, 1)
    std = x.new_tensor(STD).view(3, 1, 1)
    return (((x + 1) / 2 - mean) / std).to(image.dtype)


def _blur(x: torch.Tensor, dim: int, factor: float) -> torch.Tensor:
    """Gaussian blur along `dim` (2 or 3) before shrinking by `factor`, borders reflected."""
    if factor <= 1:  # the official code's smallest sigma, 0.001, leaves a single tap
        return x
    taps = gaussian_taps(factor).to(x)
    before = len(taps) // 2
    pad = (0, 0, before, before) if dim == 2 else (before, before, 0, 0)
    kernel = taps.view(1, 1, -1, 1) if dim == 2 else taps.view(1, 1, 1, -1)
    return F.conv2d(F.pad(x, pad, mode="reflect"), kernel.expand(3, 1, -1, -1), groups=3)


def gaussian_taps(factor: float) -> torch.Tensor:
    """Odd number of float64 taps, summing to 1, of the Gaussian that goes before shrinking by `factor` > 1."""
    sigma = max((factor - 1) / 2, 0.001)
    count = int(max(4 * sigma, 3))
    count += 1 - count % 2
    offsets = torch.arange(count, dtype=torch.float64) - count // 2
    taps = torch.exp(-(offsets**2) / (2 * math.pow(sigma, 2)))
    return taps / taps.sum()
