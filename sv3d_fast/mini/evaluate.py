"""How well a model turns objects it never saw: generated orbits against the true renders."""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from sv3d_fast.camera import Orbit
from sv3d_fast.conditioning import condition
from sv3d_fast.engine import decoding, denoising, to_uint8
from sv3d_fast.events import finish
from sv3d_fast.kernels.ssim import ssim
from sv3d_fast.model.config import SamplerConfig
from sv3d_fast.model.weights import SV3DModel

from .scenes import Stage, Views

ELEVATION = 10.0
MASK_THRESHOLD = 12  # of 255, from white: what counts as the object in a generated frame


@dataclass(frozen=True)
class Score:
    """Means over frames 0..19 of one object; PSNR in dB, all against the true renders."""

    name: str
    category: str
    psnr: float
    ssim: float
    iou: float
    input_psnr: float  # of showing the input picture in every frame


def generate(
    model: SV3DModel, images: torch.Tensor, orbits: Sequence[Orbit], config: SamplerConfig, seed: int
) -> torch.Tensor:
    """Input pictures (B, S, S, 3) uint8 to frames (B, T, S, S, 3) uint8; each orbit draws from its own generator."""
    device = next(model.unet.parameters()).device
    inputs = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    z, side = model.config.vae.latent_channels, images.shape[1] // model.config.vae.factor
    draws = []
    for _ in images:
        generator = torch.Generator().manual_seed(seed)
        aug = torch.randn(inputs.shape[1:], generator=generator)
        draws.append((aug, torch.randn(len(orbits[0]), z, side, side, generator=generator)))
    aug, noise = (torch.stack(part).to(device) for part in zip(*draws, strict=True))
    given = condition(model, inputs.to(device), orbits, aug, config.cond_aug)
    latents = finish(denoising(model.unet, given, noise, config))
    pictures = finish(decoding(model.vae, latents.flatten(0, 1), chunk=len(orbits[0])))
    return to_uint8(pictures).view(*noise.shape[:2], *images.shape[1:])


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of uint8 pictures (..., H, W, 3), one number each."""
    mse = (a.float() - b.float()).square().mean((-1, -2, -3)) / 255**2
    return -10 * torch.log10(mse.clamp_min(1e-10))


def evaluate(
    model: SV3DModel, stage: Stage, config: SamplerConfig, *, seed: int = 0, batch: int = 8
) -> Iterator[tuple[Score, Views, torch.Tensor]]:
    """Every object of the stage at input elevation 10 degrees: its score, the true views and the generated frames."""
    orbit = Orbit.static(ELEVATION)
    for start in range(0, len(stage.objects), batch):
        chosen = list(range(start, min(start + batch, len(stage.objects))))
        views = stage.standard(chosen, orbit)
        truth, alpha = views.frames.cpu(), views.alpha.cpu()
        made = generate(model, truth[:, -1], [orbit] * len(chosen), config, seed)
        for row, index in enumerate(chosen):
            true, fake = truth[row, :-1], made[row, :-1]
            mask = fake.min(-1).values < 255 - MASK_THRESHOLD
            solid = alpha[row, :-1] >= 128
            iou = (mask & solid).sum((1, 2)) / (mask | solid).sum((1, 2)).clamp_min(1)
            score = Score(
                stage.objects[index].name,
                stage.objects[index].category,
                psnr(fake, true).mean().item(),
                ssim(fake.float() / 255, true.float() / 255).mean().item(),
                iou.mean().item(),
                psnr(truth[row, -1].expand_as(true), true).mean().item(),
            )
            single = Views(views.frames[row : row + 1], views.alpha[row : row + 1], [orbit])
            yield score, single, made[row]


def means(scores: Sequence[Score]) -> dict[str, float]:
    """Mean of every figure."""
    return {k: math.fsum(getattr(s, k) for s in scores) / len(scores) for k in ("psnr", "ssim", "iou", "input_psnr")}


def write_scores(scores: Sequence[Score], path: Path) -> None:
    """A CSV row per object."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("name", "category", "psnr", "ssim", "iou", "input_psnr"))
        for s in scores:
            figures = (f"{v:.4f}" for v in (s.psnr, s.ssim, s.iou, s.input_psnr))
            writer.writerow((s.name, s.category, *figures))


def contact_sheet(rows: Sequence[tuple[str, torch.Tensor, torch.Tensor]], every: int = 3) -> Image.Image:
    """Rows of (label, true frames, generated frames): truth above, generated below, every third frame."""
    _, _, size, _ = rows[0][1].shape
    shown = [*range(every - 1, len(rows[0][1]), every)]
    sheet = Image.new("RGB", (len(shown) * size, len(rows) * (2 * size + 14)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (label, true, made) in enumerate(rows):
        top = y * (2 * size + 14)
        draw.text((2, top), label, fill="black")
        for x, frame in enumerate(shown):
            for line, frames in enumerate((true, made)):
                picture = Image.fromarray(frames[frame].cpu().numpy())
                sheet.paste(picture, (x * size, top + 14 + line * size))
    return sheet
