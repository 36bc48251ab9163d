"""Geometry of the training objects: decimated, fitted to the frame and shaded."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from sv3d_fast import camera
from sv3d_fast.mini import decimate, geometry, obj, primitives, shapes


def test_decimate_keeps_shape_materials_and_uvs():
    n = 60
    u, v = np.meshgrid(np.linspace(0, 1, n), np.linspace(0, 1, n))
    vertices = np.stack([u, v, 0.15 * np.sin(6 * u) * np.cos(4 * v)], -1).reshape(-1, 3)
    i = np.arange(n * n).reshape(n, n)
    a, b, c, d = i[:-1, :-1].ravel(), i[:-1, 1:].ravel(), i[1:, 1:].ravel(), i[1:, :-1].ravel()
    faces = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    own = (vertices[faces].mean(1)[:, 0] > 0.5).astype(np.int64)
    mesh = obj.ObjModel(
        vertices, faces, vertices[faces][..., :2], own, (obj.Material(texture="a"), obj.Material(texture="b"))
    )
    small = decimate.decimate(mesh, 800)
    assert 300 < len(small.faces) <= 810
    distance, _ = cKDTree(small.vertices).query(vertices)
    assert distance.max() < 0.12
    error = np.abs(small.uvs - small.vertices[small.faces][..., :2])
    assert error.max() < 1e-3
    middle = small.vertices[small.faces].mean(1)[:, 0]
    away = np.abs(middle - 0.5) > 0.03
    assert ((middle > 0.5) == small.materials)[away].all()
    assert decimate.decimate(mesh, len(faces)) is mesh


def test_decimate_thins_out_foliage_and_keeps_its_area():
    rng = np.random.default_rng(2)
    leaf = np.array([[0, 0, 0], [0.03, 0, 0], [0.03, 0.03, 0], [0, 0.03, 0]])
    vertices = np.concatenate([leaf @ np.linalg.qr(rng.normal(size=(3, 3)))[0] + rng.random(3) for _ in range(3000)])
    faces = np.concatenate([np.arange(3000)[:, None] * 4 + f for f in ([0, 1, 2], [0, 2, 3])])
    uvs = np.tile([[0.1, 0.1], [0.9, 0.1], [0.9, 0.9]], (6000, 1, 1))
    mesh = obj.ObjModel(vertices, faces, uvs, np.zeros(6000, np.int64), (obj.Material(),))
    small = decimate.decimate(mesh, 2000)

    def area(m):
        c = m.vertices[m.faces]
        return np.linalg.norm(np.cross(c[:, 1] - c[:, 0], c[:, 2] - c[:, 0]), axis=1).sum() / 2

    assert 1600 < len(small.faces) < 2400
    assert area(small) == pytest.approx(area(mesh), rel=0.15)


def test_fit_matches_the_rule_and_the_camera_module():
    assert (geometry.RADIUS, geometry.FIELD_OF_VIEW) == (camera.RADIUS, camera.FIELD_OF_VIEW)
    rng = np.random.default_rng(3)
    points = rng.normal(size=(500, 3)) * [3, 1, 0.3] + [5, -2, 9]
    fitted = geometry.fit_to_frame(points)
    assert np.abs(fitted.min(0) + fitted.max(0)).max() < 1e-5
    azimuths = np.arange(geometry.AZIMUTHS) * 360 / geometry.AZIMUTHS
    largest = 0.0
    for elevation in geometry.ELEVATIONS:
        orbit = camera.Orbit(torch.full((len(azimuths),), elevation), torch.from_numpy(azimuths))
        seen = (
            torch.from_numpy(fitted) @ orbit.world_to_camera()[:, :3, :3].mT + orbit.world_to_camera()[:, None, :3, 3]
        )
        ndc = seen[..., :2] / seen[..., 2:] * orbit.focal(2)
        largest = max(largest, float(ndc.abs().max()))
    assert largest == pytest.approx(geometry.FILL, abs=0.01)
    with pytest.raises(ValueError, match="vertices"):
        geometry.fit_to_frame(np.zeros((4, 3)))


def test_shading_splits_creases_and_keeps_smooth_surfaces_whole():
    builder = primitives.Builder()
    builder.box((1, 1, 1))
    vertices, faces = shapes.weld(*builder.merge()[:2])
    assert len(vertices) == 8
    split, new_faces, normals = geometry.shade_smoothly(vertices, faces)
    assert len(split) == 24
    assert np.allclose(split[new_faces], vertices[faces])
    assert np.allclose(np.abs(normals).max(1), 1)
    builder = primitives.Builder()
    builder.ball((1, 1, 1))
    vertices, faces = shapes.weld(*builder.merge()[:2])
    split, _, normals = geometry.shade_smoothly(vertices, faces)
    assert len(split) == len(vertices)
    assert (normals * split).sum(1).min() > 0.97
