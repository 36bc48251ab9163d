"""Any picture of an object becomes a Subject: the object centred on white, with its alpha.

The steps and their order are those of Stability AI's sampling script (generative-models,
scripts/sampling/simple_video_sample.py): transparency is trusted; otherwise the background goes; the object's box is
centred on a square, which is resized with Lanczos and laid on white.
"""

import contextlib
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage

from .matting import remove_background as remove_by_network

SIZE = 576
MAX_PIXELS = 100_000_000
WHITE = 240  # of 255, in every channel: what counts as background around an object on white (JPEG leaves noise)
BORDER_SHARE = 0.9  # of the border pixels that must be white for a picture to count as "on white"
SPECK = 0.002  # of the largest part's area: smaller parts of a picture on white are dust, not object
UNIFORM = 4  # of 255: a picture whose channels span less shows nothing
# EPS, PSD and other formats that run an interpreter or another program are left out on purpose.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "TGA", "ICO")
# What Pillow's decoders raise on damaged files, next to OSError and ValueError.
DECODE_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError, KeyError, TypeError, OverflowError,
    MemoryError, ZeroDivisionError, AttributeError, RuntimeError, Image.DecompressionBombError,
)  # fmt: skip


class ImageError(ValueError):
    """A picture that can't be used; the message is one line that names it and says why."""


@dataclass(frozen=True)
class Subject:
    """An object centred on a white square.

    image: (S, S, 3) float32 sRGB in [0, 1], composited on white, in steps of 1/255. alpha: (S, S) float32 in [0, 1].
    Raises ValueError for shapes that don't agree.
    """

    image: torch.Tensor
    alpha: torch.Tensor

    def __post_init__(self):
        i = self.image
        if i.dtype != torch.float32 or i.ndim != 3 or i.shape[2] != 3 or i.shape[0] != i.shape[1]:
            raise ValueError(f"image: expected float32 (S, S, 3), got {i.dtype} {tuple(i.shape)}")
        if self.alpha.dtype != torch.float32 or self.alpha.shape != i.shape[:2]:
            raise ValueError(
                f"alpha: expected float32 {tuple(i.shape[:2])}, got {self.alpha.dtype} {tuple(self.alpha.shape)}"
            )

    @property
    def size(self) -> int:
        """Side of the square in pixels."""
        return self.image.shape[0]

    def to_pil(self) -> Image.Image:
        """The picture on white as an RGB PIL image."""
        return Image.fromarray((self.image * 255).round().to(torch.uint8).cpu().numpy())


def load_subject(
    picture: str | os.PathLike | Image.Image,
    *,
    size: int = SIZE,
    foreground_ratio: float | None = None,
    remove_background: str = "auto",
    matting_model: str | os.PathLike | None = None,
) -> Subject:
    """Reads a picture (a path or a PIL image of any mode) and prepares it as SV3D expects.

    Where alpha comes from: transparency, if any pixel has some; else `matting_model` if given; else, where the border
    is near-white, everything near-white that the border reaches is background (white areas enclosed by the object
    stay object); else rembg. remove_background="never" leaves out the networks and takes a picture with a background
    as it is, to its edges.
    size: side of the result in pixels. foreground_ratio: longer side of the object's box over the side of the square,
    in (0, 1]; None keeps the object's scale, as the official script: the square's side is the picture's height.
    The first frame of animations is taken, EXIF rotation is applied, 16-bit channels are reduced to 8 bits.
    Raises ImageError for files that are missing, damaged, no picture or over 100 megapixels, and for pictures with
    no object in them (blank alpha, uniform colour); MattingError from rembg; ValueError for arguments out of range.
    """
    if not 8 <= size <= 4096:
        raise ValueError(f"size: expected pixels in [8, 4096], got {size}")
    if foreground_ratio is not None and not 0 < foreground_ratio <= 1:
        raise ValueError(f"foreground_ratio: expected a share in (0, 1], got {foreground_ratio}")
    image = cut_out(picture, size=size, remove_background=remove_background, matting_model=matting_model)
    image = _centre(image, _name(picture), foreground_ratio)
    # Pillow premultiplies RGBA itself before it filters, so hidden colours don't bleed into edges.
    rgba = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS)) / 255.0
    alpha = rgba[..., 3:]
    on_white = ((rgba[..., :3] * alpha + (1 - alpha)) * 255).astype(np.uint8)  # truncated: so does the script
    return Subject(torch.from_numpy(on_white).float() / 255, torch.from_numpy(alpha[..., 0]).float())


