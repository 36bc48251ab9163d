"""Pictures as they come: every mode, every kind of damage, and the official script's framing."""

import contextlib
import io
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sv3d_fast.image import ImageError, Subject, load_subject, read_picture
from sv3d_fast.matting import MattingError


def cutout(width=60, height=40, box=(10, 5, 30, 35)) -> Image.Image:
    """An RGBA picture with an object of smooth colours in `box` (left, top, right, bottom)."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 4, y * 6, 255 - x * 4, 0 * x], -1).clip(0, 255).astype(np.uint8)
    pixels[box[1] : box[3], box[0] : box[2], 3] = 255
    return Image.fromarray(pixels)


def on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def photo() -> Image.Image:
    """No white, no transparency: something that needs its background removed."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 200, (48, 64, 3), dtype=np.uint8))


def official(image: Image.Image, size: int, ratio: float | None) -> np.ndarray:
    """Framing as facts about the official script describe it, written anew on arrays; (S, S, 3) uint8."""
    pixels = np.array(image)
    rows, columns = np.nonzero(pixels[..., 3].any(1))[0], np.nonzero(pixels[..., 3].any(0))[0]
    crop = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    h, w = crop.shape[:2]
    side = int(max(w, h) / ratio) if ratio is not None else pixels.shape[0]
    square = np.zeros((side, side, 4), np.uint8)
    top, left = side // 2 - h // 2, side // 2 - w // 2
    square[top : top + h, left : left + w] = crop
    scaled = np.array(Image.fromarray(square).resize((size, size), Image.LANCZOS)) / 255.0
    return ((scaled[..., :3] * scaled[..., 3:] + (1 - scaled[..., 3:])) * 255).astype(np.uint8)


@pytest.mark.parametrize("ratio", [None, 0.9, 1.0, 0.5])
@pytest.mark.parametrize("box", [(10, 5, 30, 35), (0, 0, 13, 40), (59, 39, 60, 40)])
def test_frames_rgba_as_the_official_script(ratio, box):
    image = cutout(box=box)
    subject = load_subject(image, size=72, foreground_ratio=ratio)
    levels = subject.image * 255
    assert torch.equal(levels.round(), levels)
    np.testing.assert_array_equal(levels.numpy().astype(np.uint8), official(image, 72, ratio))
    assert subject.alpha.max() > 0.8


def test_wide_objects_get_a_square_that_holds_them():
    subject = load_subject(cutout(60, 20, (0, 5, 60, 15)), size=60)
    assert (subject.alpha > 0.5).sum() == 60 * 10


def test_white_subject_is_white_outside():
    subject = load_subject(cutout(), size=64, foreground_ratio=0.5)
    assert (subject.image[subject.alpha == 0] == 1).all()
    assert subject.image.shape == (64, 64, 3)
    assert subject.to_pil().size == (64, 64)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I"])
def test_every_mode_shows_the_same_object(mode):
    from PIL import ImageCms

    image = on_white(cutout())
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    elif mode in ("LA", "PA", "RGBA", "RGBa"):
        image = cutout().convert({"PA": "P", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)
        if mode == "PA":
            image.putalpha(cutout().getchannel("A"))
    elif mode == "I":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.int32) * 257)
    else:
        image = image.convert(mode)
    subject = load_subject(image, size=40, foreground_ratio=1.0)
    expected = load_subject(cutout(), size=40, foreground_ratio=1.0)
    assert ((subject.alpha > 0.5) == (expected.alpha > 0.5)).float().mean() > (0.7 if mode == "1" else 0.97)


def test_sixteen_bits_and_floats_keep_their_levels(tmp_path):
    ramp = np.linspace(0, 1, 200).reshape(10, 20)
    variants = {
        "l16.png": Image.fromarray((ramp * 65535).astype(np.uint16)),
        "f01.tiff": Image.fromarray(ramp.astype(np.float32)),
        "f255.tiff": Image.fromarray((ramp * 255).astype(np.float32)),
        "i32.tiff": Image.fromarray((ramp * 65535).astype(np.int32)),
    }
    for name, image in variants.items():
        image.save(tmp_path / name)
        grey = np.asarray(read_picture(tmp_path / name).convert("L")).astype(int)
        assert np.abs(grey - ramp * 255).max() <= 1.01, name
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    with pytest.raises(ImageError, match="finite"):
        load_subject(tmp_path / "nan.tiff")


