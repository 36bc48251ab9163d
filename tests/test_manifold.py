"""Sheets that touch, parted."""

import fast_simplification
import numpy as np
import pytest
import torch
import trimesh

from sv3d_fast.kernels.marching_cubes import marching_cubes
from sv3d_fast.scene.manifold import parted


def joined(*solids):
    """One mesh of several, vertices at the same place joined."""
    points = np.concatenate([s.vertices for s in solids])
    starts = np.cumsum([0, *(len(s.vertices) for s in solids)])
    triangles = np.concatenate([s.faces + start for s, start in zip(solids, starts, strict=False)])
    places, inverse = np.unique(points.round(9), axis=0, return_inverse=True)
    return places, inverse.reshape(-1)[triangles]


def box(*center):
    return trimesh.creation.box(transform=trimesh.transformations.translation_matrix(center))


def solid(points, triangles):
    return trimesh.Trimesh(points, triangles, process=False)


def test_a_closed_surface_stays_as_it_is():
    ball = trimesh.creation.icosphere(2)
    points, triangles = parted(ball.vertices, ball.faces)
    assert len(points) == len(ball.vertices)
    assert np.allclose(points[triangles], ball.vertices[ball.faces])


@pytest.mark.parametrize(
    ("centers", "name"),
    [
        (((0, 0, 0), (1, 1, 0)), "an edge"),
        (((0, 0, 0), (1, 1, 1)), "a vertex"),
        (((0, 0, 0), (1, 1, 0), (2, 0, 0)), "two"),
    ],
)
def test_boxes_that_touch_come_apart(centers, name):
    points, triangles = joined(*(box(*c) for c in centers))
    before = solid(points, triangles)
    after = solid(*parted(points, triangles))
    assert after.is_watertight
    assert after.is_winding_consistent
    parts = after.split(only_watertight=True)
    assert len(parts) == len(centers), name
    assert after.volume == pytest.approx(before.volume, rel=0.1)
    assert all(part.volume > 0.8 for part in parts)
    assert solid(*joined(after)).is_watertight  # and stay apart where a reader joins vertices by place


def test_sheets_that_meet_in_an_edge_and_are_joined_elsewhere():
    # A ring of eight boxes whose first and last touch in an edge only: both its ends belong to one fan each.
    ring = [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2), (-1, 1)]
    boxes = [box(x, y, 0) for x, y in ring]
    whole = boxes[0]
    for other in boxes[1:]:
        points, triangles = joined(whole, other)
        whole = solid(*parted(points, triangles))
    after = solid(*parted(*joined(whole)))
    assert after.is_watertight
    assert after.is_winding_consistent
    assert after.volume == pytest.approx(8, rel=0.05)


def test_a_noisy_surface_stays_closed_when_collapsed():
    field = np.linalg.norm(np.stack(np.meshgrid(*[np.linspace(-1, 1, 40)] * 3, indexing="ij")), axis=0) - 0.6
    field += 0.08 * np.random.default_rng(0).standard_normal(field.shape)
    field[[0, -1]] = field[:, [0, -1]] = field[:, :, [0, -1]] = 1
    vertices, faces = (t.numpy() for t in marching_cubes(torch.from_numpy(field).float()))
    collapsed = fast_simplification.simplify(vertices, faces, target_count=len(faces) // 12)
    assert not solid(*collapsed).is_watertight
    after = solid(*parted(*collapsed))
    assert after.is_watertight
    assert after.is_winding_consistent


def test_folds_and_lines_vanish():
    ball = trimesh.creation.icosphere(1)
    tip = len(ball.vertices)
    points = np.concatenate([ball.vertices, [[0, 0, 3]]])
    a, b, _ = ball.faces[0]
    fold = np.array([[a, b, tip], [b, a, tip], [a, a, tip]])
    after = solid(*parted(points, np.concatenate([ball.faces, fold])))
    assert after.is_watertight
    assert len(after.faces) == len(ball.faces)
    assert len(after.vertices) == tip


def test_twins_of_a_face_keep_the_majority():
    ball = trimesh.creation.icosphere(0)
    face = ball.faces[3]
    extra = np.array([face[[1, 2, 0]], face[[0, 2, 1]]])  # once more each way
    _, triangles = parted(ball.vertices, np.concatenate([ball.faces, extra]))
    assert len(triangles) == len(ball.faces)
    assert solid(*parted(ball.vertices, np.concatenate([ball.faces, extra]))).is_volume


def test_an_open_edge_stays_open():
    ball = trimesh.creation.icosphere(1)
    after = solid(*parted(ball.vertices, ball.faces[1:]))
    assert not after.is_watertight
    assert len(after.faces) == len(ball.faces) - 1


def test_no_faces_give_none():
    points, triangles = parted(np.zeros((3, 3)), np.zeros((0, 3), int))
    assert points.shape == (0, 3)
    assert triangles.shape == (0, 3)
