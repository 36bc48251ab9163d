"""Surface extraction: closed, in the right place, also where no camera saw anything."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh

from sv3d_fast.camera import Orbit
from sv3d_fast.events import Progress, Warned
from sv3d_fast.scene import surface
from sv3d_fast.scene.hull import Hull
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.scene.splats import Splats
from sv3d_fast.video import OrbitVideo

RADIUS, RESOLUTION = 0.4, 48
BOX = torch.tensor([0.22, 0.3, 0.36])


def sphere_distance(points):
    return points.norm(dim=-1) - RADIUS


def box_distance(points):
    q = points.abs() - BOX
    return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)


def hull_of(distance, slack=0.01, size=40, half_extent=0.6):
    axis = (torch.arange(size) + 0.5) * (2 * half_extent / size) - half_extent
    field = slack - distance(torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1))
    return Hull(field >= 0, field, half_extent)


def splats_at(points, normals, spacing, flatness=0.1):
    """Discs of standard deviation `spacing` across their normals."""
    z = torch.tensor([0.0, 0.0, 1.0]).expand_as(normals)
    quats = torch.cat([1 + normals[:, 2:] + 1e-4, torch.linalg.cross(z, normals)], 1)
    scales = torch.tensor([spacing, spacing, spacing * flatness]).log().repeat(len(points), 1)
    return Splats(points, 3 * quats, scales, torch.full((len(points),), 3.0), torch.full_like(points, 0.5))


def sphere_splats(count=2500, flatness=0.1):
    """A Fibonacci sphere of splats."""
    k = torch.arange(count) + 0.5
    z, angle = 1 - 2 * k / count, k * math.pi * (3 - math.sqrt(5))
    normals = torch.stack([(1 - z * z).sqrt() * angle.cos(), (1 - z * z).sqrt() * angle.sin(), z], 1)
    return splats_at(RADIUS * normals, normals, RADIUS * math.sqrt(4 * math.pi / count), flatness)


def box_splats(count=3000):
    generator = torch.Generator().manual_seed(0)
    axis = torch.multinomial(BOX.prod() / BOX, count, True, generator=generator)
    points = (torch.rand(count, 3, generator=generator) * 2 - 1) * BOX
    side = torch.randint(2, (count,), generator=generator) * 2.0 - 1
    normals = F.one_hot(axis, 3) * side[:, None]
    points = torch.where(normals != 0, normals * BOX, points)
    return splats_at(points, normals, 0.02)


def video(size=80, frames=8):
    return OrbitVideo(torch.full((frames, size, size, 3), 255, dtype=torch.uint8), Orbit.static(10.0, frames))


def extract(splats, hull, **options):
    return surface.extract(splats, video(), hull, **({"resolution": RESOLUTION, "target_faces": 3000} | options))


def assert_closed(mesh):
    solid = trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)
    assert solid.is_watertight
    assert solid.is_winding_consistent
    assert solid.volume > 0
    return solid


@pytest.mark.parametrize(("flatness", "bound"), [(0.1, 0.75), (1.0, 1.5)])  # round splats are thick themselves
def test_sphere(flatness, bound):
    mesh = extract(sphere_splats(flatness=flatness), hull_of(sphere_distance))
    solid = assert_closed(mesh)
    assert solid.euler_number == 2
    assert len(mesh.faces) <= 3000
    voxel = 2 * 0.6 / RESOLUTION
    error = sphere_distance(mesh.vertices)
    assert error.abs().max() < bound * voxel
    assert error.abs().mean() < 0.9 * bound * voxel


def test_box():
    mesh = extract(box_splats(), hull_of(box_distance, slack=0.03))
    solid = assert_closed(mesh)
    voxel = 2 * 0.6 / RESOLUTION
    assert box_distance(mesh.vertices).abs().max() < 2 * voxel  # corners are rounded
    assert box_distance(mesh.vertices).abs().mean() < 0.5 * voxel
    assert solid.volume == pytest.approx(8 * float(BOX.prod()), rel=0.1)


def test_a_hole_that_no_frame_shows_is_closed_by_the_hull_and_does_not_hollow_the_object():
    splats = sphere_splats()
    kept = splats.means[:, 2] > -0.6 * RADIUS  # a camera below looks through this onto the back of the top
    open_below = Splats(**{k: v[kept] for k, v in vars(splats).items()})
    solid = assert_closed(extract(open_below, hull_of(sphere_distance)))
    assert solid.volume == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.06)


def test_splats_carve_what_the_hull_leaves():
    """The hull is a sphere twice the volume of the splats' sphere."""
    hull = hull_of(lambda p: p.norm(dim=-1) - 1.26 * RADIUS)
    solid = assert_closed(extract(sphere_splats(), hull))
    assert solid.volume == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.1)


