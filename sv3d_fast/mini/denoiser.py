"""Training of the embedded model's UNet and image tower on cached latents of fresh renders.

The sampler's first step is trained through the decoder as well, on the figures that its frames are judged by: the
mean of all likely latents doesn't decode to the mean of all likely pictures.
"""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
from torch import nn

from sv3d_fast.conditioning import vector
from sv3d_fast.model.attention import VideoTransformer
from sv3d_fast.model.blocks import ResBlock
from sv3d_fast.model.clip import CLIPImageTower, preprocess
from sv3d_fast.model.unet import SV3DUNet
from sv3d_fast.model.vae import SV3DVAE, Decoder

from .autoencoder import pictures
from .optimise import Average, optimise
from .parallel import Workers
from .picture_loss import picture_loss, picture_terms
from .scenes import Stage

# The sampler takes few steps and the first decides where everything is, so most orbits are seen at its level, where
# only the picture tells anything; the others' levels are log-normal (Karras et al. 2022, table 1).
FIRST_STEP_SHARE = 0.9
FIRST_STEP_SIGMA = (40.0, 80.0)
LATENT_WEIGHT = 0.3  # of the latents' loss where the decoded frames have one too
DECODED = 3  # frames of each orbit that are decoded
LOG_SIGMA_MEAN, LOG_SIGMA_STD = 0.5, 1.4
DROP = 0.05  # share of orbits whose picture is withheld, for guidance
COND_AUG = 1e-5
PEAK_RATE = 8e-4
PEAK_RATE_ON = 4e-4  # of weights that were trained before
CHUNK = 16  # orbits rendered and encoded together
FILL = 1024  # orbits in the cache before the first step
SAVE_EVERY = 1000  # steps
SEEN = 8  # times that an orbit is trained on, about, before it makes room


