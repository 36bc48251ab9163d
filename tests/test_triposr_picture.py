"""TripoSR's pictures, against the official script's steps written out pixel by pixel, and Pillow's resizing."""

import numpy as np
import pytest
import torch
from PIL import Image

from sv3d_fast.image import ImageError, Subject, load_subject
from sv3d_fast.triposr import prepare
from sv3d_fast.triposr.picture import as_batch


def cutout(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """Noise with alpha inside the box, of which the border is faint but there."""
    generator = np.random.default_rng(width)
    pixels = generator.integers(0, 256, (height, width, 4)).astype(np.uint8)
    x0, y0, x1, y1 = box
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    pixels[..., 3] = np.where(mask, np.maximum(pixels[..., 3], 1), 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("box", [(5, 7, 60, 30), (0, 0, 21, 44), (33, 2, 40, 9), (10, 10, 12, 12)])
@pytest.mark.parametrize("ratio", [0.85, 0.9, 1.0])
def test_prepared_pictures_pixel_by_pixel(box, ratio):
    x0, y0, x1, y1 = box
    picture = cutout(61, 45, box)
    source = np.asarray(picture).astype(np.float32) / 255
    width, height = x1 - x0 - 1, y1 - y0 - 1  # the script leaves out the last row and column
    size = max(width, height)
    side = int(size / ratio)
    left = (side - size) // 2 + (size - width) // 2
    top = (side - size) // 2 + (size - height) // 2
    prepared = np.asarray(prepare(picture, ratio))
    assert prepared.shape == (side, side, 3)
    for row in range(side):
        for column in range(side):
            y, x = row - top, column - left
            expected = np.full(3, 127.5)
            if 0 <= y < height and 0 <= x < width:
                *color, alpha = source[y0 + y, x0 + x].astype(float)
                expected = 255 * (np.array(color) * alpha + 0.5 * (1 - alpha))
            truncated = expected - prepared[row, column]
            assert truncated.min() > -1e-3
            assert truncated.max() < 1 + 1e-3


def test_a_subject_is_prepared_like_its_picture():
    """A disc with a soft edge, with and without the detour over white."""
    y, x = np.mgrid[:200, :200] + 0.5
    alpha = np.clip(60 - np.hypot(x - 110, y - 90), 0, 1)
    color = np.stack([x, y, 200 - x], -1)
    picture = Image.fromarray(np.dstack([color, alpha * 255]).round().astype(np.uint8))
    direct = as_batch([picture], 64, torch.device("cpu"), torch.float32)
    subject = load_subject(picture, size=400, foreground_ratio=0.7)
    detour = as_batch([subject], 64, torch.device("cpu"), torch.float32)
    difference = (direct - detour)[0].abs()
    assert float(difference.mean()) < 0.01
    row, column = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    away = (torch.hypot(row, column) - 0.85 * 32).abs() > 2  # from the edge, which is filtered twice
    assert float(difference[:, away].max()) < 0.02
    corner = direct[0, :, 0, 0]
    torch.testing.assert_close(corner, torch.full((3,), 127 / 255))
    torch.testing.assert_close(detour[0, :, 0, 0], corner)


def test_pictures_without_an_object():
    with pytest.raises(ImageError, match="no object"):
        prepare(Image.new("RGBA", (9, 9)))
    with pytest.raises(ImageError, match="2 x 2 pixels, got 5 x 1"):
        prepare(cutout(9, 9, (1, 3, 6, 4)))
    with pytest.raises(ImageError, match="no object"):
        prepare(Subject(torch.ones(8, 8, 3), torch.zeros(8, 8)))
    with pytest.raises(ValueError, match="expected mode RGBA, with the object cut out, got RGB"):
        prepare(Image.new("RGB", (9, 9)))
    for ratio in (0.0, 1.01, float("nan")):
        with pytest.raises(ValueError, match="foreground_ratio"):
            prepare(cutout(9, 9, (1, 1, 6, 6)), ratio)


def test_resizing_is_bilinear_with_antialiasing():
    generator = np.random.default_rng(0)
    for width, height in ((90, 71), (13, 20)):  # smaller and larger than the result
        pixels = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
        theirs = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)) / 255.0
        for picture in (
            Image.fromarray(pixels),
            pixels,
            torch.from_numpy(pixels),
            pixels / np.float32(255),
        ):
            ours = as_batch(picture, 32, torch.device("cpu"), torch.float32)
            assert ours.shape == (1, 3, 32, 32)
            assert np.abs(ours[0].permute(1, 2, 0).numpy() - theirs).max() < 1.5 / 255  # Pillow rounds to levels
        upside_down = as_batch(pixels[::-1], 32, torch.device("cpu"), torch.float32)  # strides that torch can't take
        torch.testing.assert_close(upside_down.flip(2), ours, atol=1e-6, rtol=0)
    batch = as_batch(torch.rand(3, 40, 30, 3), 32, torch.device("cpu"), torch.float64)
    assert batch.shape == (3, 3, 32, 32)
    assert batch.dtype == torch.float64
