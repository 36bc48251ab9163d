"""Scenes that the embedded model is trained on: objects are framed, recolored, turned and bent, then rendered."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_mini import CPU, SIZE, make_stage

from sv3d_fast.camera import Orbit
from sv3d_fast.mini import scenes
from sv3d_fast.mini.pack import procedural_object
from sv3d_fast.mini.scenes import Stage, framed, odds, random_orbit, random_shape, recolored

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stage():
    return make_stage()


def test_framed_fills_the_frame_at_the_widest_view():
    rng = np.random.default_rng(0)
    for fill in (0.72, 0.96):
        orbit = random_orbit(rng)
        points = torch.from_numpy(rng.uniform([1, 2, 3], [2, 2.3, 9], (500, 3)).astype(np.float32))
        made = framed(points, orbit, fill)
        view = orbit.world_to_camera()
        position = made @ view[:, :3, :3].mT + view[:, None, :3, 3]
        reach = position[..., :2].abs().amax(-1) / position[..., 2] / math.tan(math.radians(orbit.fov) / 2)
        assert float(reach.max()) == pytest.approx(fill, rel=1e-4)
        low, high = made.aminmax(dim=0)
        torch.testing.assert_close(low, -high, atol=1e-5, rtol=0)


def test_recolored_keeps_shapes_and_flat_areas():
    textures = torch.zeros(6, 8, 8, 3, dtype=torch.uint8)
    textures[:, :4] = torch.tensor([200, 100, 50], dtype=torch.uint8)
    made = recolored(textures, np.random.default_rng(0), np.full(len(textures), 0.3))
    assert made.shape == textures.shape
    assert made.dtype == torch.uint8
    assert not made[:, 4:].any()  # black stays black
    assert (made[:, :4] == made[:, :1, :1]).all()
    assert len({tuple(color) for color in made[:, 0, 0].tolist()}) == 6
    orders = {tuple(color.argsort().tolist()) for color in made[:, 0, 0]}
    assert len(orders) > 1  # channels are exchanged in some


def test_random_shapes_are_turned_and_stretched_about_the_vertical():
    rng = np.random.default_rng(0)
    shapes = torch.stack([random_shape(rng, front=False) for _ in range(200)])
    determinants = torch.linalg.det(shapes)
    assert (determinants > 0.2).any()
    assert (determinants < -0.2).any()
    assert not shapes[:, :2, 2].any()
    assert not shapes[:, 2, :2].any()
    assert (shapes[:, 2, 2] > 0).all()  # never upside down
    assert (shapes[:, 0, 0] < 0).any()  # seen from behind too
    fronts = torch.stack([random_shape(rng, front=True) for _ in range(200)])
    assert (fronts[:, 0, 0] > 0).all()
    assert (fronts[:, 1, 1] < 0).any()


def test_bends_change_proportions_and_keep_normals_upright():
    """Normals of the bent surface by differences of points that were bent with it."""
    rng = np.random.default_rng(3)
    points = torch.from_numpy(rng.uniform(-1, 1, (64, 3)))
    points[:2] = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])  # the box stays when neighbours are bent
    normal = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(64, 3))), dim=-1)
    bends = scenes.random_bends(rng, 8).double()
    assert bends.abs().sum(2).max() <= 0.7 + 1e-6
    for bend in bends:
        moved, turned = scenes.bent_along(points, normal, bend)
        assert not torch.allclose(moved, points, atol=0.01)
        assert (moved[points[:, 0].argsort(), 0].diff() >= 0).all()  # nothing is folded over
        for axis in torch.linalg.qr(normal[:, :, None], mode="complete")[0][:, :, 1:].unbind(2):  # along the surface
            inner = points[2:] * 0.9
            ends = [
                scenes.bent_along(torch.cat([points[:2], inner + s * axis[2:]]), normal, bend)[0] for s in (-1e-5, 1e-5)
            ]
            along = torch.nn.functional.normalize((ends[1] - ends[0])[2:], dim=-1)
            there = scenes.bent_along(torch.cat([points[:2], inner]), normal, bend)[1][2:]
            assert float((along * there).sum(1).abs().max()) < 1e-4
        torch.testing.assert_close(turned.norm(dim=1), torch.ones(64).double())


def test_random_orbits_stay_in_range():
    rng = np.random.default_rng(1)
    for _ in range(60):
        orbit = random_orbit(rng)
        assert len(orbit) == 21
        assert orbit.azimuths[-1] == 0
        assert -5 <= orbit.elevations[-1] <= 40.01
        assert orbit.elevations.abs().max() <= 80
        assert (orbit.azimuths[:-1].diff() > 0).all()
        assert 0 < orbit.azimuths[0] <= orbit.azimuths[-2] < 360


def test_random_views(stage):
    first, again = (stage.random(4, np.random.default_rng(5)) for _ in range(2))
    assert first.frames.shape == (4, 21, SIZE, SIZE, 3)
    assert first.alpha.shape == (4, 21, SIZE, SIZE)
    assert torch.equal(first.frames, again.frames)
    assert (first.frames[first.alpha == 0] == 255).all()
    solid = first.alpha > 0
    assert solid.any(-1).any(-1).all()  # the object is in every frame
    for border in (solid[:, :, 0], solid[:, :, -1], solid[..., 0], solid[..., -1]):
        assert not border.any()


def test_standard_views_are_the_objects_as_they_are(stage):
    orbit = Orbit.static(10.0, 4)
    both = stage.standard([2, 0], orbit)
    assert torch.equal(both.frames[1], stage.standard([0], orbit).frames[0])
    assert not torch.equal(both.frames[0], both.frames[1])


def test_modelled_objects_have_their_share():
    shares = odds([True, False, False, False, True, False])
    assert shares.sum() == pytest.approx(1)
    assert shares[[0, 4]].tolist() == pytest.approx([scenes.MODELLED_SHARE / 2] * 2)
    assert shares[1] == shares[2] == shares[5] > 0
    for alike in ([True] * 3, [False] * 3):
        assert odds(alike).tolist() == pytest.approx([1 / 3] * 3)


def test_stage_takes_arrays_that_cannot_be_written_to(recwarn):
    thing = procedural_object(0, 0)
    for name in ("vertices", "faces", "uvs", "normals", "texture"):
        getattr(thing, name).flags.writeable = False
    Stage([thing], SIZE, CPU)
    assert not [w for w in recwarn if "writable" in str(w.message)]


def test_stage_refuses():
    with pytest.raises(ValueError, match="objects: expected at least one"):
        Stage([], SIZE, CPU)
    with pytest.raises(ValueError, match="texture: expected"):
        Stage([replace(procedural_object(0, 0), texture=np.zeros((24, 24, 3), np.uint8))], SIZE, CPU)
    assert scenes.TEXTURE % len(procedural_object(0, 0).texture) == 0
