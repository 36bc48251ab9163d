"""The mesh rasteriser against its torch reference, against ray casting, and in pictures known by hand."""

import math

import numpy as np
import pytest
import torch
import trimesh

from sv3d_fast.camera import Orbit
from sv3d_fast.kernels import mesh_raster as module
from sv3d_fast.kernels.mesh_raster import mesh_raster, mesh_render, mesh_render_batch
from sv3d_fast.kernels.op import registry

OPS = ("mesh_raster", "mesh_render", "mesh_render_batch")
LIGHT = torch.tensor([[0.0, 0.0, 1.0, 0.0]])  # of no intensity


def pinhole(size: float, views: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Cameras at the origin that look along +z; at depth 1 the world's unit is `size` pixels."""
    K = torch.tensor([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1.0]])
    return torch.eye(4).repeat(views, 1, 1), K.repeat(views, 1, 1)


def icosphere(subdivisions: int = 3, radius: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    sphere = trimesh.creation.icosphere(subdivisions, radius)
    return torch.tensor(sphere.vertices).float(), torch.tensor(sphere.faces).int()


def square(z: float = 1.0, half: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A square across the view of `pinhole`: u runs right, v up (world y points down there)."""
    x = torch.tensor([[-half, half], [half, half], [half, -half], [-half, -half]])  # bottom left first
    vertices = torch.cat([x, torch.full((4, 1), z)], 1)
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32)
    return vertices, faces, torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])[faces.long()]


def plain(size: int = 1, value: int = 255) -> torch.Tensor:
    return torch.full((size, size, 3), value, dtype=torch.uint8)


def render(vertices, faces, uvs, texture, size, *, background=(0.0, 0.0, 0.0), lights=LIGHT, ambient=1.0, **rest):
    normals = rest.pop("normals", None)
    return mesh_render(
        vertices, faces, uvs, texture, normals, *pinhole(size), size, lights, ambient, background, **rest
    )


def agree(first, second) -> None:
    """Two results of one op: the same triangles, but for ties on edges; weights, depths and colours close."""
    if first[0].dtype == torch.int32:
        same = first[0] == second[0]
        assert same.float().mean() > 0.999
        torch.testing.assert_close(first[1][same], second[1][same], rtol=0, atol=1e-5)
        torch.testing.assert_close(first[2][same], second[2][same], rtol=1e-5, atol=0)
    else:
        for a, b in zip(first, second, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype == torch.uint8
            assert ((a.int() - b.int()).abs() <= 1).float().mean() > 0.999


@pytest.mark.parametrize("name", OPS)
def test_the_cpu_matches_the_reference(name):
    op = registry[name]
    for inputs in op.examples("cpu"):
        agree(op(*inputs, implementation="csrc"), op(*inputs, implementation="reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_cuda_matches_the_cpu_on_the_examples(name):
    op = registry[name]
    for on_cpu, on_gpu in zip(op.examples("cpu"), op.examples("cuda"), strict=True):
        result = op(*on_gpu, implementation="cuda")
        agree([r.cpu() for r in result], op(*on_cpu, implementation="csrc"))


@pytest.mark.gpu
@pytest.mark.parametrize(("subdivisions", "size"), [(0, 257), (5, 128)], ids=["large triangles", "small triangles"])
def test_cuda_matches_the_cpu_on_a_lit_sphere(subdivisions, size):
    vertices, faces = icosphere(subdivisions)
    orbit = Orbit.sine(10, 30)
    generator = torch.Generator().manual_seed(0)
    uvs = torch.rand((len(faces), 3, 2), generator=generator)
    texture = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
    lights = torch.tensor([[0.6, 0.0, 0.8, 0.7], [0.0, -1.0, 0.0, 0.2]])
    cameras = orbit.world_to_camera(), orbit.intrinsics(size)
    inputs = (vertices, faces, uvs, texture, vertices * 2, *cameras, size, lights)
    on_gpu = [x.cuda() if isinstance(x, torch.Tensor) else x for x in inputs]
    expected = mesh_raster(vertices, faces, *cameras, size, size)
    result = mesh_raster(on_gpu[0], on_gpu[1], on_gpu[5], on_gpu[6], size, size)
    agree([r.cpu() for r in result], expected)
    expected = mesh_render(*inputs, 0.2, (1.0, 0.5, 0.0))
    result = mesh_render(*on_gpu, 0.2, (1.0, 0.5, 0.0))
    for a, b in zip(result, expected, strict=True):
        assert ((a.cpu().int() - b.int()).abs() <= 2).float().mean() > 0.999


@pytest.mark.gpu
def test_cuda_draws_no_face_whose_index_is_out_of_range():
    vertices, faces, _ = square()
    faces[1, 2] = 4
    ids, _, _ = mesh_raster(*(t.cuda() for t in (vertices, faces, *pinhole(9))), 9, 9)
    assert set(ids.unique().tolist()) == {-1, 0}


def cast(mesh: trimesh.Trimesh, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each ray the nearest triangle, -1 for none, and its distance in lengths of the ray; every pair is tried."""
    ray, triangle = (i.ravel() for i in np.meshgrid(np.arange(len(rays)), np.arange(len(mesh.faces)), indexing="ij"))
    corners = mesh.triangles[triangle]
    normals = mesh.face_normals[triangle]
    distance = ((corners[:, 0] - origin) * normals).sum(1) / (rays[ray] * normals).sum(1)
    weights = trimesh.triangles.points_to_barycentric(corners, origin + distance[:, None] * rays[ray])
    distance[(weights < 0).any(1) | (distance < 0)] = np.inf
    distance = distance.reshape(len(rays), -1)
    nearest = distance.argmin(1)
    best = distance[np.arange(len(rays)), nearest]
    return np.where(np.isfinite(best), nearest, -1), best


def test_pixels_match_ray_casting():
    mesh = trimesh.creation.torus(0.5, 0.2, major_sections=24, minor_sections=12)
    vertices, faces = torch.tensor(mesh.vertices).float(), torch.tensor(mesh.faces).int()
    orbit, height, width, count = Orbit.sine(20, 40, frames=5), 61, 83, 150
    K = torch.tensor([[90.0, 0, 40.3], [0, 80.0, 31.7], [0, 0, 1]]).repeat(5, 1, 1)
    ids, weights, depth = mesh_raster(vertices, faces, orbit.world_to_camera(), K, height, width)
    rng = np.random.default_rng(0)
    for view, pose in enumerate(orbit.camera_to_world().double().numpy()):
        y, x = rng.integers(height, size=count), rng.integers(width, size=count)
        rays = np.stack([(x + 0.5 - 40.3) / 90, (y + 0.5 - 31.7) / 80, np.ones(count)], -1) @ pose[:3, :3].T
        expected, distance = cast(mesh, pose[:3, 3], rays)
        got = ids[view][y, x].numpy()
        assert (got == expected).mean() >= 0.99  # all but rays through an edge
        same = (got == expected) & (got >= 0)
        assert same.sum() > 20
        np.testing.assert_allclose(depth[view][y, x].numpy()[same], distance[same], rtol=1e-5)
        w = weights[view][y, x].double().numpy()[same]
        w = np.concatenate([w, 1 - w.sum(1, keepdims=True)], 1)
        at = (w[..., None] * mesh.triangles[got[same]]).sum(1)
        np.testing.assert_allclose(at, (pose[:3, 3] + distance[:, None] * rays)[same], atol=1e-5)


def test_a_closed_sphere_has_no_holes():
    vertices, faces = icosphere(4)
    orbit, size = Orbit.sine(5, 60), 201
    _, _, depth = mesh_raster(vertices, faces, orbit.world_to_camera(), orbit.intrinsics(size), size, size)
    y, x = torch.meshgrid(torch.arange(size) + 0.5 - size / 2, torch.arange(size) + 0.5 - size / 2, indexing="ij")
    angle = torch.atan(torch.hypot(x, y) / orbit.focal(size))
    inside = angle < math.asin(0.495 / 2)
    assert inside.sum() > 10000
    assert depth[:, inside].max() < 2.0  # through a hole one would see the far side


@pytest.mark.parametrize("offset", [0.0, 0.5, 0.25])
@pytest.mark.parametrize("welded", [True, False])
def test_a_fan_covers_every_pixel_exactly_once(offset, welded):
    """Vertices and edges on pixel centres and between: triangle by triangle, no pixel is drawn twice or missed."""
    size, n = 16, 4
    grid = torch.arange(n + 1) * (size / n) + offset
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    vertices = torch.stack([x.flatten(), y.flatten(), torch.full((x.numel(),), 1.0)], -1)
    faces = []
    for row in range(n):
        for column in range(n):
            a = row * (n + 1) + column
            b, c, d = a + 1, a + n + 1, a + n + 2
            faces += [[a, b, d], [a, d, c]] if (row + column) % 2 else [[a, b, c], [d, c, b]]
    faces = torch.tensor(faces, dtype=torch.int32)
    if not welded:
        vertices, faces = vertices[faces.long()].reshape(-1, 3), torch.arange(faces.numel()).int().reshape(-1, 3)
    camera = torch.eye(4)[None], torch.eye(3)[None]
    drawn = torch.zeros(size + 2, size + 2, dtype=torch.int32)
    for face in faces:
        drawn += mesh_raster(vertices, face[None], *camera, size + 2, size + 2)[0][0] >= 0
    inner = drawn[1 : size - 1, 1 : size - 1]
    assert (inner == 1).all()
    assert drawn.max() == 1
    assert drawn.sum() == size * size


def test_the_nearer_triangle_wins_and_the_lower_one_of_equals():
    vertices, faces, _ = square()
    far = vertices * torch.tensor([1.0, 1.0, 2.0])
    both = torch.cat([far, vertices])
    ids, _, depth = mesh_raster(both, torch.cat([faces, faces + 4, faces + 4]), *pinhole(11), 11, 11)
    assert set(ids.unique().tolist()) == {2, 3}
    assert (depth == 1).all()


def test_weights_are_those_of_corners_0_and_1_and_perspective_correct():
    vertices = torch.tensor([[-2.0, 2.0, 4.0], [0.6, 0.5, 1.0], [0.1, -0.9, 2.0]])
    face, size = torch.tensor([[0, 1, 2]], dtype=torch.int32), 33
    ids, weights, depth = mesh_raster(vertices, face, *pinhole(size), size, size)
    y, x = torch.nonzero(ids[0] == 0, as_tuple=True)
    assert len(y) > 100
    w = weights[0, y, x]
    point = w @ vertices[:2] + (1 - w.sum(1, keepdim=True)) * vertices[2]
    torch.testing.assert_close(point[:, 0] / point[:, 2] * size + size / 2, x + 0.5, atol=1e-4, rtol=0)
    torch.testing.assert_close(point[:, 1] / point[:, 2] * size + size / 2, y + 0.5, atol=1e-4, rtol=0)
    torch.testing.assert_close(point[:, 2], depth[0, y, x], atol=1e-5, rtol=0)
    assert (weights[0][ids[0] < 0] == 0).all()
    assert (depth[0][ids[0] < 0] == torch.inf).all()


def test_both_sides_of_a_triangle_are_drawn():
    vertices, faces, _ = square()
    front = mesh_raster(vertices, faces, *pinhole(8), 8, 8)
    back = mesh_raster(vertices, faces.flip(1), *pinhole(8), 8, 8)
    assert torch.equal(front[0], back[0])
    assert torch.equal(front[2], back[2])


def test_nothing_behind_the_camera_is_drawn():
    vertices, faces, _ = square(z=-1.0)
    assert (mesh_raster(vertices, faces, *pinhole(8), 8, 8)[0] == -1).all()


def test_the_near_plane_cuts_a_crossing_triangle_at_its_depth():
    """A floor one unit under the camera, from behind it to far ahead: row y shows depth size / (y + 0.5 - size / 2)."""
    size, near = 40, 3.0
    floor = torch.tensor([[-900.0, 1, -50], [900, 1, -50], [0, 1, 1000]])
    faces = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    ids, _, depth = mesh_raster(floor, faces, *pinhole(size), size, size, near)
    z = size / (torch.arange(size) + 0.5 - size / 2)
    expected = (z >= near) & (z < 900)
    assert 0 < expected.sum() < size / 2
    assert torch.equal(ids[0] == 0, expected[:, None].expand(size, size))
    torch.testing.assert_close(depth[0][expected], z[expected, None].expand(-1, size).contiguous(), rtol=1e-5, atol=0)
    reference = mesh_raster(floor, faces, *pinhole(size), size, size, near, implementation="reference")
    assert torch.equal(ids, reference[0])


def test_degenerate_and_non_finite_triangles_draw_nothing():
    good, faces, _ = square()
    bad = torch.tensor([[0.0, 0, 0.5], [0.2, 0, 0.5], [torch.nan, 0, 0.5], [torch.inf, 0, 0.5], [3e38, -3e38, 3e38]])
    wrong = torch.tensor([[4, 4, 5], [4, 4, 4], [4, 5, 6], [7, 4, 5], [4, 5, 8], [0, 0, 2]], dtype=torch.int32)
    alone = mesh_raster(good, faces, *pinhole(13), 13, 13)
    mixed = mesh_raster(torch.cat([good, bad]), torch.cat([faces, wrong]), *pinhole(13), 13, 13)
    crossing = mixed[0] == 6  # a finite triangle to a far corner is a triangle
    assert torch.equal(mixed[0][~crossing], alone[0][~crossing])
    assert set(mixed[0].unique().tolist()) <= {0, 1, 6}


def test_an_edge_on_triangle_through_pixel_centres_keeps_its_depths():
    wall = torch.tensor([[0.0, -1, 1.0], [0.0, 1, 1.0], [0.0, 1, 3.0], [0.0, -1, 3.0]])
    _, faces, _ = square()
    ids, _, depth = mesh_raster(wall, faces, *pinhole(9), 9, 9)
    assert (depth[ids >= 0] >= 1).all()
    assert (depth[ids >= 0] <= 3).all()
    assert (ids[..., :4] == -1).all()


def test_empty_inputs():
    vertices, faces, uvs = square()
    ids, weights, depth = mesh_raster(vertices[:0], faces[:0], *pinhole(5), 5, 7)
    assert ids.shape == (1, 5, 7)
    assert weights.shape == (1, 5, 7, 2)
    assert (ids == -1).all()
    assert (depth == torch.inf).all()
    rgb, alpha = render(vertices[:0], faces[:0], uvs[:0], plain(), 5, background=(0.2, 0.4, 1.0))
    assert rgb[0, 2, 2].tolist() == [51, 102, 255]
    assert (alpha == 0).all()
    assert mesh_raster(vertices, faces, *(c[:0] for c in pinhole(5)), 5, 7)[0].shape == (0, 5, 7)


def test_wrong_inputs_are_value_errors():
    vertices, faces, uvs = square()
    for index in (-1, 4):
        broken = faces.clone()
        broken[1, 1] = index
        with pytest.raises(ValueError, match="faces: expected indices in"):
            mesh_raster(vertices, broken, *pinhole(5), 5, 5)
        with pytest.raises(ValueError, match="faces: expected indices in"):
            mesh_raster(vertices, broken, *pinhole(5), 5, 5, implementation="reference")
    viewmats, Ks = pinhole(5)
    with pytest.raises(ValueError, match="vertices"):
        mesh_raster(vertices.double(), faces, viewmats, Ks, 5, 5)
    with pytest.raises(ValueError, match="faces"):
        mesh_raster(vertices, faces.long(), viewmats, Ks, 5, 5)
    with pytest.raises(ValueError, match="viewmats"):
        mesh_raster(vertices, faces, viewmats[0], Ks, 5, 5)
    with pytest.raises(ValueError, match="Ks"):
        mesh_raster(vertices, faces, viewmats, Ks.repeat(2, 1, 1), 5, 5)
    with pytest.raises(ValueError, match="height"):
        mesh_raster(vertices, faces, viewmats, Ks, 0, 5)
    with pytest.raises(ValueError, match="near"):
        mesh_raster(vertices, faces, viewmats, Ks, 5, 5, 0.0)
    with pytest.raises(ValueError, match="uvs"):
        render(vertices, faces, uvs[:1], plain(), 5)
    with pytest.raises(ValueError, match="texture"):
        render(vertices, faces, uvs, torch.zeros((2, 3, 3), dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match="supersample"):
        render(vertices, faces, uvs, plain(), 5, supersample=17)
    with pytest.raises(ValueError, match="size"):
        render(vertices, faces, uvs, plain(), 0)
    with pytest.raises(ValueError, match="normals"):
        render(vertices, faces, uvs, plain(), 5, normals=vertices[:3])


def test_offsets_that_do_not_fit_are_value_errors():
    inputs = list(next(iter(module._batch_examples("cpu"))))
    for offsets in (inputs[2] + 1, inputs[2].flip(0), inputs[2][:-1], inputs[2].int()):
        with pytest.raises(ValueError, match="vertex_offsets"):
            mesh_render_batch(*inputs[:2], offsets, *inputs[3:])
    with pytest.raises(ValueError, match="face_offsets"):
        mesh_render_batch(*inputs[:3], inputs[3] * 2, *inputs[4:])
    with pytest.raises(ValueError, match="offsets"):
        mesh_render_batch(*inputs[:2], None, None, *inputs[4:])


def test_a_batch_is_its_objects_one_by_one():
    inputs = next(iter(module._batch_examples("cpu")))
    rgb, alpha = mesh_render_batch(*inputs)
    vertices, faces, vertex_at, face_at, uvs, textures, _, viewmats, Ks, size, lights, ambient, background = inputs
    for o in range(3):
        v, f = slice(vertex_at[o], vertex_at[o + 1]), slice(face_at[o], face_at[o + 1])
        one = mesh_render(
            vertices[v], faces[f], uvs[f], textures[o], None, viewmats[o], Ks[o], size, lights[o], float(ambient[o]),
            background[o],
        )  # fmt: skip
        assert torch.equal(rgb[o], one[0])
        assert torch.equal(alpha[o], one[1])


def test_v_points_up_and_u_right():
    texture = torch.tensor([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=torch.uint8)
    rgb, alpha = render(*square(), texture, 8, supersample=1)
    assert rgb[0, 0, 0].tolist() == [255, 0, 0]  # row 0 of the texture is the top
    assert rgb[0, 0, 7].tolist() == [0, 255, 0]
    assert rgb[0, 7, 0].tolist() == [0, 0, 255]
    assert rgb[0, 7, 7].tolist() == [255, 255, 255]
    assert (alpha == 255).all()


def test_the_background_shows_through_partly_covered_pixels():
    vertices, faces, uvs = square(half=0.25)  # of 6 pixels, those from 1.5 to 4.5
    rgb, alpha = render(vertices, faces, uvs, plain(), 6, background=(0.0, 0.4, 1.0))
    assert alpha[0, 3].tolist() == [0, 128, 255, 255, 128, 0]
    assert alpha[0, 1, 1] == 64
    assert rgb[0, 3, 0].tolist() == [0, 102, 255]
    assert rgb[0, 3, 1].tolist() == [128, 179, 255]
    assert rgb[0, 3, 2].tolist() == [255, 255, 255]


@pytest.mark.parametrize("factor", [2, 3])
def test_supersampling_is_a_box_filter(factor):
    generator = torch.Generator().manual_seed(1)
    vertices, faces = icosphere(1)
    vertices += torch.tensor([0.0, 0.0, 1.5])
    uvs = torch.rand((len(faces), 3, 2), generator=generator)
    texture = torch.randint(0, 256, (9, 9, 3), generator=generator, dtype=torch.uint8)
    size, options = 15, {"background": (0.1, 0.9, 0.3), "ambient": 0.8}
    rgb, alpha = render(vertices, faces, uvs, texture, size, supersample=factor, **options)
    fine, fine_alpha = render(vertices, faces, uvs, texture, size * factor, supersample=1, **options)
    boxes = fine[0].float().reshape(size, factor, size, factor, 3).mean((1, 3))
    assert (boxes - rgb[0]).abs().max() <= 1.01  # the fine picture was rounded already
    boxes = fine_alpha[0].float().reshape(size, factor, size, factor).mean((1, 3))
    assert (boxes - alpha[0]).abs().max() <= 0.51


def test_light_is_lambertian_two_sided_and_saturates():
    vertices, faces, uvs = square()
    toward = torch.tensor([[0.0, 0.6, -0.8, 0.5]])  # the camera looks along +z
    for winding in (faces, faces.flip(1)):
        grey = render(vertices, winding, uvs, plain(value=200), 4, lights=toward, ambient=0.2)[0]
        assert (grey == 120).all()  # 200 (0.2 + 0.5 0.8)
    behind = torch.tensor([[0.0, 0.6, 0.8, 0.5]])
    away = render(vertices, faces, uvs, plain(value=200), 4, lights=behind, ambient=0.2)[0]
    assert (away == 40).all()
    bright = render(vertices, faces, uvs, plain(value=200), 4, lights=toward * 10, ambient=0.2)[0]
    assert (bright == 200).all()
    dark = render(vertices, faces, uvs, plain(value=200), 4, ambient=-1.0)[0]
    assert (dark == 0).all()


def test_vertex_normals_are_interpolated_and_face_the_camera():
    vertices, faces, uvs = square()
    normals = torch.tensor([[0.0, 0.0, 2.0]]).repeat(4, 1)  # away from the camera: turned round
    light = torch.tensor([[0.0, 0.0, -1.0, 1.0]])
    rgb, _ = render(vertices, faces, uvs, plain(), 4, lights=light, ambient=0.0, normals=normals)
    assert (rgb == 255).all()
    tilted = torch.nn.functional.normalize(torch.tensor([[-1.0, 0, -1], [1, 0, -1], [1, 0, -1], [-1, 0, -1]]), dim=-1)
    side = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    row = render(vertices, faces, uvs, plain(), 64, lights=side, ambient=0.0, normals=tilted)[0][0, 32, :, 0]
    assert (row[:32] == 0).all()
    assert (row[32:].int().diff() >= 0).all()
    assert abs(int(row[-1]) - 255 * math.sin(math.pi / 4)) < 3


def test_gradients_and_strides_are_no_obstacle():
    vertices, faces, _ = square()
    wanted = mesh_raster(vertices, faces, *pinhole(7), 7, 7)[0]
    strided = torch.stack([vertices, vertices], -1)[..., 0].requires_grad_()
    ids, _, depth = mesh_raster(strided, faces, *pinhole(7), 7, 7)
    assert torch.equal(ids, wanted)
    assert not depth.requires_grad