class Cache:
    """Encoded orbits on the device; the oldest make room for new ones.

    Holds N = `capacity` orbits: latents (N, T, z, h, w) float16, the frames with their alpha (N, T, S, S, 4) uint8
    and the vectors (N, T, vector_dim) float32. Raises ValueError for a capacity that isn't a multiple of CHUNK.
    """

    def __init__(self, stage: Stage, vae: SV3DVAE, rng: np.random.Generator, capacity: int, unet: SV3DUNet):
        if capacity < 1 or capacity % CHUNK:
            raise ValueError(f"capacity: expected a positive multiple of {CHUNK}, got {capacity}")
        self.stage, self.vae, self.rng, self.capacity, self.config = stage, vae, rng, capacity, unet.config
        self.count = self.next = 0
        self.stores: list[torch.Tensor] = []  # latents, frames, vectors

    @torch.no_grad()
    def add(self) -> None:
        """Renders and encodes CHUNK orbits."""
        views = self.stage.random(CHUNK, self.rng)
        with torch.autocast(self.stage.device.type, torch.bfloat16, enabled=self.stage.device.type == "cuda"):
            latents = self.vae.encode(pictures(views.frames))
        latents = latents.view(*views.frames.shape[:2], *latents.shape[1:])
        frames = torch.cat([views.frames, views.alpha[..., None]], -1)
        rows = (latents.half(), frames, vector(self.config, views.orbits, COND_AUG).to(latents.device))
        if not self.stores:
            self.stores = [torch.empty((self.capacity, *r.shape[1:]), dtype=r.dtype, device=r.device) for r in rows]
        place = slice(self.next, self.next + CHUNK)
        for store, row in zip(self.stores, rows, strict=True):
            store[place] = row
        self.count = min(self.count + CHUNK, self.capacity)
        self.next = (self.next + CHUNK) % self.capacity

    @property
    def frames(self) -> int:
        """T, of every orbit."""
        return self.stores[0].shape[1]

    def batch(self, size: int, shown: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`size` random orbits: latents float32, input pictures in [-1, 1], vectors, and the frames of index `shown`.

        shown: (K,) indices on the device. Those frames are (size, K, S, S, 4) uint8, alpha last.
        """
        index = torch.from_numpy(self.rng.integers(self.count, size=size)).to(self.stage.device, non_blocking=True)
        latents, frames, vectors = self.stores
        inputs = pictures(frames[index, -1, :, :, :3])
        return latents[index].float(), inputs, vectors[index], frames[index[:, None], shown]


def noise_levels(batch: int, generator: torch.Generator) -> torch.Tensor:
    """(batch,) float32 logarithms of random noise levels, on the generator's device."""
    normal, uniform, chance = (
        make(batch, generator=generator, device=generator.device) for make in (torch.randn, torch.rand, torch.rand)
    )
    low, high = map(math.log, FIRST_STEP_SIGMA)
    return torch.where(chance < FIRST_STEP_SHARE, low + (high - low) * uniform, LOG_SIGMA_MEAN + LOG_SIGMA_STD * normal)


@torch.no_grad()
def initialise(unet: SV3DUNet) -> None:
    """Makes every residual branch start as zero, as the official network was initialised: training starts smooth."""
    for name, parameter in unet.named_parameters():
        if name.rsplit(".", 1)[0].endswith(("_res_block.conv2", ".proj_out")) or name.startswith("conv_out."):
            parameter.zero_()


class Denoiser(nn.Module):
    """UNet and image tower under EDM preconditioning with v-prediction."""

    def __init__(self, unet: SV3DUNet, tower: CLIPImageTower):
        super().__init__()
        self.unet, self.tower = unet, tower

    def forward(self, clean, image, vectors, log_sigma, noise, keep) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error of the network's output against its target (B,), and the clean latents it stands for.

        clean, noise: (B, T, z, h, w). image: (B, 3, S, S) preprocessed. log_sigma: (B,). keep: (B,) 0 or 1.
        """
        sigma = log_sigma.exp()[:, None, None, None, None]
        norm = (sigma.square() + 1).sqrt()
        noisy = clean + sigma * noise
        token = self.tower(image)[:, None] * keep[:, None, None]
        first = (clean[:, -1] * keep[:, None, None, None])[:, None].expand_as(clean)
        output = self.unet(torch.cat([noisy / norm, first], 2), log_sigma / 4, token, vectors).float()
        target = (noisy / norm - norm * clean) / sigma  # of F in D = c_skip x + c_out F, c_out = -sigma / norm
        return (output - target).square().mean((1, 2, 3, 4)), noisy / norm.square() - output * (sigma / norm)


class Objective(nn.Module):
    """What a batch of orbits costs: the denoiser's error and, at the sampler's first step, that of decoded frames.

    The denoiser's float32 weights are used in `dtype`, the decoder is a frozen copy in it: in bfloat16 activations
    cross memory once, where autocast carries normalisations' in float32.
    """

    def __init__(self, denoiser: Denoiser, vae: SV3DVAE, dtype: torch.dtype):
        super().__init__()
        self.denoiser, self.dtype = denoiser, dtype
        self.vae = copy.deepcopy(vae).requires_grad_(False).to(dtype)
        self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    def forward(self, clean, image, vectors, log_sigma, noise, keep, shown, true) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and figures (5,) of it: all latents, and of first steps latents, PSNR in dB, SSIM and IoU.

        As for Denoiser; shown: (K,) frames that are decoded, true: (B, K, S, S, 4) uint8 what they are.
        """
        weights = {name: p.to(self.dtype) for name, p in self.denoiser.named_parameters()}
        arguments = (clean, image.to(self.dtype), vectors, log_sigma, noise, keep)
        losses, latents = torch.func.functional_call(self.denoiser, weights, arguments)
        decoded = self.vae.decode(latents.index_select(1, shown).flatten(0, 1).to(self.dtype)).float()
        made = (decoded.permute(0, 2, 3, 1) + 1) / 2
        frames = true.flatten(0, 1).float() / 255
        terms = picture_terms(made.contiguous(), frames[..., :3].contiguous(), frames[..., 3])
        first = ((log_sigma >= math.log(FIRST_STEP_SIGMA[0])) & (keep > 0)).float()
        share = first / first.sum().clamp_min(1)
        by_orbit = picture_loss(terms).view(len(clean), -1).mean(1)
        loss = (losses * (1 - first * (1 - LATENT_WEIGHT)) + first * by_orbit).mean()
        error, ssim, iou = (terms.view(3, len(clean), -1).mean(2) * share).sum(1)
        figures = [losses.mean(), (losses * share).sum(), error * (-10 / math.log(10)), 1 - ssim, 1 - iou]
        return loss, torch.stack(figures).detach()


def graphed(objective: Objective, example: tuple[torch.Tensor, ...]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The objective's forward and backward pass as CUDA graphs, for inputs shaped like `example`.

    Launching the kernels of this network one by one takes nearly twice as long as running them, and most of them only
    move memory: the blocks are compiled, each kind and shape once, which costs less than compiling the whole.
    """
    torch._dynamo.config.recompile_limit = 32  # of ResBlock, one for each pair of widths
    for module in objective.modules():
        if isinstance(module, (ResBlock, VideoTransformer, Decoder)):
            module.compile(dynamic=False)
    return torch.cuda.make_graphed_callables(objective, example, allow_unused_input=True)  # type: ignore[return-value]


def train_denoiser(
    denoiser: Denoiser,
    vae: SV3DVAE,
    stage: Stage,
    workers: Workers,
    *,
    minutes: float,
    peak: float,
    batch: int,
    capacity: int,
    log: Path,
    seed: int,
    cooldown: bool,
    save: Callable[[Denoiser], None],
) -> Denoiser:
    """Trains on `batch` orbits a step and process; returns the averaged weights.

    minutes: of wall clock, what filling the cache and compiling take among them; a tenth at least is trained.
    vae: frozen, its latents normalised. capacity: orbits of the cache, filled up to FILL before the first step.
    seed: of the scenes and the noise; each process has its own stream of both. save: gets the averaged weights every
    SAVE_EVERY steps, so that a run that is cut off leaves something.
    """
    began = time.monotonic()
    rng = np.random.default_rng([seed, workers.rank])
    generator = torch.Generator(stage.device).manual_seed(int(rng.integers(2**62)))
    cache = Cache(stage, vae, rng, capacity, denoiser.unet)
    while cache.count < min(capacity, FILL):
        cache.add()
    size = denoiser.tower.config.image_size
    cuda = stage.device.type == "cuda"

    def draw() -> tuple[torch.Tensor, ...]:
        shown = torch.randint(cache.frames, (DECODED,), generator=generator, device=stage.device)
        clean, image, vectors, true = cache.batch(batch, shown)
        log_sigma = noise_levels(batch, generator)
        noise = torch.randn(clean.shape, generator=generator, device=stage.device)
        keep = (torch.rand(batch, generator=generator, device=stage.device) >= DROP).float()
        return clean, preprocess(image, size), vectors, log_sigma, noise, keep, shown, true

    objective = Objective(denoiser, vae, torch.bfloat16 if cuda else torch.float32)
    forward = graphed(objective, draw()) if cuda else objective

    def loss_of(step: int):
        loss, figures = forward(*draw())
        return loss, dict(zip(("latents", "first", "psnr", "ssim", "iou"), figures, strict=True))

    average, refresh = Average(denoiser), max(1, SEEN * CHUNK // batch)

    def between(step: int) -> None:
        if step % refresh == 0:
            cache.add()
        if step % SAVE_EVERY == SAVE_EVERY - 1:
            save(average.module)

    left = max(minutes / 10, minutes - (time.monotonic() - began) / 60)
    optimise(
        denoiser, average, loss_of, workers=workers, minutes=left, peak=peak, log=log,
        between=between, cooldown=cooldown,
    )  # fmt: skip
    return average.module
