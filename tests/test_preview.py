"""preview.png: which views it shows, that renders show the mesh from those cameras, and how bad places fail."""

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from sv3d_fast.camera import Orbit
from sv3d_fast.files import OutputError
from sv3d_fast.image import Subject
from sv3d_fast.preview import FOOT, GAP, HEAD, MARGIN, preview_image, render_mesh, spread, write_preview
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.video import OrbitVideo

RED, BLUE = (250, 10, 10), (10, 10, 250)


def ball(textured=True, colored=False) -> Mesh:
    """A sphere whose front half (+x) is red and whose back is blue."""
    sphere = trimesh.creation.icosphere(subdivisions=3, radius=0.5)
    vertices = torch.tensor(sphere.vertices, dtype=torch.float32)
    faces = torch.tensor(sphere.faces, dtype=torch.int32)
    front = vertices[faces.long()].mean(1)[:, 0] > 0
    uvs = torch.where(front, 0.25, 0.75)[:, None, None].expand(-1, 3, 2).contiguous()
    texture = torch.tensor(RED, dtype=torch.uint8).expand(8, 8, 3).clone()
    texture[:, 4:] = torch.tensor(BLUE, dtype=torch.uint8)
    colors = torch.where(vertices[:, :1] > 0, torch.tensor(RED), torch.tensor(BLUE)).to(torch.uint8)
    return Mesh(vertices, faces, uvs if textured else None, texture if textured else None, colors if colored else None)


def white(frames: int, size=32) -> OrbitVideo:
    pictures = torch.full((frames, size, size, 3), 255, dtype=torch.uint8)
    pictures[:, 8:24, 8:24] = torch.arange(frames, dtype=torch.uint8)[:, None, None, None] * 10
    return OrbitVideo(pictures, Orbit.static(10, frames))


@pytest.mark.parametrize(("count", "expected"), [(21, [20, 2, 4, 7, 9, 12, 15, 17]), (8, [7, 0, 1, 2, 3, 4, 5, 6]),
                                                 (4, [3, 0, 1, 2])])  # fmt: skip
def test_spread_starts_at_the_input_view(count, expected):
    assert spread(count) == expected


def test_textured_mesh_is_shown_as_it_is():
    rgb, alpha = render_mesh(ball(), Orbit.static(0, 4), 33)  # azimuths 90, 180, 270, 0
    assert rgb.shape == (4, 33, 33, 3)
    assert rgb[3, 16, 16].tolist() == list(RED)
    assert rgb[1, 16, 16].tolist() == list(BLUE)
    assert rgb[0, 16, 10].tolist() == list(RED)  # seen from +y, the front is on the left
    assert rgb[0, 16, 22].tolist() == list(BLUE)
    assert rgb[0, 0, 0].tolist() == [255, 255, 255]
    assert (alpha[0, 16, 16], alpha[0, 0, 0]) == (255, 0)


def test_vertex_colors_and_grey_are_lit():
    orbit = Orbit.static(0, 4)
    colored = render_mesh(ball(False, True), orbit, 33)[0]
    assert colored[3, 16, 16, 0] > 5 * colored[3, 16, 16, 2]
    assert colored[1, 16, 16, 2] > 5 * colored[1, 16, 16, 0]
    grey = render_mesh(ball(False), orbit, 33)[0]
    assert (grey.amax(-1) == grey.amin(-1)).all()
    assert grey[3, 12, 16, 0] > grey[1, 20, 16, 0] + 40  # light comes from above the front


def test_sheet_shows_input_frames_and_renders(tmp_path):
    video, tile = white(21), 64
    image = torch.zeros(40, 40, 3)
    image[..., 1] = 1
    path = write_preview(tmp_path / "preview.png", video, ball(), Subject(image, torch.ones(40, 40)), tile=tile)
    sheet = np.asarray(Image.open(path))
    large = 2 * tile + HEAD + FOOT
    assert sheet.shape == (2 * MARGIN + HEAD + large, 2 * MARGIN + large + 3 * GAP + 8 * (tile + GAP) - GAP, 3)
    assert sheet[MARGIN + HEAD + large // 2, MARGIN + large // 2].tolist() == [0, 255, 0]
    left, top = MARGIN + large + 3 * GAP + tile // 2, MARGIN + HEAD + tile // 2
    for column, frame in enumerate(spread(21)):
        x = left + column * (tile + GAP)
        assert sheet[top, x].tolist() == [frame * 10] * 3
    below = top + tile + HEAD + FOOT
    assert sheet[below, left].tolist() == list(RED)
    assert sheet[below, left + 4 * (tile + GAP)].tolist() == list(BLUE)
    assert (sheet[:MARGIN] == 255).all()


def test_without_a_subject_the_last_frame_is_the_input():
    sheet = np.asarray(preview_image(white(5), ball(), tile=48))
    assert sheet[MARGIN + HEAD + 60, MARGIN + 70].tolist() == [40, 40, 40]


def test_empty_mesh_gives_white_renders():
    mesh = Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int32))
    assert (render_mesh(mesh, Orbit.static(10, 4), 8)[0] == 255).all()


def test_unwritable(tmp_path):
    with pytest.raises(OutputError, match=r"can't write .*preview\.png"):
        write_preview(tmp_path / "none" / "preview.png", white(4), ball(), tile=16)
