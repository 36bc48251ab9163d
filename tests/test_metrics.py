"""Metrics against values known in closed form."""

import math

import pytest
import torch

from sv3d_fast.camera import Orbit
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.scene.metrics import (
    chamfer,
    compare,
    f_score,
    iou,
    normal_consistency,
    psnr,
    sample_surface,
    visible_points,
)


def box(half=(0.2, 0.2, 0.2), center=(0.0, 0.0, 0.0)):
    """A closed box whose faces wind counter-clockwise seen from outside."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3) * torch.tensor(half) + torch.tensor(center)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [f for a, b, c, d in quads for f in ((a, b, c), (a, c, d))]
    return Mesh(corners, torch.tensor(faces, dtype=torch.int32))


def test_psnr():
    a = torch.full((2, 3, 3), 0.5)
    assert psnr(a, a) == math.inf
    assert psnr(a + 0.1, a) == pytest.approx(20, abs=1e-4)
    with pytest.raises(ValueError, match="truth's shape"):
        psnr(a, a[:1])


def test_iou():
    a = torch.tensor([1.0, 0.6, 0.4, 0.0])
    b = torch.tensor([True, False, True, False])
    assert iou(a, b) == pytest.approx(1 / 3)
    assert iou(torch.zeros(4), torch.zeros(4)) == 1
    with pytest.raises(ValueError, match="truth's shape"):
        iou(a, b[:2])


def test_chamfer_is_the_mean_of_both_unsquared_directions():
    a = torch.tensor([[0.0, 0, 0], [1.0, 0, 0]])
    b = torch.tensor([[0.0, 0, 0.25]])
    assert chamfer(a, b) == pytest.approx(((0.25 + math.hypot(1, 0.25)) / 2 + 0.25) / 2)
    assert chamfer(a, b) == pytest.approx(chamfer(b, a))
    with pytest.raises(ValueError, match="at least one point"):
        chamfer(a, b[:0])


def test_f_score_is_the_harmonic_mean_of_precision_and_recall():
    a = torch.tensor([[0.0, 0, 0], [1.0, 0, 0]])
    b = torch.tensor([[0.0, 0, 0.01]])
    assert f_score(a, b, 0.02) == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert f_score(a, b, 0.001) == 0
    assert f_score(a, a, 0.0) == 1


def test_normal_consistency_ignores_the_side():
    a = torch.tensor([[0.0, 0, 0], [1.0, 0, 0]])
    n = torch.tensor([[0.0, 0, 1], [0.0, 0, 1]])
    tilted = torch.tensor([[0.0, 0, -1], [0.0, math.sin(1), math.cos(1)]])
    assert normal_consistency(a, n, a, -n) == pytest.approx(1)
    assert normal_consistency(a, n, a, tilted) == pytest.approx((1 + math.cos(1)) / 2)


def test_samples_are_uniform_over_the_area_and_normals_point_out():
    points, normals = sample_surface(box((0.1, 0.2, 0.4)), 60_000, torch.Generator().manual_seed(0))
    area = torch.tensor([0.2 * 0.4, 0.1 * 0.4, 0.1 * 0.2])
    share = normals.abs().mean(0)  # the part of the samples on each pair of faces
    assert torch.allclose(share, area / area.sum(), atol=0.01)
    assert torch.allclose((points * normals).sum(-1), (torch.tensor([0.1, 0.2, 0.4]) * normals.abs()).sum(-1))
    top = points[normals[:, 2] > 0.5]
    assert torch.allclose(top[:, :2].std(0), torch.tensor([0.2, 0.4]) / math.sqrt(12), rtol=0.05)
    assert torch.equal(points, sample_surface(box((0.1, 0.2, 0.4)), 60_000, torch.Generator().manual_seed(0))[0])


def test_a_mesh_without_area_has_no_samples():
    flat = Mesh(torch.zeros(3, 3), torch.tensor([[0, 1, 2]], dtype=torch.int32))
    for mesh in (flat, Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int32))):
        with pytest.raises(ValueError, match="area"):
            sample_surface(mesh, 10)


def test_visible_points_are_those_that_face_a_camera():
    mesh = box()
    points, normals = sample_surface(mesh, 3000, torch.Generator().manual_seed(0))
    off_edges = ((0.2 - points.abs()) > 0.03).sum(-1) == 2
    seen = visible_points(points, mesh, Orbit.static(20), 128)
    hidden = normals[:, 2] < -0.5  # the underside, from above
    assert seen[~hidden & off_edges].all()
    assert not seen[hidden & off_edges].any()
    front = visible_points(points, mesh, Orbit(torch.tensor([0.0]), torch.tensor([0.0])), 128)
    assert torch.equal(front[off_edges], normals[off_edges, 0] > 0.5)


def test_a_point_behind_another_part_is_not_seen():
    near, far = box((0.05, 0.3, 0.3), (0.3, 0, 0)), box((0.05, 0.1, 0.1), (-0.3, 0, 0))
    both = Mesh(torch.cat([near.vertices, far.vertices]), torch.cat([near.faces, far.faces + 8]))
    points = torch.tensor([[0.35, 0.0, 0.0], [-0.25, 0.0, 0.0]])
    camera = Orbit(torch.tensor([0.0]), torch.tensor([0.0]))
    assert visible_points(points, both, camera, 64).tolist() == [True, False]
    assert visible_points(points[1:], far, camera, 64).tolist() == [True]


def test_compare_measures_in_diagonals():
    half = 0.5 / math.sqrt(3)  # diagonal 1
    truth = box((half,) * 3)
    same = compare(truth, truth, samples=8000)
    assert same["chamfer"] < 0.01  # what the samples' spacing leaves
    assert same["f_score@0.02"] > 0.97
    assert same["normal_consistency"] > 0.97
    larger = Mesh(truth.vertices * 1.1, truth.faces)
    figures = compare(larger, truth, samples=8000)
    assert figures["chamfer"] == pytest.approx(0.1 * half, rel=0.25)
    assert figures["f_score@0.01"] == 0
    doubled = compare(Mesh(larger.vertices * 2, larger.faces), Mesh(truth.vertices * 2, truth.faces), samples=8000)
    assert doubled["chamfer"] == pytest.approx(figures["chamfer"], rel=1e-4)


def test_compare_may_leave_out_what_no_camera_sees():
    truth, core = box(), box((0.05, 0.05, 0.05))
    filled = Mesh(torch.cat([truth.vertices, core.vertices]), torch.cat([truth.faces, core.faces + 8]))
    everything = compare(filled, truth, samples=5000)
    seen = compare(filled, truth, Orbit.static(20), samples=5000)
    assert set(seen) == set(everything)
    assert seen["f_score@0.05"] > 0.99
    assert everything["f_score@0.05"] < 0.98
