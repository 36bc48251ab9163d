"""Generated training objects, and the primitives that they are built from."""

import math

import numpy as np
import pytest

from sv3d_fast.mini import materials, pack, primitives, shapes


@pytest.mark.parametrize("kind", list(shapes.RECIPES))
def test_generated_shapes_are_sound(kind):
    for seed in range(3):
        s = shapes.make_shape(np.random.default_rng(seed), kind)
        assert s.vertices.dtype == np.float32
        assert s.faces.dtype == np.int32
        assert np.isfinite(s.vertices).all()
        assert 0 <= s.faces.min() <= s.faces.max() < len(s.vertices)
        assert 20 <= len(s.faces) <= 12_000
        assert s.uvs.shape == (len(s.faces), 3, 2)
        assert 0 <= s.uvs.min() <= s.uvs.max() <= 1
        assert s.texture.shape == (128, 128, 3)
        corners = s.vertices[s.faces].astype(np.float64)
        areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
        assert (areas > 0).mean() > 0.99
        extents = np.ptp(s.vertices, axis=0)
        assert extents.min() > 0.05 * extents.max()


def test_generated_objects_differ_from_each_other_and_fit():
    objects = [pack.procedural_object(0, i) for i in range(30)]
    assert len({(o.name, len(o.vertices), o.texture.tobytes()) for o in objects}) == 30
    for o in objects:
        assert np.abs(o.vertices).max() <= 1
        assert np.linalg.norm(o.normals, axis=1) == pytest.approx(np.ones(len(o.normals)), abs=1e-4)


@pytest.mark.parametrize("make", ["box", "rounded", "ball", "cylinder", "torus", "tube", "extrude"])
def test_primitives_are_closed_and_face_outwards(make):
    b = primitives.Builder()
    t = np.linspace(0, math.pi, 40)
    {
        "box": lambda: b.box((1, 2, 3)),
        "rounded": lambda: b.box((1, 2, 3), edge=0.2),
        "ball": lambda: b.ball((1, 2, 3), rings=40),
        "cylinder": lambda: b.cylinder(1, 2, axis="y", sides=60),
        "torus": lambda: b.torus(2, 0.5),
        "tube": lambda: b.tube(np.stack([np.cos(t), 0 * t, np.sin(t)], 1), 0.1, sides=40),
        "extrude": lambda: b.extrude([(0, 0), (2, 0), (2, 1), (1, 0.3), (0, 1)], 0.5),
    }[make]()
    volume = {
        "box": 6, "rounded": 5.79, "ball": 8 * math.pi, "cylinder": 2 * math.pi, "torus": math.pi**2,
        "tube": 0.01 * math.pi**2, "extrude": 0.65,
    }  # fmt: skip
    vertices, faces = shapes.weld(*b.merge()[:2])
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    assert sorted(map(tuple, edges)) == sorted(map(tuple, edges[:, ::-1]))
    assert np.einsum(
        "fi,fi", vertices[faces[:, 0]], np.cross(vertices[faces[:, 1]], vertices[faces[:, 2]])
    ) / 6 == pytest.approx(volume[make], rel=0.08)


def test_box_projection_is_upright_and_not_mirrored():
    builder = primitives.Builder()
    builder.box((1, 1, 1))
    vertices, faces, _, _ = builder.merge()
    uvs = materials.box_project(vertices, faces)
    corners, du, dv = vertices[faces], uvs[:, 1] - uvs[:, 0], uvs[:, 2] - uvs[:, 0]
    assert (du[:, 0] * dv[:, 1] - du[:, 1] * dv[:, 0] > 0).all()  # same sense as the face seen from outside
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    side = np.abs(normal[:, 2]) < 0.5
    assert np.allclose(uvs[side][..., 1] - 0.5, corners[side][..., 2])
