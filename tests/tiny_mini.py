"""Training of the embedded model at its smallest: its networks, objects and steps."""

from dataclasses import replace

import torch
from tiny_sv3d import config

from sv3d_fast.mini import denoiser, optimise, train
from sv3d_fast.mini.denoiser import Denoiser, initialise
from sv3d_fast.mini.pack import procedural_object
from sv3d_fast.mini.scenes import Stage
from sv3d_fast.model.clip import CLIPImageTower
from sv3d_fast.model.config import CLIPConfig
from sv3d_fast.model.unet import SV3DUNet
from sv3d_fast.model.vae import SV3DVAE
from sv3d_fast.model.weights import SV3DModel

CPU = torch.device("cpu")
SIZE = 32
TINY = replace(config(), image_size=SIZE, frames=21, sampler=replace(config().sampler, steps=1, sigma_max=80.0))
TINY = replace(
    TINY,
    vae=replace(TINY.vae, scaling=1.0),
    clip=CLIPConfig(width=32, layers=1, heads=2, mlp_width=32, patch=8, image_size=SIZE, projection=32),
)


def take_small_steps(monkeypatch):
    monkeypatch.setattr(optimise, "AGREE_EVERY", 4)
    monkeypatch.setattr(denoiser, "CHUNK", 2)
    monkeypatch.setattr(train, "CHUNK", 2)
    monkeypatch.setattr("sv3d_fast.mini.autoencoder.POOL", 2)


def make_stage():
    return Stage([procedural_object(0, n) for n in range(3)], SIZE, CPU)


def make_vae():
    torch.manual_seed(0)
    return SV3DVAE(TINY.vae)


def make_denoiser():
    torch.manual_seed(0)
    network = Denoiser(SV3DUNet(TINY.unet), CLIPImageTower(TINY.clip))
    initialise(network.unet)
    return network


def make_model(seed):
    torch.manual_seed(seed)
    return SV3DModel(TINY, SV3DUNet(TINY.unet), SV3DVAE(TINY.vae), CLIPImageTower(TINY.clip))


def changed(module, before):
    return [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
