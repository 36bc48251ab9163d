"""Training of the embedded model's VAE on fresh renders."""

from pathlib import Path

import numpy as np
import torch

from sv3d_fast.camera import FRAMES
from sv3d_fast.model.vae import SV3DVAE

from .optimise import Average, optimise
from .parallel import Workers
from .scenes import Stage, Views

KL_WEIGHT = 1e-8  # keeps the latents bounded, no more: 1e-6 cost 5 dB (docs/mini.md)
POOL = 24  # orbits that are rendered together; each serves REUSE batches
REUSE = 4
PEAK_RATE = 1.2e-3
PEAK_RATE_DECODER = 3e-4  # of a trained decoder that goes on alone


def pictures(frames: torch.Tensor) -> torch.Tensor:
    """(..., S, S, 3) uint8 to (N, 3, S, S) float32 in [-1, 1]."""
    flat = frames.reshape(-1, *frames.shape[-3:])
    return (flat.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train_autoencoder(
    vae: SV3DVAE,
    stage: Stage,
    workers: Workers,
    *,
    minutes: float,
    batch: int,
    log: Path,
    seed: int,
    decoder_only: bool = False,
) -> SV3DVAE:
    """Minimises L2 + L1 / 10 + a slight KL on `batch` pictures a step and process; returns the averaged weights.

    seed: of the scenes and the posteriors' noise; each process has its own stream of both. decoder_only: leaves the
    encoder, and so the latents that a UNet was trained on, as they are.
    """
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    rng = np.random.default_rng([seed, workers.rank])
    generator = torch.Generator(stage.device).manual_seed(int(rng.integers(2**62)))
    pool: list[torch.Tensor] = []
    per_pool = max(1, POOL * FRAMES // batch) * REUSE

    def loss_of(step: int):
        if step % per_pool == 0:
            pool[:] = [stage.random(POOL, rng).frames.flatten(0, 1)]
        index = torch.from_numpy(rng.integers(len(pool[0]), size=batch)).to(stage.device)
        image = pictures(pool[0][index])
        with torch.autocast(stage.device.type, torch.bfloat16, enabled=stage.device.type == "cuda"):
            mean, logvar = vae.moments(image)
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
            sample = mean + noise * (0.5 * logvar).exp()
            out = vae.decode(sample).float()
        mean, logvar = mean.float(), logvar.float()
        error = out - image
        mse = error.square().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        loss = mse + 0.1 * error.abs().mean() + KL_WEIGHT * kl
        return loss, {"psnr": 10 * torch.log10(4 / mse.detach()), "kl": kl.detach()}

    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    average = Average(vae)
    peak = PEAK_RATE_DECODER if decoder_only else PEAK_RATE
    optimise(vae, average, loss_of, workers=workers, minutes=minutes, peak=peak, log=log)
    return average.module


@torch.no_grad()
def normalise_latents(vae: SV3DVAE, views: Views) -> None:
    """Makes the latents of `views` have mean 0 and variance 1 in each channel, in place.

    The shift and the scale go into quant_conv and back out of the decoder's conv_in, so reconstructions stay what
    they were but for the border of conv_in, whose zero padding stands for the mean latent afterwards.
    """
    latents = torch.cat([vae.encode(pictures(f)) for f in views.frames]).float()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = vae.config.latent_channels
    quant, conv = vae.quant_conv, vae.decoder.conv_in
    assert quant.bias is not None
    assert conv.bias is not None
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    conv.bias += (conv.weight * mean[None, :, None, None]).sum((1, 2, 3))
    conv.weight *= std[None, :, None, None]
