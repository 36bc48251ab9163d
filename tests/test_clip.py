"""The CLIP image tower against transformers and against OpenCLIP's block; its preprocessing against the definition."""

import math

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sv3d_fast.model.clip import MEAN, STD, CLIPImageTower, gaussian_taps, preprocess
from sv3d_fast.model.config import CLIPConfig
from sv3d_fast.model.names import clip_names

SMALL = CLIPConfig(width=48, layers=3, heads=3, mlp_width=80, patch=7, image_size=35, projection=20)


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("config", [SMALL, CLIPConfig(32, 1, 4, 56, 5, 5, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_agrees_with_transformers(config, dtype, tolerance):
    torch.manual_seed(0)
    theirs = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch,
            projection_dim=config.projection,
            hidden_act="gelu",
        )
    )
    theirs = theirs.to(dtype).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
        ours = CLIPImageTower(config).to(dtype)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        pixels = torch.randn(3, 3, config.image_size, config.image_size, dtype=dtype)
        assert rel(ours(pixels), theirs(pixels).image_embeds) <= tolerance


class OpenCLIPBlock(nn.Module):
    """A residual attention block as OpenCLIP builds it, on torch's own multi-head attention."""

    def __init__(self, width, heads, mlp_width):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, mlp_width), "c_proj": nn.Linear(mlp_width, width)})

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenCLIPVisual(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(config.width))
        self.positional_embedding = nn.Parameter(
            torch.randn((config.image_size // config.patch) ** 2 + 1, config.width)
        )
        self.proj = nn.Parameter(torch.randn(config.width, config.projection) / config.width**0.5)
        self.conv1 = nn.Conv2d(3, config.width, config.patch, config.patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(
            OpenCLIPBlock(config.width, config.heads, config.mlp_width) for _ in range(config.layers)
        )

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


def test_official_names_give_openclip():
    torch.manual_seed(1)
    theirs = OpenCLIPVisual(SMALL).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
        prefix = "conditioner.embedders.0.open_clip.model.visual."
        official = {prefix + k: v for k, v in theirs.state_dict().items()}
        names = clip_names(SMALL)
        assert {source.name for source in names.values()} == set(official)
        ours = CLIPImageTower(SMALL).double()
        shapes = {k: v.shape for k, v in ours.state_dict().items()}
        for k, source in names.items():
            assert source.stored_shape(shapes[k]) == official[source.name].shape, k
        ours.load_state_dict({k: s.take(official[s.name], shapes[k]) for k, s in names.items()}, strict=True)
        pixels = torch.randn(2, 3, 35, 35, dtype=torch.float64)
        assert rel(ours(pixels), theirs(pixels)) <= 1e-12


def test_full_parameter_count():
    with torch.device("meta"):
        tower = CLIPImageTower(CLIPConfig())
    assert sum(p.numel() for p in tower.parameters()) == 632_076_800
    assert len(tower.state_dict()) == 520


def test_taps():
    taps = gaussian_taps(576 / 224)
    assert np.allclose(taps, [0.235420, 0.529159, 0.235420], atol=1e-6)
    for factor, count in ((1.0001, 3), (2.5, 3), (3.01, 5), (5.0, 9), (10.0, 19)):
        assert len(gaussian_taps(factor)) == count
        assert gaussian_taps(factor).sum().item() == pytest.approx(1)


def resize_by_definition(image, size):
    """The same in numpy, pixel by pixel: blur, then Keys' cubic (a = -0.75) between aligned corners."""

    def along(x):  # (n, ...) -> (size, ...)
        n = len(x)
        factor = n / size
        if factor > 1:
            sigma = max((factor - 1) / 2, 0.001)
            half = int(max(4 * sigma, 3)) // 2
            weights = np.array([math.exp(-((i / sigma) ** 2) / 2) for i in range(-half, half + 1)])
            weights /= weights.sum()
            padded = np.pad(x, [(half, half)] + [(0, 0)] * (x.ndim - 1), mode="reflect")
            x = sum(w * padded[i : i + n] for i, w in enumerate(weights))

        def cubic(t):
            t = abs(t)
            if t <= 1:
                return 1.25 * t**3 - 2.25 * t**2 + 1
            return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

        out = []
        for i in range(size):
            at = i * (n - 1) / (size - 1) if size > 1 else 0.0
            base = math.floor(at)
            out.append(sum(cubic(at - j) * x[min(max(j, 0), n - 1)] for j in range(base - 1, base + 3)))
        return np.stack(out)

    rows = along(np.moveaxis(image, -2, 0))
    columns = along(np.moveaxis(np.moveaxis(rows, 0, -2), -1, 0))
    return np.moveaxis(columns, 0, -1)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(46, 46, 18), (18, 18, 18), (9, 7, 18), (61, 5, 9), (11, 40, 10), (1, 1, 4), (30, 2, 1), (19, 19, 18)],
)
def test_preprocess_follows_its_definition(height, width, size):
    torch.manual_seed(2)
    image = torch.rand(2, 3, height, width, dtype=torch.float64) * 2 - 1
    expected = (resize_by_definition(image.numpy(), size) + 1) / 2
    expected = (expected - np.array(MEAN).reshape(3, 1, 1)) / np.array(STD).reshape(3, 1, 1)
    assert np.abs(preprocess(image, size).numpy() - expected).max() < 1e-12


def test_preprocess_agrees_with_diffusers_at_full_size():
    torch.manual_seed(3)
    image = torch.rand(1, 3, 576, 576) * 2 - 1
    theirs = (_resize_with_antialiasing(image, (224, 224)) + 1) / 2
    ours = preprocess(image, 224) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert (ours - theirs).abs().max() < 1e-6


def test_preprocess_keeps_the_type_but_computes_wider():
    image = torch.rand(1, 3, 40, 40) * 2 - 1
    for dtype in (torch.float16, torch.bfloat16):
        out = preprocess(image.to(dtype), 10)
        assert out.dtype == dtype
        assert torch.equal(out, preprocess(image.to(dtype).float(), 10).to(dtype))


def test_errors():
    with pytest.raises(ValueError, match="heads: expected a divisor of the width 48, got 5"):
        CLIPImageTower(CLIPConfig(width=48, heads=5))
    with pytest.raises(ValueError, match="patch: expected a divisor of the image size 30, got 7"):
        CLIPImageTower(CLIPConfig(width=48, heads=3, patch=7, image_size=30))
    with pytest.raises(ValueError, match=r"pixels: expected \(N, 3, 35, 35\), got \(1, 3, 35, 28\)"):
        CLIPImageTower(SMALL)(torch.zeros(1, 3, 35, 28))
    for image in (torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="image: expected floating-point"):
            preprocess(image, 4)
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        preprocess(torch.zeros(1, 3, 4, 4), 0)