def cut_out(
    picture: str | os.PathLike | Image.Image,
    *,
    size: int = SIZE,
    remove_background: str = "auto",
    matting_model: str | os.PathLike | None = None,
) -> Image.Image:
    """A picture as 8-bit RGBA, its alpha from where `load_subject` says; raises what it raises.

    A picture without transparency is first shrunk to what a square of `size` pixels needs.
    """
    if remove_background not in ("auto", "never"):
        raise ValueError(f"remove_background: expected 'auto' or 'never', got {remove_background!r}")
    if remove_background == "never" and matting_model is not None:
        raise ValueError("matting_model: expected none with remove_background='never'")
    name = _name(picture)
    image = _decode(picture, name)
    if image.mode != "RGBA":
        image = _cut_out(image, name, size, remove_background == "auto", matting_model)
    return image


def read_picture(picture: str | os.PathLike | Image.Image, name: str | None = None) -> Image.Image:
    """Any picture as 8-bit RGB, or RGBA where a pixel is transparent, upright.

    name: what errors call it; its path if None. Raises ImageError.
    """
    return _decode(picture, name or _name(picture))


def _name(picture: str | os.PathLike | Image.Image) -> str:
    return "the picture" if isinstance(picture, Image.Image) else str(picture)


def _decode(picture, name: str) -> Image.Image:
    if not isinstance(picture, Image.Image):
        path = Path(picture)
        if not path.exists():
            raise ImageError(f"{name}: no such file")
        if not path.is_file():
            raise ImageError(f"{name}: expected a picture, got something that is not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's: about bombs, our own limit stands below; about bad metadata
            is_image = isinstance(picture, Image.Image)
            with contextlib.nullcontext(picture) if is_image else Image.open(picture, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(f"{name}: expected at most 100 megapixels, got {width} x {height}")
                return _to_8_bit(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a picture in a format that can be read (PNG, JPEG, WebP, TIFF, ...)") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: expected at most 100 megapixels, got many more") from error
    except DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: the picture is damaged or can't be read ({reason[:200]})") from error


def _to_8_bit(image: Image.Image) -> Image.Image:
    """RGBA if some pixel is transparent, else RGB; both of 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_scale_to_8_bit(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            return image
    return image.convert("RGB")


def _scale_to_8_bit(values: np.ndarray) -> np.ndarray:
    """Grey levels of 16 or 32 bits or floats -> uint8, by the smallest of 0..1, 0..255, 0..65535 that holds them."""
    if not np.isfinite(values).all():
        raise ValueError("its pixel values are not all finite")
    full = 65535.0 if values.dtype in (np.uint16, np.dtype(">u2")) else None
    if full is None:
        top = float(values.max())
        full = next((r for r in (1.0, 255.0, 65535.0) if top <= r and (r > 1 or values.dtype.kind == "f")), top)
    return (values.astype(np.float64) * (255.0 / full)).round().clip(0, 255).astype(np.uint8)


def _cut_out(image: Image.Image, name: str, size: int, use_network: bool, matting_model) -> Image.Image:
    # The script shrinks to 768 for a 576 result; larger results keep the same surplus.
    limit = max(768, size * 4 // 3)
    image.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    if int((pixels.max((0, 1)).astype(int) - pixels.min((0, 1))).max()) < UNIFORM:
        raise ImageError(f"{name}: no object in the picture: it has one uniform colour")
    if matting_model is None:
        alpha = _alpha_on_white(pixels)
        if alpha is None and not use_network:
            alpha = np.full(pixels.shape[:2], 255, np.uint8)
        if alpha is not None:
            return Image.fromarray(np.dstack([pixels, alpha]))
    return remove_by_network(image, matting_model)


def _alpha_on_white(pixels: np.ndarray) -> np.ndarray | None:
    """(H, W) uint8 alpha of an object on white, or None where the picture's border is not near-white."""
    white = np.all(pixels >= WHITE, axis=-1)
    border = np.concatenate([white[0], white[-1], white[1:-1, 0], white[1:-1, -1]])
    if border.mean() < BORDER_SHARE:
        return None
    regions, _ = ndimage.label(white)
    edge = np.unique(np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]]))
    parts, count = ndimage.label(~np.isin(regions, edge[edge > 0]), np.ones((3, 3)))
    areas = np.bincount(parts.ravel(), minlength=count + 1)
    areas[0] = 0
    kept = np.where(areas >= max(1, SPECK * areas.max()), 255, 0).astype(np.uint8)
    return kept[parts]


def _centre(image: Image.Image, name: str, ratio: float | None) -> Image.Image:
    """The box where alpha > 0, pasted onto the middle of a transparent square."""
    box = image.getchannel("A").getbbox()
    if box is None:
        raise ImageError(f"{name}: no object in the picture: all of it is transparent or background")
    w, h = box[2] - box[0], box[3] - box[1]
    # The script fails where the object is wider than the picture is high; there the square grows to hold it.
    side = max(image.height if ratio is None else int(max(w, h) / ratio), w, h)
    square = Image.new("RGBA", (side, side))
    square.paste(image.crop(box), (side // 2 - w // 2, side // 2 - h // 2))
    return square