def test_palette_transparency_and_exif(tmp_path):
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([0, 0, 0, 250, 10, 10])
    palette.paste(1, (5, 5, 10, 18))
    palette.save(tmp_path / "p.png", transparency=0)
    subject = load_subject(tmp_path / "p.png", size=13, foreground_ratio=1.0)
    assert (subject.alpha > 0.5).sum() == 5 * 13
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    on_white(cutout()).save(tmp_path / "turned.png", exif=exif)
    upright = read_picture(tmp_path / "turned.png")
    assert upright.size == (40, 60)
    np.testing.assert_array_equal(np.asarray(upright), np.rot90(np.asarray(on_white(cutout())), -1))


def test_white_background_goes_and_enclosed_white_stays():
    pixels = np.full((50, 50, 3), 250, np.uint8)
    pixels[10:40, 10:40] = (200, 30, 30)
    pixels[20:30, 20:30] = 255  # enclosed
    pixels[3, 3] = 0  # a speck of dust that must not stretch the box
    subject = load_subject(Image.fromarray(pixels), size=50, foreground_ratio=1.0)
    assert (subject.alpha == 1).all()
    assert subject.image[25, 25].tolist() == [1, 1, 1]


def test_opaque_rgba_counts_as_rgb():
    image = on_white(cutout()).convert("RGBA")
    expected = load_subject(on_white(cutout()), size=40)
    subject = load_subject(image, size=40)
    assert torch.equal(subject.image, expected.image)
    assert subject.alpha.min() == 0


def test_jpeg_on_white_finds_the_box(tmp_path):
    image = cutout(300, 200, (50, 40, 150, 170))
    on_white(image).save(tmp_path / "a.jpg", quality=80)
    alpha = load_subject(tmp_path / "a.jpg", size=200).alpha
    expected = load_subject(image, size=200).alpha
    assert ((alpha > 0.5) == (expected > 0.5)).float().mean() > 0.97


def test_the_bundled_photo_is_cut_out():
    subject = load_subject(Path(__file__).parents[1] / "examples" / "photo_cup.png", size=128, foreground_ratio=0.9)
    assert 0.4 < subject.alpha.mean() < 0.7
    assert subject.alpha[0].max() == 0
    red, _, blue = subject.image[subject.alpha > 0.9].mean(0)
    assert red > 2 * blue


@pytest.mark.parametrize("size", [(1, 2), (2, 1), (3, 3)])
def test_tiny_pictures(size):
    image = Image.new("RGBA", size)
    image.putpixel((0, 0), (10, 200, 30, 255))
    subject = load_subject(image, size=16, foreground_ratio=1.0)
    assert (subject.alpha == 1).all()
    assert (subject.image[8, 8] * 255).round().tolist() == [10, 200, 30]


def test_large_pictures_are_reduced():
    image = on_white(cutout().resize((6000, 4000), Image.Resampling.NEAREST))
    small = load_subject(on_white(cutout()), size=64)
    assert (load_subject(image, size=64).alpha - small.alpha).abs().mean() < 0.02


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGBA", (20, 20), (255, 0, 0, 0)),
        Image.new("RGB", (20, 20), (90, 90, 90)),
        Image.new("RGB", (20, 20), "white"),
        Image.new("RGBA", (1, 1), (1, 2, 3, 255)),
        Image.new("L", (1, 1)),
        Image.new("RGB", (30, 30), (251, 250, 252)),
    ],
)
@pytest.mark.parametrize("choice", ["auto", "never"])
def test_no_object(image, choice):
    with pytest.raises(ImageError, match="no object in the picture"):
        load_subject(image, remove_background=choice)


