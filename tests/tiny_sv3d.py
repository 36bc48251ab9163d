"""A tiny SV3D with random weights, for tests of what stands around the networks."""

import numpy as np
import torch
from PIL import Image

from sv3d_fast.model.clip import CLIPImageTower
from sv3d_fast.model.config import CLIPConfig, ModelConfig, SamplerConfig, UNetConfig, VAEConfig
from sv3d_fast.model.unet import SV3DUNet
from sv3d_fast.model.vae import SV3DVAE
from sv3d_fast.model.weights import SV3DModel, save_model
from sv3d_fast.stable_video_3d import StableVideo3DPipeline

STEPS, FRAMES, SIZE, SIDE = 2, 5, 64, 16
LATENTS = (FRAMES, 4, SIDE, SIDE)


def config(vector_dim=1280):
    return ModelConfig(
        unet=UNetConfig(
            block_channels=(32, 64), attention=(True, True), layers_per_block=1, head_channels=32, context_dim=32,
            vector_dim=vector_dim, norm_eps="diffusers",
        ),
        vae=VAEConfig(block_channels=(32, 32, 32), res_blocks=1),
        clip=CLIPConfig(width=32, layers=2, heads=2, mlp_width=64, patch=8, image_size=32, projection=32),
        sampler=SamplerConfig(steps=STEPS),
        image_size=SIZE,
        frames=FRAMES,
    )  # fmt: skip


def make_folder(path, vector_dim):
    torch.manual_seed(3)
    c = config(vector_dim)
    save_model(SV3DModel(c, SV3DUNet(c.unet), SV3DVAE(c.vae), CLIPImageTower(c.clip), notice="Tiny notice"), path)
    return path


def load(path, **kwargs):
    pipe = StableVideo3DPipeline.from_pretrained(path, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed=0, size=SIZE):
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)


def seeded(seed=42):
    return torch.Generator().manual_seed(seed)


def even_turn(input_first=False, frames=FRAMES, elevation=5.0):
    start = 0 if input_first else 1
    return [{"elevation": elevation, "azimuth": (k + start) * 360 / frames % 360} for k in range(frames)]


def relative_error(value, reference):
    return float((value - reference).norm() / reference.norm())
