"""Meshes are moved onto outlines: towards the truth where it is seen edge-on, and nowhere else."""

import numpy as np
import pytest
import torch
import trimesh
from analytic_scene import Sphere, render

from sv3d_fast.camera import Orbit
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.scene.silhouettes import STIFFNESS, _screened_poisson, snapped, vertex_normals
from sv3d_fast.scene.surface import is_closed

ORBIT = Orbit.sine(10.0, 30.0, 12)
RADIUS = 0.4


def ball(radius, subdivisions=3):
    sphere = trimesh.creation.icosphere(subdivisions, radius)
    return Mesh(torch.from_numpy(sphere.vertices.astype(np.float32)), torch.from_numpy(sphere.faces.astype(np.int32)))


@pytest.fixture(scope="module")
def alpha():
    return render((Sphere((0.0, 0.0, 0.0), RADIUS, (0.5, 0.5, 0.5)),), ORBIT, 96).alpha


@pytest.mark.parametrize("radius", [RADIUS - 0.02, RADIUS + 0.02])
def test_a_ball_of_the_wrong_size_becomes_right(alpha, radius):
    mesh = snapped(ball(radius), alpha, ORBIT)
    found = mesh.vertices.norm(dim=1)
    assert found.mean() == pytest.approx(RADIUS, abs=0.006)  # a third of the error; a pixel is 0.0127
    assert is_closed(mesh)
    assert torch.equal(mesh.faces, ball(radius).faces)


def test_a_ball_that_fits_stays(alpha):
    mesh = snapped(ball(RADIUS, 4), alpha, ORBIT)
    assert (mesh.vertices.norm(dim=1) - RADIUS).abs().max() < 0.004


def test_outlines_that_lie_far_apart_move_nothing(alpha):
    small = ball(RADIUS / 2)  # 16 pixels inside
    assert torch.equal(snapped(small, alpha, ORBIT).vertices, small.vertices)
    nothing = snapped(small, torch.zeros_like(alpha), ORBIT)
    assert torch.equal(nothing.vertices, small.vertices)


def test_normals_of_a_ball_point_away_from_its_centre():
    mesh = ball(0.3)
    assert torch.allclose(vertex_normals(mesh), mesh.vertices / 0.3, atol=0.02)


def test_conjugate_gradients_solve_the_system():
    generator = torch.Generator().manual_seed(0)
    mesh = ball(1.0, 2)
    faces, count = mesh.faces.long(), len(mesh.vertices)
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).T
    edges = torch.cat([edges, edges.flip(0)], 1)
    screen, pull = 0.3 + torch.rand(count, generator=generator), torch.randn(count, generator=generator)
    system = torch.diag(screen.double())
    for i, j in edges.T.tolist():
        system[i, i] += STIFFNESS
        system[i, j] -= STIFFNESS
    expected = torch.linalg.solve(system, pull.double())
    error = (_screened_poisson(screen, pull, edges) - expected).norm() / expected.norm()
    assert error < 1e-4


def test_masks_of_another_number_are_named(alpha):
    with pytest.raises(ValueError, match="alpha: expected"):
        snapped(ball(RADIUS), alpha[1:], ORBIT)
