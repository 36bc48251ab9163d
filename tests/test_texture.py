"""Unwrapping without overlaps; baking: the right colours where views see, sound ones where none does."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh

from sv3d_fast.camera import Orbit
from sv3d_fast.events import Progress, Warned
from sv3d_fast.scene import texture as texture_module
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.scene.splats import Splats
from sv3d_fast.scene.texture import bake, baking
from sv3d_fast.scene.unwrap import covered, unwrap
from sv3d_fast.video import OrbitVideo

RADIUS, SIZE, RESOLUTION = 0.45, 112, 224


def mesh_of(solid):
    vertices = torch.from_numpy(np.asarray(solid.vertices, np.float32))
    return Mesh(vertices, torch.from_numpy(np.asarray(solid.faces, np.int32)))


def sphere_mesh(radius=RADIUS, center=(0, 0, 0), subdivisions=4):
    solid = trimesh.creation.icosphere(subdivisions, radius)
    solid.apply_translation(center)
    return mesh_of(solid)


def joined(*meshes):
    offsets = np.cumsum([0] + [len(m.vertices) for m in meshes])
    faces = [m.faces + int(offset) for m, offset in zip(meshes, offsets, strict=False)]
    return Mesh(torch.cat([m.vertices for m in meshes]), torch.cat(faces).int())


def waves(points):
    """A smooth colour of the position, far from white and black."""
    return 0.45 + 0.2 * torch.sin(9 * points + torch.tensor([0.0, 1.0, 2.0]))


def frames_of(spheres, orbit, supersampling=2):
    """Exact frames of spheres (center, radius, colour of the position), ray cast and averaged down, on white."""
    fine = SIZE * supersampling
    pixel = (torch.arange(fine) + 0.5 - fine / 2) / orbit.focal(fine)
    v, u = torch.meshgrid(pixel, pixel, indexing="ij")
    frames = []
    for pose in orbit.camera_to_world():
        ray = F.normalize(torch.stack([u, v, torch.ones_like(u)], -1) @ pose[:3, :3].T, dim=-1)
        image, nearest = torch.ones(fine, fine, 3), torch.full((fine, fine), math.inf)
        for center, radius, color in spheres:
            offset = pose[:3, 3] - torch.tensor(center, dtype=torch.float32)
            b = (ray * offset).sum(-1)
            root = b * b - offset.square().sum() + radius**2
            t = torch.where(root > 0, -b - root.clamp(min=0).sqrt(), math.inf)
            hit = pose[:3, 3] + t.nan_to_num(posinf=0)[..., None] * ray
            image = torch.where((t < nearest)[..., None], color(hit), image)
            nearest = torch.minimum(nearest, t)
        frames.append(F.avg_pool2d(image.permute(2, 0, 1)[None], supersampling)[0].permute(1, 2, 0))
    return OrbitVideo((torch.stack(frames) * 255).round().to(torch.uint8), orbit)


def texel_points(mesh):
    """World position and colour of every texel inside a chart."""
    resolution = len(mesh.texture)
    texel, face, weight = covered(mesh.uvs.numpy(), resolution)
    corners = mesh.vertices[mesh.faces.long()[torch.from_numpy(face)]]
    points = (corners * torch.from_numpy(weight)[..., None]).sum(1)
    return points, mesh.texture.reshape(-1, 3)[torch.from_numpy(texel)].float() / 255


def best_cosine(points, center, orbit):
    normal = F.normalize(points - torch.tensor(center, dtype=torch.float32), dim=1)
    toward = F.normalize(orbit.camera_to_world()[:, None, :3, 3] - points, dim=-1)
    return (normal * toward).sum(-1).amax(0)


@pytest.fixture(scope="module")
def orbit():
    return Orbit.static(15.0, 12)


@pytest.fixture(scope="module")
def waves_video(orbit):
    return frames_of([((0, 0, 0), RADIUS, waves)], orbit)


@pytest.fixture(scope="module")
def baked(waves_video):
    return bake(sphere_mesh(), waves_video, resolution=RESOLUTION)


def test_seen_texels_have_the_colour_of_the_surface(baked, orbit):
    points, color = texel_points(baked)
    seen = best_cosine(points, (0, 0, 0), orbit) > 0.35
    assert seen.float().mean() > 0.7
    error = (color - waves(points))[seen]
    assert -10 * torch.log10(error.square().mean()) > 36
    assert error.abs().max() < 0.08


def test_unseen_texels_continue_the_seen_ones_and_no_white_bleeds_in(baked, orbit):
    points, color = texel_points(baked)
    unseen = best_cosine(points, (0, 0, 0), orbit) < 0.05
    assert unseen.any()
    assert color.amax() < 0.7  # the colours end at 0.65, white is 1
    assert color.amin() > 0.2
    assert (color - waves(points))[unseen].abs().mean() < 0.2


def test_texels_outside_the_charts_repeat_the_nearest_chart(baked):
    inside = torch.zeros(RESOLUTION * RESOLUTION, dtype=torch.bool)
    inside[torch.from_numpy(covered(baked.uvs.numpy(), RESOLUTION)[0])] = True
    inside = inside.view(RESOLUTION, RESOLUTION)
    assert not inside.all()
    texture = baked.texture.float() / 255
    assert texture.amin() > 0.2
    assert texture.amax() < 0.7
    row, column = (~inside).nonzero()[:: max(1, int((~inside).sum()) // 50)].T
    known = inside.nonzero()
    for r, c in zip(row.tolist(), column.tolist(), strict=True):
        distance = (known - torch.tensor([r, c])).square().sum(1)
        nearest = known[distance == distance.min()]
        assert (texture[nearest[:, 0], nearest[:, 1]] == texture[r, c]).all(1).any()


def test_what_a_nearer_object_hides_does_not_take_its_colour():
    orbit = Orbit(torch.tensor([0.0, 5.0, -5.0]), torch.tensor([350.0, 10.0, 0.0]))
    near, far = ((0.5, 0, 0), 0.15), ((-0.2, 0.1, 0), 0.35)
    red, green = torch.tensor([0.8, 0.1, 0.1]), torch.tensor([0.1, 0.7, 0.1])
    video = frames_of([(*near, lambda p: red.expand_as(p)), (*far, lambda p: green.expand_as(p))], orbit)
    mesh = bake(joined(*(sphere_mesh(r, c, 3) for c, r in (near, far))), video, resolution=RESOLUTION)
    points, color = texel_points(mesh)
    of_near = (points - torch.tensor(near[0])).norm(dim=1) < 0.2
    assert (color[of_near] - red).abs().max() < 0.03
    assert (color[~of_near] - green).abs().max() < 0.03


def test_views_that_disagree_with_the_best_ones_do_not_ghost(orbit, waves_video):
    frames = waves_video.frames.clone()
    frames[3] = torch.where(frames[3] < 255, 255 - frames[3], frames[3])
    mesh = bake(sphere_mesh(), OrbitVideo(frames, orbit), resolution=RESOLUTION)
    points, color = texel_points(mesh)
    toward = F.normalize(orbit.camera_to_world()[:, None, :3, 3] - points, dim=-1)
    cosine = (F.normalize(points, dim=1) * toward).sum(-1)
    others = torch.cat([cosine[:3], cosine[4:]]).amax(0)
    better_seen = (others > 0.5) & (cosine[3] < 0.8 * others) & (cosine[3] > 0.3)
    assert better_seen.any()
    assert (color - waves(points))[better_seen].abs().max() < 0.1


def test_unseen_texels_take_the_splats_colour(waves_video, orbit):
    magenta = torch.tensor([0.9, 0.05, 0.9])
    points = sphere_mesh(subdivisions=2).vertices
    n = len(points)
    splats = Splats(
        points, torch.eye(4)[:1].repeat(n, 1), torch.full((n, 3), -3.0), torch.zeros(n), magenta.repeat(n, 1)
    )
    points, color = texel_points(bake(sphere_mesh(), waves_video, resolution=RESOLUTION, splats=splats))
    cosine = best_cosine(points, (0, 0, 0), orbit)
    assert (color - magenta)[cosine < 0].abs().max() < 0.02
    assert (color - waves(points))[cosine > 0.5].abs().max() < 0.08


def test_keeps_given_uvs_and_geometry_and_reports_progress(baked, waves_video):
    stage = baking(Mesh(baked.vertices, baked.faces, uvs=baked.uvs), waves_video, resolution=64)
    events = []
    while True:
        try:
            events.append(next(stage))
        except StopIteration as stop:
            mesh = stop.value
            break
    assert [e.done for e in events] == list(range(1, events[-1].total + 1))
    assert all(isinstance(e, Progress) for e in events)
    assert torch.equal(mesh.uvs, baked.uvs)
    assert torch.equal(mesh.vertices, baked.vertices)
    assert mesh.texture.shape == (64, 64, 3)
    assert mesh.texture.dtype == torch.uint8


def test_xatlas_unwraps_if_it_is_given_the_time(waves_video, monkeypatch):
    ball = sphere_mesh(subdivisions=2)
    limits = []

    def told(vertices, faces, *, time_limit):
        limits.append(time_limit)
        return unwrap(vertices, faces, time_limit=0)

    monkeypatch.setattr(texture_module, "unwrap", told)
    for xatlas, warnings in ((0.0, 0), (7.0, 1)):  # a projection is a disappointment only to who asked for xatlas
        events = list(baking(ball, waves_video, resolution=64, xatlas=xatlas))
        assert sum(isinstance(e, Warned) for e in events) == warnings
    assert limits == [0.0, 7.0]


def test_bad_bake_input_is_named(waves_video):
    ball = sphere_mesh(subdivisions=1)
    hidden = sphere_mesh(0.1, (50, 0, 0), 1)
    blank = OrbitVideo(torch.full_like(waves_video.frames, 255), waves_video.orbit)
    for named, mesh, video, options in (
        ("resolution", ball, waves_video, {"resolution": 4}),
        ("mesh", Mesh(ball.vertices, ball.faces[:0]), waves_video, {}),
        ("mesh", hidden, waves_video, {"resolution": 64}),
        ("frames", ball, blank, {"resolution": 64}),
    ):
        with pytest.raises(ValueError, match=named):
            bake(mesh, video, **options)


def helicoid(turns=3, steps=16):
    """A spiral ramp: connected, all facing up, and over itself in every turn."""
    angle = np.linspace(0, turns * 2 * np.pi, steps * turns)
    inner, outer = (np.stack([r * np.cos(angle), r * np.sin(angle), 0.02 * angle], 1) for r in (0.2, 0.5))
    k, n = np.arange(len(angle) - 1), len(angle)
    faces = np.concatenate([np.stack([k, k + n, k + 1], 1), np.stack([k + 1, k + n, k + n + 1], 1)])
    return trimesh.Trimesh(np.concatenate([inner, outer]), faces, process=False)


SHAPES = {
    "sphere": lambda: trimesh.creation.icosphere(3),
    "torus": lambda: trimesh.creation.torus(0.5, 0.2),
    "box": lambda: trimesh.creation.box((1, 2, 3)),
    "two boxes, one above the other": lambda: trimesh.util.concatenate(
        trimesh.creation.box(), trimesh.creation.box().apply_translation((0.2, 0.1, 1.5))
    ),
    "helicoid": helicoid,
    "one triangle": lambda: trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], process=False),
}


@pytest.mark.parametrize("method", ["xatlas", "cube"])
@pytest.mark.parametrize("shape", SHAPES)
def test_layouts_do_not_overlap(shape, method):
    solid = SHAPES[shape]()
    layout = unwrap(solid.vertices, solid.faces, time_limit=60 if method == "xatlas" else 0)
    assert layout.method == method
    uvs, resolution = layout.uvs, 700
    assert uvs.shape == (len(solid.faces), 3, 2)
    assert uvs.dtype == np.float32
    assert uvs.min() >= 0
    assert uvs.max() <= 1
    texel, face, weights = covered(uvs, resolution)
    inside = (weights > 0.02).all(1)
    assert np.bincount(texel[inside]).max() == 1
    assert (np.bincount(face, minlength=len(uvs)) > 0).mean() > 0.9


def test_covered_against_a_brute_force_search():
    generator = np.random.default_rng(0)
    uvs, resolution = generator.random((7, 3, 2)).astype(np.float32) * 1.2 - 0.1, 23
    texel, face, weights = covered(uvs, resolution)
    row, column = np.divmod(np.arange(resolution**2), resolution)
    centers = np.stack([(column + 0.5) / resolution, 1 - (row + 0.5) / resolution], 1)
    expected = set()
    for f, corners in enumerate(uvs.astype(np.float64)):
        solution = np.linalg.solve(np.vstack([corners.T, np.ones(3)]), np.vstack([centers.T, np.ones(len(centers))]))
        expected |= {(t, f) for t in np.flatnonzero((solution >= 0).all(0))}
    assert set(zip(texel.tolist(), face.tolist(), strict=True)) == expected
    np.testing.assert_allclose((uvs[face] * weights[..., None]).sum(1), centers[texel], atol=1e-5)


def test_unwrap_that_takes_too_long_falls_back_and_says_so():
    solid = trimesh.creation.icosphere(3)
    layout = unwrap(solid.vertices, solid.faces, time_limit=1e-3)
    assert layout.method == "cube"
    assert "did not end" in layout.why


def test_unwrap_of_flat_faces_does_not_fail():
    solid = trimesh.creation.icosphere(1)
    faces = np.concatenate([solid.faces, [[0, 0, 1], [3, 3, 3]]])
    layout = unwrap(solid.vertices, faces, time_limit=0)
    assert np.isfinite(layout.uvs).all()


@pytest.mark.parametrize(
    ("vertices", "faces", "named"),
    [
        (np.zeros((3, 2)), [[0, 1, 2]], "vertices"),
        (np.full((3, 3), np.nan), [[0, 1, 2]], "vertices"),
        (np.zeros((3, 3)), np.zeros((0, 3), int), "faces"),
        (np.zeros((3, 3)), [[0, 1, 3]], "faces"),
        (np.zeros((3, 3)), [[0, 1]], "faces"),
    ],
)
def test_bad_unwrap_input_is_named(vertices, faces, named):
    with pytest.raises(ValueError, match=named):
        unwrap(vertices, faces)