def test_bad_files(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    photo().save(buffer, "PNG")
    png = buffer.getvalue()
    (tmp_path / "cut.png").write_bytes(png[: len(png) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name, side in (("bomb.png", 40_000), ("large.png", 10_001)):
        header = b"IHDR" + side.to_bytes(4, "big") * 2 + png[24:29]
        (tmp_path / name).write_bytes(png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:])
    cases = {"cut.png": "damaged", "text.png": "not a picture", "empty.png": "not a picture"}
    cases |= {"eps.png": "not a picture", "none.png": "no such file", ".": "not a file"}
    cases |= {"bomb.png": "at most 100 megapixels", "large.png": "at most 100 megapixels, got 10001 x 10001"}
    for name, message in cases.items():
        with pytest.raises(ImageError, match=message) as error:
            load_subject(tmp_path / name)
        assert "\n" not in str(error.value)
    monkeypatch.setattr("sv3d_fast.image.MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(ImageError, match="megapixels, got 64 x 48"):
        load_subject(photo())


def test_random_damage_never_escapes(tmp_path):
    random = np.random.default_rng(1)
    for suffix in ("png", "jpg", "gif", "webp", "tiff", "bmp"):
        buffer = io.BytesIO()
        on_white(cutout()).save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
        for _ in range(40):
            data = bytearray(buffer.getvalue())
            for at in random.integers(0, len(data), 6):
                data[at] = random.integers(256)
            (tmp_path / f"x.{suffix}").write_bytes(data[: random.integers(1, len(data) + 1)])
            with contextlib.suppress(ImageError):  # nothing else may come out
                load_subject(tmp_path / f"x.{suffix}", size=16, remove_background="never")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size"),
        ({"foreground_ratio": 0.0}, "foreground_ratio"),
        ({"foreground_ratio": 1.1}, "foreground_ratio"),
        ({"remove_background": "always"}, "remove_background"),
        ({"remove_background": "never", "matting_model": "x.onnx"}, "matting_model"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        load_subject(cutout(), **options)


def test_subject_checks_its_shapes():
    with pytest.raises(ValueError, match="image"):
        Subject(torch.zeros(4, 5, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="alpha"):
        Subject(torch.zeros(4, 4, 3), torch.zeros(4, 5))


def test_photo_without_rembg_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(MattingError, match=r"pip install 'sv3d-fast\[matting\]'"):
        load_subject(photo())
    whole = load_subject(photo(), size=64, remove_background="never")
    assert (whole.alpha > 0).sum() == 64 * 64 * 64 * 48 // 64**2


def test_matting_model_must_be_a_file(tmp_path):
    with pytest.raises(MattingError, match=r"matting_model: .*none\.onnx"):
        load_subject(photo(), matting_model=tmp_path / "none.onnx")


def test_rembg_cuts_out_with_the_network_and_reports_its_failures(monkeypatch):
    seen = []

    def remove(image, session, alpha_matting, post_process_mask):
        seen.append((image.size, session, alpha_matting))
        pixels = np.dstack([np.asarray(image), np.zeros(image.size[::-1], np.uint8)])
        pixels[4:40, 8:20, 3] = 255
        pixels[0, 0, 3] = 3  # the noise of a network
        return Image.fromarray(pixels)

    fake = types.SimpleNamespace(remove=remove, new_session=lambda name: name)
    monkeypatch.setitem(sys.modules, "rembg", fake)
    monkeypatch.setattr("sv3d_fast.matting._session", lambda model: fake.new_session("isnet"))
    subject = load_subject(photo(), size=36, foreground_ratio=1.0)
    assert seen == [((64, 48), "isnet", True)]
    assert (subject.alpha > 0.5).sum() == 12 * 36

    def broken(*args, **kwargs):
        raise RuntimeError("no\nnetwork")

    fake.remove = broken
    with pytest.raises(MattingError, match=r"could not be removed: no network; give matting_model"):
        load_subject(photo())
