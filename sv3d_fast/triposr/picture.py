"""Pictures as TripoSR was trained on them: the object centred on grey, filling most of a square."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sv3d_fast.image import ImageError, Subject

FOREGROUND_RATIO = 0.85
GREY = 0.5

Picture = Image.Image | Subject | np.ndarray | Tensor


def prepare(picture: Image.Image | Subject, foreground_ratio: float = FOREGROUND_RATIO) -> Image.Image:
    """An object with alpha -> a square RGB picture of it on grey, as the official script prepares it.

    picture: of mode RGBA, or a Subject. foreground_ratio: longer side of the box where alpha > 0 over the side of the
    square, in (0, 1]. As in the script, the box is without its last row and column, and levels are truncated.
    Raises ImageError for pictures with no object in them, ValueError for another mode or ratio.
    """
    if not 0 < foreground_ratio <= 1:
        raise ValueError(f"foreground_ratio: expected a share in (0, 1], got {foreground_ratio}")
    if isinstance(picture, Subject):
        picture = _with_alpha(picture)
    if picture.mode != "RGBA":
        raise ValueError(f"picture: expected mode RGBA, with the object cut out, got {picture.mode}")
    box = picture.getchannel("A").getbbox()
    if box is None:
        raise ImageError("picture: no object in it: all of it is transparent")
    width, height = box[2] - box[0] - 1, box[3] - box[1] - 1
    if min(width, height) < 1:
        raise ImageError(f"picture: expected an object of at least 2 x 2 pixels, got {width + 1} x {height + 1}")
    size = max(width, height)
    side = int(size / foreground_ratio)
    corner = [(side - size) // 2 + (size - length) // 2 for length in (width, height)]
    square = Image.new("RGBA", (side, side))
    square.paste(picture.crop((box[0], box[1], box[0] + width, box[1] + height)), (corner[0], corner[1]))
    return on_grey(square)


def on_grey(picture: Image.Image) -> Image.Image:
    """An RGBA picture laid on grey, as RGB; levels are truncated, as in the official script."""
    # in the script's type and order of operations, since what follows truncates
    rgba = np.asarray(picture).astype(np.float32) / 255.0
    color, alpha = rgba[..., :3], rgba[..., 3:]
    return Image.fromarray(((color * alpha + (1 - alpha) * GREY) * 255.0).astype(np.uint8))


def _with_alpha(subject: Subject) -> Image.Image:
    """A Subject as RGBA, with the white taken out of its edges."""
    alpha = subject.alpha[..., None]
    color = torch.where(alpha > 0, (subject.image - (1 - alpha)) / alpha.clamp(min=1e-6), 0.0).clamp(0, 1)
    return Image.fromarray((torch.cat([color, alpha], dim=2) * 255).round().to(torch.uint8).cpu().numpy())


def as_batch(pictures: Picture | Sequence[Picture], size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pictures -> (N, 3, size, size) in [0, 1], resized bilinearly with antialiasing.

    Each is a Subject or an RGBA PIL image, which are prepared, or one that is taken as it is: any other PIL image,
    an (H, W, 3) array or tensor of uint8, or of floats in [0, 1]; a (N, H, W, 3) one counts as N pictures.
    Raises ValueError for anything else.
    """
    if isinstance(pictures, Picture):
        pictures = list(pictures) if isinstance(pictures, np.ndarray | Tensor) and pictures.ndim == 4 else [pictures]
    if not len(pictures):
        raise ValueError("images: expected at least one picture, got none")
    batch = []
    for n, picture in enumerate(pictures):
        pixels = _pixels(picture, n).to(device).permute(2, 0, 1)[None]
        batch.append(F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=True))
    return torch.cat(batch).to(dtype)


def _pixels(picture: Picture, n: int) -> Tensor:
    """(H, W, 3) float32 in [0, 1]."""
    if isinstance(picture, Subject) or (isinstance(picture, Image.Image) and picture.mode == "RGBA"):
        picture = prepare(picture)
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert("RGB"))
    if not isinstance(picture, np.ndarray | Tensor) or (isinstance(picture, np.ndarray) and picture.dtype == object):
        raise ValueError(f"images: expected pictures (PIL, Subject, array or tensor), got {type(picture).__name__}")
    # a copy, since torch takes no arrays that can't be written or run backwards
    pixels = torch.from_numpy(picture.copy()) if isinstance(picture, np.ndarray) else picture
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"images: expected shape (H, W, 3), got {tuple(pixels.shape)} for picture {n}")
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not pixels.is_floating_point():
        raise ValueError(f"images: expected uint8 or floats in [0, 1], got {pixels.dtype} for picture {n}")
    return pixels.float()