def test_yields_progress_to_the_end_and_is_deterministic():
    arguments = sphere_splats(500), video(32, 4), hull_of(sphere_distance)
    stage = surface.extracting(*arguments, resolution=24, target_faces=400)
    events = []
    while True:
        try:
            events.append(next(stage))
        except StopIteration as stop:
            mesh = stop.value
            break
    assert all(isinstance(e, Progress) for e in events)
    assert [e.done for e in events] == list(range(1, events[-1].total + 1))
    again = surface.extract(*arguments, resolution=24, target_faces=400)
    assert torch.equal(mesh.vertices, again.vertices)
    assert torch.equal(mesh.faces, again.faces)


def test_decimation_that_opens_the_surface_is_not_used(monkeypatch):
    def tearing(points, triangles, **_):
        return points, triangles[:-1]

    monkeypatch.setattr(surface.fast_simplification, "simplify", tearing)
    stage = surface.extracting(
        sphere_splats(500), video(32, 4), hull_of(sphere_distance), resolution=24, target_faces=400
    )
    events = []
    while True:
        try:
            events.append(next(stage))
        except StopIteration as stop:
            mesh = stop.value
            break
    assert [type(e) for e in events if not isinstance(e, Progress)] == [Warned]
    assert len(mesh.faces) > 400
    assert_closed(mesh)


@pytest.mark.parametrize("offset", [0.0, 0.01, -0.004])
def test_the_distance_of_a_mesh_from_the_surface(offset):
    half_extent, size = 0.6, 64
    voxel = 2 * half_extent / size
    axis = (torch.arange(size) + 0.5) * voxel - half_extent
    center = torch.tensor([0.05, -0.02, 0.03])  # of a sphere, whose field is steeper than a distance
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    field = 7 * ((grid - center).norm(dim=-1) - RADIUS)
    ball = trimesh.creation.icosphere(5, radius=RADIUS + offset)
    mesh = Mesh(torch.from_numpy(ball.vertices).float() + center, torch.from_numpy(ball.faces).int())
    assert surface._distance(mesh, field, voxel, half_extent) == pytest.approx(abs(offset), abs=3e-4)


def test_specks_are_dropped_and_voids_filled():
    size = 40
    axis = torch.arange(size).float()
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    ball = (points - 20).norm(dim=-1) - 12
    void = 4 - (points - 20).norm(dim=-1)
    speck = (points - torch.tensor([4.0, 4, 4])).norm(dim=-1) - 2
    vertices, faces = surface.marching_cubes(torch.minimum(torch.maximum(ball, void), speck) / 5)
    vertices, faces = surface._solid(vertices, faces)
    assert ((vertices - 20).norm(dim=1) - 12).abs().max() < 0.1
    assert assert_closed(Mesh(vertices, faces)).volume == pytest.approx(4 / 3 * math.pi * 12**3, rel=0.01)


def test_an_object_that_fills_the_grid_is_closed_at_its_border():
    field = surface._bordered(torch.full((9, 9, 9), -1.0))
    vertices, faces = surface.marching_cubes(field)
    assert_closed(Mesh(vertices, faces))


def test_is_closed_tells_open_and_inverted_meshes():
    ball = trimesh.creation.icosphere(1)
    vertices = torch.from_numpy(ball.vertices.astype(np.float32))
    faces = torch.from_numpy(ball.faces.astype(np.int32))
    assert surface.is_closed(Mesh(vertices, faces))
    assert not surface.is_closed(Mesh(vertices, faces[1:]))
    assert not surface.is_closed(Mesh(vertices, faces.flip(1)))


def test_bad_input_is_named():
    splats, hull = sphere_splats(50), hull_of(sphere_distance)
    for named, arguments, options in (
        ("resolution", (splats, hull), {"resolution": 4}),
        ("target_faces", (splats, hull), {"target_faces": 0}),
        ("splats", (Splats(**{k: v[:0] for k, v in vars(splats).items()}), hull), {}),
        ("hull", (splats, hull_of(sphere_distance, slack=-1.0)), {}),
    ):
        with pytest.raises(ValueError, match=named):
            extract(*arguments, **options)
