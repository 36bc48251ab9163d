"""How long SV3D takes at its real shapes on a GPU, on random weights: nobody has to own the official ones for that."""

import time

import torch
from torch import nn

from .conditioning import Conditioning
from .engine import decoding_frames, denoising
from .events import finish
from .model.config import ModelConfig
from .model.unet import SV3DUNet
from .model.vae import SV3DVAE

STEPS = 6  # the first two of which are for warmth
ROOM = 10 << 30  # bytes that have to be free
CHUNK = 7


@torch.no_grad()
def randomised(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A module made on "meta", on the device in eval mode, its layers scaled so that activations keep their size."""
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        elif name.endswith("weight"):
            parameter.fill_(1)
        else:
            parameter.normal_(0, 0.02)
    module.load_state_dict(module.state_dict())  # lays convolution weights out
    return module


def why_not_measured(device: torch.device) -> list[str]:
    """Reasons why a machine's time at full size isn't taken."""
    if device.type != "cuda":
        return ["needs a GPU"]
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return [] if free >= ROOM else [f"needs {ROOM >> 30} GiB, {free >> 30} are free"]


def measure_orbit(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of one guided step, the mean of some, and of the decoding of an orbit to frames in main memory.

    dtype: of the UNet; the autoencoder is float32, as `run` opens it.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        networks = SV3DUNet(config.unet), SV3DVAE(config.vae)
    unet = randomised(networks[0], device, dtype)
    vae = randomised(networks[1], device, torch.float32)
    assert isinstance(unet, SV3DUNet)
    assert isinstance(vae, SV3DVAE)
    side, z = config.image_size // config.vae.factor, config.vae.latent_channels
    given = Conditioning(
        torch.randn(1, 1, config.unet.context_dim, device=device).to(dtype),
        torch.randn(1, z, side, side, device=device).to(dtype),
        torch.randn(1, config.frames, config.unet.vector_dim, device=device),
    )
    noise, levels = torch.randn(1, config.frames, z, side, side), torch.linspace(8, 0, STEPS + 1)
    running = denoising(unet, given, noise, config.sampler, levels.tolist())
    for _ in range(2):
        next(running)
    _wait(device)
    began = time.perf_counter()
    latents = finish(running)
    _wait(device)
    step = (time.perf_counter() - began) / (STEPS - 2)
    decode = 0.0
    for _ in range(2):
        began = time.perf_counter()
        finish(decoding_frames([vae], latents.flatten(0, 1), chunk=CHUNK))
        decode = time.perf_counter() - began
    return step, decode


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
