"""How well a model turns objects it never saw: generated orbits against the true renders."""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from sv3d_fast.camera import Orbit
from sv3d_fast.engine import to_uint8
from sv3d_fast.events import finish
from sv3d_fast.files import atomic_file
from sv3d_fast.generation import generating
from sv3d_fast.kernels.ssim import ssim
from sv3d_fast.model.config import SamplerConfig
from sv3d_fast.model.vae import SV3DVAE
from sv3d_fast.model.weights import SV3DModel
from sv3d_fast.scene.metrics import psnr

from .autoencoder import pictures
from .scenes import Stage, Views

ELEVATION = 10.0
MASK_THRESHOLD = 12  # of 255, from white: what counts as the object in a generated frame
PSNR_CEILING = 100.0  # dB, of frames that are equal: the input view of a round object, seen again
LABEL_HEIGHT = 14  # pixels above each row of a contact sheet


@dataclass(frozen=True)
class Score:
    """Means over all frames but the last, the input, of one object; PSNR in dB, all against the true renders."""

    name: str
    category: str
    psnr: float
    ssim: float
    iou: float
    input_psnr: float  # of showing the input picture in every frame


def generate(
    model: SV3DModel, images: torch.Tensor, orbits: Sequence[Orbit], config: SamplerConfig, seed: int
) -> torch.Tensor:
    """Input pictures (B, S, S, 3) uint8 to frames (B, T, S, S, 3) uint8, the last the input; one seed for all."""
    return finish(generating(model, pictures(images), orbits, config, [seed] * len(images), chunk=len(orbits[0])))


def mean_psnr(frames: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean over frames (T, H, W, 3) uint8 of the PSNR in dB, that of equal frames being PSNR_CEILING."""
    values = [psnr(frame.float() / 255, true.float() / 255) for frame, true in zip(frames, truth, strict=True)]
    return math.fsum(min(value, PSNR_CEILING) for value in values) / len(values)


@torch.no_grad()
def reconstruction_psnr(vae: SV3DVAE, views: Views) -> float:
    """Mean over pictures of the PSNR in dB of decode(encode(picture)), rounded to 8 bits as files are."""
    values = [mean_psnr(to_uint8(vae.decode(vae.encode(pictures(f)))), f.cpu()) for f in views.frames]
    return math.fsum(values) / len(values)


def evaluate(
    model: SV3DModel, stage: Stage, config: SamplerConfig, *, seed: int = 0, batch: int = 8
) -> Iterator[tuple[Score, Views, torch.Tensor]]:
    """Every object of the stage at input elevation 10 degrees: its score, the true views and the generated frames.

    batch: objects that are generated together; it changes memory and speed, not what is drawn for an object.
    """
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
                mean_psnr(fake, true),
                ssim(fake.float() / 255, true.float() / 255).mean().item(),
                iou.mean().item(),
                mean_psnr(truth[row, -1].expand_as(true), true),
            )
            single = Views(views.frames[row : row + 1], views.alpha[row : row + 1], [orbit])
            yield score, single, made[row]


def means(scores: Sequence[Score]) -> dict[str, float]:
    """Mean of every figure."""
    return {k: math.fsum(getattr(s, k) for s in scores) / len(scores) for k in ("psnr", "ssim", "iou", "input_psnr")}


def write_scores(scores: Sequence[Score], path: Path) -> None:
    """A CSV row per object."""
    with atomic_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("name", "category", "psnr", "ssim", "iou", "input_psnr"))
        for s in scores:
            figures = (f"{v:.4f}" for v in (s.psnr, s.ssim, s.iou, s.input_psnr))
            writer.writerow((s.name, s.category, *figures))


def contact_sheet(rows: Sequence[tuple[str, torch.Tensor, torch.Tensor]], every: int = 3) -> Image.Image:
    """Rows of (label, true frames, generated frames (T, S, S, 3) uint8): truth above, generated below.

    every: one frame in so many is shown, the last (the input) among them where it divides T.
    """
    _, _, size, _ = rows[0][1].shape
    shown = [*range(every - 1, len(rows[0][1]), every)]
    sheet = Image.new("RGB", (len(shown) * size, len(rows) * (2 * size + LABEL_HEIGHT)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (label, true, made) in enumerate(rows):
        top = y * (2 * size + LABEL_HEIGHT)
        draw.text((2, top), label, fill="black")
        for x, frame in enumerate(shown):
            for line, frames in enumerate((true, made)):
                picture = Image.fromarray(frames[frame].cpu().numpy())
                sheet.paste(picture, (x * size, top + LABEL_HEIGHT + line * size))
    return sheet
