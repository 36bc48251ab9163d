"""A folder of SV3D's real shapes and random weights, which benches load as users load theirs."""

from pathlib import Path

import torch

from sv3d_fast.model.clip import CLIPImageTower
from sv3d_fast.model.config import ModelConfig
from sv3d_fast.model.unet import SV3DUNet
from sv3d_fast.model.vae import SV3DVAE
from sv3d_fast.model.weights import SV3DModel, save_model

from .engine import randomised


def write_random_sv3d(folder: Path, device: torch.device) -> Path:
    """SV3D_p in float16, 4.5 GB, drawn on `device`; returns the folder. Activations keep their size from layer to
    layer, so that a run of any length stays finite."""
    torch.manual_seed(0)
    config = ModelConfig()
    with torch.device("meta"):
        networks = SV3DUNet(config.unet), SV3DVAE(config.vae), CLIPImageTower(config.clip)
    unet, vae, tower = (randomised(network, device) for network in networks)
    save_model(SV3DModel(config, unet, vae, tower), folder)
    return folder
