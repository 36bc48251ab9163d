"""SV3D's real shapes on random weights, in memory or as a folder, which benches load as users load theirs."""

from pathlib import Path

import torch

from sv3d_fast.full_size import randomised
from sv3d_fast.model.clip import CLIPImageTower
from sv3d_fast.model.config import ModelConfig
from sv3d_fast.model.unet import SV3DUNet
from sv3d_fast.model.vae import SV3DVAE
from sv3d_fast.model.weights import SV3DModel, save_model


def random_sv3d(device: torch.device, vae_dtype: torch.dtype = torch.float32) -> SV3DModel:
    """SV3D_p, by default as `run` opens it on a GPU: in float16 but for the autoencoder. Activations keep their size
    from layer to layer, so that a run of any length stays finite."""
    torch.manual_seed(0)
    config = ModelConfig()
    with torch.device("meta"):
        unet, vae, tower = SV3DUNet(config.unet), SV3DVAE(config.vae), CLIPImageTower(config.clip)
    half = torch.float16
    return SV3DModel(
        config, randomised(unet, device, half), randomised(vae, device, vae_dtype), randomised(tower, device, half)
    )


def write_random_sv3d(folder: Path, device: torch.device) -> Path:
    """All of it in float16, 4.5 GB, drawn on `device`; returns the folder."""
    save_model(random_sv3d(device, torch.float16), folder)
    return folder
