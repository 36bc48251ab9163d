"""Reading of OBJ and MTL: materials, indices of either sign, bad faces, and polygons that are cut to triangles."""

import math

import numpy as np
import pytest
from obj_texts import MTL, two_materials

from sv3d_fast.mini import obj, primitives


def test_obj_reads_materials_and_cuts_concave_polygons():
    mesh = obj.read_obj(two_materials(), {"a.mtl": MTL}.__getitem__)
    assert mesh.palette == (obj.Material((0.64, 0.64, 0.64), "cloth.png"), obj.Material((1, 0, 0), None))
    corners = mesh.vertices[mesh.faces]
    areas = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])[:, 2] / 2
    assert (areas > 0).all()
    assert areas[mesh.materials == 0].sum() == pytest.approx(6)
    assert areas[mesh.materials == 1].sum() == pytest.approx(3)


def test_obj_relative_indices_equal_absolute_ones():
    absolute = obj.read_obj(two_materials(), lambda _: MTL)
    text = (
        two_materials()
        .replace("f 1/1 2/2 3/3 4/4", "f -10/-4 -9/-3 -8/-2 -7/-1")
        .replace("f 5 6 7 8 9 10", "f -6 -5 -4 -3 -2 -1")
    )
    relative = obj.read_obj(text, lambda _: MTL)
    assert np.array_equal(absolute.faces, relative.faces)
    assert np.array_equal(absolute.uvs, relative.uvs)


@pytest.mark.parametrize("faces", ["", "f 1 2 5", "f 1/1 2/9 3/1", "f 1 2/1 3", "f -9 1 2"])
def test_obj_rejects_bad_faces(faces):
    with pytest.raises(ValueError, match="OBJ"):
        obj.read_obj("v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\n" + faces, lambda _: "")


def test_mtl_glass_becomes_a_light_opaque_colour():
    assert obj.read_mtl(MTL)["glass"].color == pytest.approx((0.72, 0.72, 0.72))


def test_clip_ears_covers_a_star():
    angle = np.arange(10) * math.pi / 5
    star = np.stack([np.cos(angle), np.sin(angle), np.zeros(10)], 1) * np.where(np.arange(10) % 2, 0.3, 1)[:, None]
    polygon_area = np.cross(star, np.roll(star, -1, 0))[:, 2].sum() / 2
    for turn in (
        np.eye(3),
        primitives.rotation(20, 80, 50),
        primitives.rotation(0, 90, 0),
        primitives.rotation(0, 0, 90),
    ):
        points = star @ turn.T
        t = points[np.array(obj.clip_ears(points))]
        areas = np.cross(t[:, 1] - t[:, 0], t[:, 2] - t[:, 0]) @ turn[:, 2] / 2
        assert len(t) == 8
        assert (areas > 0).all()
        assert areas.sum() == pytest.approx(polygon_area)
