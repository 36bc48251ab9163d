"""Orbits on disk: orbit.mp4, orbit.gif, images/0000.png ..., transforms.json (nerfstudio's) and sparse/0 (COLMAP's)."""

import io
import json
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageSequence

from .camera import Orbit
from .colmap import find_model, read_colmap, write_colmap
from .files import atomic_file, atomic_folder, make_folder, natural_order, write_bytes, write_text
from .image import DECODE_ERRORS, ImageError, read_picture
from .orbit_cameras import read_transforms, transforms_of
from .video import MIN_FRAMES, OrbitVideo

FPS = 7
MAX_VIDEO_PIXELS = 500_000_000  # of all frames together: 1.5 GB decoded
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".bmp"}
ANIMATIONS = {".gif", ".webp", ".apng"}
# FFmpeg would read text as pictures of a terminal, and follow playlists to other files and hosts.
VIDEO_OPTIONS = {"format_whitelist": "mov,matroska,webm,avi,mpegts,ogg,flv,asf,mpeg", "protocol_whitelist": "file"}
BT709 = 1  # the number of the colour matrix, primaries and transfer curve in H.264 and FFmpeg alike


def save_orbit(video: OrbitVideo, folder: str | os.PathLike, fps: int = FPS) -> list[Path]:
    """Writes orbit.mp4, orbit.gif, images/, transforms.json and sparse/0 (and alpha/ where the masks are known).

    images/ holds the frames on white as RGB, alpha/ the masks as 8-bit grey; both lossless, so that `load_orbit` of
    the folder gives the same video back. Returns the paths, every one complete. Raises OutputError.
    """
    folder = make_folder(folder)
    frames = video.frames.cpu().numpy()
    with atomic_folder(folder / "images") as partial:
        for index, frame in enumerate(frames):
            (partial / f"{index:04d}.png").write_bytes(_png(frame))
    if video.alpha is not None:
        with atomic_folder(folder / "alpha") as partial:
            for index, mask in enumerate((video.alpha.cpu() * 255).round().to(torch.uint8).numpy()):
                (partial / f"{index:04d}.png").write_bytes(_png(mask))
    text = json.dumps(transforms_of(video.orbit, video.size, alpha=video.alpha is not None), indent=1)
    written = [folder / "images", write_text(folder / "transforms.json", text + "\n")]
    written.append(write_colmap(video.orbit, video.size, folder / "sparse"))
    return [*written, write_mp4(video, folder / "orbit.mp4", fps), write_gif(video, folder / "orbit.gif", fps)]


def write_mp4(video: OrbitVideo, path: str | os.PathLike, fps: int = FPS) -> Path:
    """H.264, yuv420p, BT.709, index in front: what browsers, phones and editors play.

    Odd sizes get one row and column of white, since 4:2:0 needs even ones. Raises OutputError.
    """
    frames = np.pad(video.frames.cpu().numpy(), [(0, 0), *[(0, video.size % 2)] * 2, (0, 0)], constant_values=255)
    with atomic_file(path) as partial, av.open(str(partial), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12", "preset": "slow"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = 1  # limited, as players expect
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace=BT709)
            picture.pts, picture.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return Path(path)


def write_gif(video: OrbitVideo, path: str | os.PathLike, fps: int = FPS) -> Path:
    """A GIF that loops for ever. Raises OutputError."""
    return write_bytes(path, gif_bytes(video, fps))


def gif_bytes(video: OrbitVideo, fps: int = FPS, size: int | None = None) -> bytes:
    """The orbit as a looping GIF with a palette per frame; `size` resizes it."""
    pictures = [Image.fromarray(frame) for frame in video.frames.cpu().numpy()]
    if size is not None:
        pictures = [p.resize((size, size), Image.Resampling.LANCZOS) for p in pictures]
    pictures = [_in_256_colors(p) for p in pictures]
    buffer = io.BytesIO()
    duration = round(100 / fps) * 10  # milliseconds; GIF counts in hundredths of a second
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return buffer.getvalue()


def brings_cameras(path: str | os.PathLike) -> bool:
    """Whether `load_orbit` takes the cameras from `path`: a transforms.json, a COLMAP text model, or a folder of one.

    Raises ValueError for half a COLMAP model.
    """
    path = Path(path)
    return path.suffix.lower() == ".json" or (path / "transforms.json").is_file() or find_model(path) is not None


