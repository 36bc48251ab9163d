"""preview.png: the input, eight frames of the orbit and eight renders of the mesh from the same cameras."""

import io
import math
import os
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from sv3d_fast.kernels.mesh_raster import mesh_render

from .camera import Orbit
from .files import write_bytes
from .image import Subject
from .scene.corners import vertex_normals
from .scene.mesh import Mesh
from .video import OrbitVideo

VIEWS = 8
TILE = 192  # pixels
GAP, MARGIN, HEAD, FOOT = 8, 24, 34, 22
INK, FAINT, LINE = "#1c1e21", "#6b7280", "#e5e7eb"
GREY = 200  # of 255: the surface of a mesh without colours
KEY_LIGHT = 0.6  # and the rest ambient, for a mesh without texture


def render_mesh(mesh: Mesh, orbit: Orbit, size: int, supersample: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """The mesh on white from every camera of an orbit: (T, size, size, 3) uint8 and alpha (T, size, size) uint8.

    A texture is shown as it is, since it holds the light of the frames. Without one, faces take the mean of their
    vertices' colours, or grey, and light from above the input view.
    """
    vertices, faces = mesh.vertices, mesh.faces
    device = vertices.device
    if mesh.texture is not None and mesh.uvs is not None:
        uvs, texture, normals = mesh.uvs, mesh.texture, None
        lights, ambient = torch.zeros((0, 4), device=device), 1.0
    else:
        uvs, texture = _face_texture(mesh)
        normals = torch.from_numpy(vertex_normals(vertices.cpu().numpy(), faces.cpu().numpy())).to(device)
        direction = torch.nn.functional.normalize(torch.tensor([1.0, 0.4, 1.2]), dim=0).tolist()
        lights, ambient = torch.tensor([[*direction, KEY_LIGHT]], device=device), 1 - KEY_LIGHT
    return mesh_render(
        vertices, faces, uvs, texture, normals, orbit.world_to_camera().to(device), orbit.intrinsics(size).to(device),
        size, lights, ambient, (1.0, 1.0, 1.0), supersample,
    )  # fmt: skip


def spread(count: int, views: int = VIEWS) -> list[int]:
    """Frames in equal steps around an orbit of `count`, the input view (the last frame) first."""
    views = min(views, count)
    return [(count - 1 + round(k * count / views)) % count for k in range(views)]


def preview_image(video: OrbitVideo, mesh: Mesh, subject: Subject | None = None, *, tile: int = TILE) -> Image.Image:
    """The input (the orbit's last frame without `subject`), frames and renders on one labelled RGB sheet."""
    index = spread(len(video.orbit))
    orbit = video.orbit.select(index)
    renders, _ = render_mesh(mesh, orbit, tile)
    picture = Image.fromarray(video.frames[-1].cpu().numpy()) if subject is None else subject.to_pil()
    azimuths = orbit.azimuths.tolist()
    rows = [("Orbit", _pictures(video.frames[index]), azimuths), ("Mesh", _pictures(renders), azimuths)]
    return _sheet(picture, rows, tile)


def mesh_preview_image(picture: Image.Image, mesh: Mesh, orbit: Orbit, *, tile: int = TILE) -> Image.Image:
    """A picture and renders of its mesh from an orbit of an even number of cameras, in two rows, on one RGB sheet."""
    views, azimuths = _pictures(render_mesh(mesh, orbit, tile)[0]), orbit.azimuths.tolist()
    half = len(views) // 2
    return _sheet(picture, [("Mesh", views[:half], azimuths[:half]), ("", views[half:], azimuths[half:])], tile)


def _pictures(frames: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in frames.cpu().numpy()]


def _sheet(picture: Image.Image, rows: list[tuple[str, list[Image.Image], list[float]]], tile: int) -> Image.Image:
    """The picture at twice a tile's side, and beside it two rows: a heading, views, their azimuths in degrees."""
    large = 2 * tile + HEAD + FOOT
    width = 2 * MARGIN + large + 3 * GAP + len(rows[0][1]) * (tile + GAP) - GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + HEAD + large), "white")
    draw = ImageDraw.Draw(sheet)
    heading, label = ImageFont.load_default(20), ImageFont.load_default(14)
    _place(sheet, draw, picture, (MARGIN, MARGIN + HEAD), large)
    draw.text((MARGIN, MARGIN), "Input", INK, heading)
    left = MARGIN + large + 3 * GAP
    for row, (name, views, azimuths) in enumerate(rows):
        top = MARGIN + row * (tile + HEAD + FOOT)
        draw.text((left, top), name, INK, heading)
        for column, (view, azimuth) in enumerate(zip(views, azimuths, strict=True)):
            x = left + column * (tile + GAP)
            _place(sheet, draw, view, (x, top + HEAD), tile)
            draw.text((x + tile / 2, top + HEAD + tile + 4), f"{azimuth % 360:.0f}°", FAINT, label, anchor="ma")
    return sheet


def write_preview(
    path: str | os.PathLike, video: OrbitVideo, mesh: Mesh, subject: Subject | None = None, *, tile: int = TILE
) -> Path:
    """Writes `preview_image` as a PNG; returns its path. Raises OutputError."""
    return write_picture(path, preview_image(video, mesh, subject, tile=tile))


def write_picture(path: str | os.PathLike, picture: Image.Image) -> Path:
    """Writes a picture as a PNG; returns its path. Raises OutputError."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return write_bytes(path, buffer.getvalue())


def _place(sheet: Image.Image, draw: ImageDraw.ImageDraw, picture: Image.Image, corner: tuple[int, int], side: int):
    x, y = corner
    sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), corner)
    draw.rounded_rectangle((x - 1, y - 1, x + side, y + side), 4, outline=LINE)


def _face_texture(mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
    """One texel per face, and coordinates that point at its middle."""
    faces, device = mesh.faces.long(), mesh.vertices.device
    side = max(1, math.isqrt(max(0, len(faces) - 1)) + 1)
    texels = torch.full((side * side, 3), GREY, dtype=torch.uint8, device=device)
    if mesh.colors is not None:
        texels[: len(faces)] = mesh.colors[faces].float().mean(1).round().to(torch.uint8)
    face = torch.arange(len(faces), device=device)
    uv = torch.stack([(face % side + 0.5) / side, 1 - (face // side + 0.5) / side], -1)
    return uv[:, None].expand(-1, 3, -1).contiguous().float(), texels.reshape(side, side, 3)