def load_orbit(path: str | os.PathLike, *, elevation: float | None = None, orbit: Orbit | None = None) -> OrbitVideo:
    """Reads an orbit: a video, an animated GIF or WebP, a folder of pictures, a transforms.json or a COLMAP model.

    A transforms.json or its folder brings its cameras, any that fit an Orbit (see `orbit_cameras.read_transforms`);
    so does a COLMAP text model, its folder or its project (see `colmap.read_colmap`). The other kinds take `orbit`, or
    a turn in equal steps at `elevation` degrees (10, SV3D's default, without either) whose last frame is the input
    view. A folder's pictures are taken in natural order (2 before 10).
    Transparent pictures are laid on white; alpha is kept if all frames have some. Frames that are not square get
    white on their shorter sides, so `fov` is that of the longer one.
    Raises ValueError (one line) for missing, damaged or non-picture files, fewer than 4 frames, sizes that differ, more
    than 500 megapixels in all, paths that lead out of the folder, and cameras that no Orbit describes.
    """
    path = Path(path)
    if elevation is not None and orbit is not None:
        raise ValueError("elevation, orbit: expected one of them, got both")
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_dir() and (path / "transforms.json").is_file():
        path = path / "transforms.json"
    if brings_cameras(path) and (elevation is not None or orbit is not None):
        raise ValueError(f"elevation, orbit: expected neither beside {path}, which brings its own cameras")
    if path.suffix.lower() == ".json":
        files, masks, orbit = read_transforms(path)
        return _assemble(_read_pictures(files), path, None, orbit, _read_pictures(masks) if masks else None)
    model = find_model(path)
    if model is not None:
        files, size, orbit = read_colmap(model)
        pictures = _read_pictures(files)
        if pictures[0].size != size:
            raise ValueError(f"{files[0]}: expected {size} pixels as in cameras.txt, got {pictures[0].size}")
        return _assemble(pictures, path, None, orbit)
    if path.is_dir():
        files = sorted((f for f in path.iterdir() if f.suffix.lower() in PICTURES), key=lambda f: natural_order(f.name))
        pictures = _read_pictures(files)
    else:
        pictures = _read_animation(path) if path.suffix.lower() in ANIMATIONS else _read_video(path)
    return _assemble(pictures, path, elevation, orbit)


def _assemble(
    pictures: list[Image.Image],
    path: Path,
    elevation: float | None,
    orbit: Orbit | None,
    masks: list[Image.Image] | None = None,
) -> OrbitVideo:
    if len(pictures) < MIN_FRAMES:
        raise ValueError(f"{path}: expected at least {MIN_FRAMES} frames, got {len(pictures)}")
    sizes = {p.size for p in [*pictures, *(masks or [])]}
    if len(sizes) > 1:
        raise ValueError(f"{path}: expected frames of one size, got {sorted(sizes)[0]} and {sorted(sizes)[1]}")
    orbit = orbit or Orbit.static(10.0 if elevation is None else elevation, len(pictures))
    side = max(pictures[0].size)
    _check_pixels(len(pictures) * side**2, path)  # a thin strip becomes a large square
    where = ((side - pictures[0].width) // 2, (side - pictures[0].height) // 2)
    frames = np.full((len(pictures), side, side, 3), 255, np.uint8)
    alpha = np.zeros((len(pictures), side, side), np.uint8)
    for index, picture in enumerate(pictures):
        canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
        canvas.alpha_composite(picture.convert("RGBA"), where)
        frames[index] = np.asarray(canvas)[..., :3]
        cover = Image.new("L", (side, side))
        cover.paste(masks[index].convert("L") if masks else picture.convert("RGBA").getchannel("A"), where)
        alpha[index] = np.asarray(cover)
    known = masks is not None or all(p.mode == "RGBA" for p in pictures)
    return OrbitVideo(torch.from_numpy(frames), orbit, torch.from_numpy(alpha).float() / 255 if known else None)


def _read_pictures(files: list[Path]) -> list[Image.Image]:
    pictures, pixels = [], 0
    for file in files:
        pictures.append(read_picture(file))
        pixels += pictures[-1].width * pictures[-1].height
        _check_pixels(pixels, file)
    return pictures


def _read_animation(path: Path) -> list[Image.Image]:
    pictures, pixels = [], 0
    try:
        with Image.open(path, formats=("GIF", "WEBP", "PNG")) as image:
            for frame in ImageSequence.Iterator(image):
                pixels += frame.width * frame.height
                _check_pixels(pixels, path)
                pictures.append(read_picture(frame, str(path)))
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path}: expected a GIF, WebP or PNG animation, got something else") from error
    except DECODE_ERRORS as error:
        raise ValueError(f"{path}: the animation is damaged ({' '.join(str(error).split())[:200]})") from error
    return pictures


def _read_video(path: Path) -> list[Image.Image]:
    pictures, pixels = [], 0
    try:
        with av.open(str(path), options=VIDEO_OPTIONS) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: expected a video, got a file without pictures")
            for frame in container.decode(video=0):
                pixels += frame.width * frame.height
                _check_pixels(pixels, path)
                pictures.append(Image.fromarray(frame.to_ndarray(format="rgb24")))
            promised = container.streams.video[0].frames  # 0 where the container doesn't say
    except av.error.FFmpegError as error:
        raise ValueError(f"{path}: expected a video, a GIF or a transforms.json, got a file that can't be decoded "
                         f"({error.strerror})") from error  # fmt: skip
    if promised and len(pictures) < promised:
        raise ValueError(f"{path}: expected the {promised} frames its index names, got {len(pictures)} (cut off?)")
    return pictures


def _check_pixels(pixels: int, path: Path) -> None:
    if pixels > MAX_VIDEO_PIXELS:
        raise ImageError(f"{path}: expected at most {MAX_VIDEO_PIXELS // 10**6} megapixels in all frames together")


def _in_256_colors(picture: Image.Image) -> Image.Image:
    """With the palette of a sixteenth of the pixels: the median cut of all of them takes four times as long as the rest
    of the file, and looks the same."""
    few = picture.resize((-(-picture.width // 4), -(-picture.height // 4)), Image.Resampling.NEAREST)
    palette = few.quantize(256, Image.Quantize.MEDIANCUT)
    return picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)  # half the time of 4, a sixth more bytes
    return buffer.getvalue()
