"""TripoSR's scenes: surfaces and renders, against shapes that are known in closed form."""

import math

import numpy as np
import pytest
import torch
import trimesh

from bench.thin_shapes import DENSITIES, SHAPES, VOXEL, on_grid, rod
from sv3d_fast.kernels.marching_cubes import marching_cubes
from sv3d_fast.triposr import TripoSR, extract
from sv3d_fast.triposr.config import TripoSRConfig, ViTConfig
from sv3d_fast.triposr.render import orbit_rays

RADIUS = 0.87
CENTER, AXES = torch.tensor([0.12, 0.2, -0.15]), torch.tensor([0.5, 0.3, 0.4])  # of the ellipsoid, world units
CONFIG = TripoSRConfig(
    image_size=16,
    vit=ViTConfig(width=8, layers=1, heads=1, mlp_width=8, image_size=16),
    plane_size=2,
    channels=8,
    heads=1,
    head_width=8,
    layers=1,
    groups=2,
    plane_channels=4,
    neurons=6,
    hidden_layers=3,
)
SHIFT = 30.0  # SiLU is the identity up here, which makes the decoder linear


def ellipsoid(points: torch.Tensor) -> torch.Tensor:
    """Raw density: 1 + ln 25 on the ellipsoid, more inside."""
    return 1 + math.log(25) + 4 * (1 - ((points - CENTER) / AXES).square().sum(-1))


@pytest.fixture(scope="module")
def model() -> TripoSR:
    """A model whose decoder adds up the first channels of the planes, and takes colours from the others."""
    model = TripoSR(CONFIG).requires_grad_(False)
    first, *middle, last = model.decoder.layers[::2]
    for layer in (first, *middle, last):
        layer.weight.zero_()
        layer.bias.zero_()
    first.bias[:4] = SHIFT
    for channel in range(4):
        first.weight[channel, [channel, 4 + channel, 8 + channel]] = 1
        last.weight[channel, channel] = 1
    for layer in middle:
        layer.weight.copy_(torch.eye(6))
    last.bias.fill_(-SHIFT)
    return model


@pytest.fixture(scope="module")
def codes() -> torch.Tensor:
    """(2, 3, 4, 96, 96): an ellipsoid, coloured by position (red grows with x, green with y, blue with z); nothing."""
    size = 96
    texel = ((torch.arange(size) + 0.5) / size * 2 - 1) * RADIUS
    v, u = torch.meshgrid(texel, texel, indexing="ij")  # rows follow the plane's second axis
    x, y, z = [torch.zeros(3, size, size) for _ in range(3)]
    x[0], y[0], z[1] = u, v, v
    squares = [((t - c) / a).square() for t, c, a in zip((u, v, v), CENTER, AXES, strict=True)]
    density = torch.stack([1 + math.log(25) + 4 * (1 - squares[0] - squares[1]), -4 * squares[2], torch.zeros_like(u)])
    scene = torch.stack([density, 2 * x, 2 * y, 2 * z], dim=1)
    empty = torch.full_like(scene, -5.0)
    return torch.stack([scene, empty])


def as_trimesh(mesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)


@pytest.mark.parametrize("resolution", [33, 70, 131])  # strides of 1, 2 and 3
def test_mesh_lies_on_the_surface_in_world_axes(model, codes, resolution):
    (mesh,) = model.extract_mesh(codes[:1], resolution=resolution)
    solid = as_trimesh(mesh)
    assert solid.is_watertight
    assert solid.body_count == 1
    assert solid.volume == pytest.approx(4 / 3 * math.pi * float(AXES.prod()), rel=0.02)  # positive: wound outwards
    torch.testing.assert_close(mesh.vertices.amax(0), CENTER + AXES, atol=0.01, rtol=0)
    torch.testing.assert_close(mesh.vertices.amin(0), CENTER - AXES, atol=0.01, rtol=0)
    # on the raw density: a tenth of what vertices at grid points would miss it by
    error = (((mesh.vertices - CENTER) / AXES).norm(dim=1) - 1).abs() * AXES.min()
    assert float(error.max()) < 0.1 * 2 * RADIUS / (resolution - 1)


def test_vertices_carry_the_color_at_their_place(model, codes):
    (mesh,) = model.extract_mesh(codes[:1], resolution=40)
    assert mesh.colors.dtype == torch.uint8
    inner = mesh.vertices.abs().amax(1) < 0.8  # planes fade to zero at their border
    expected = (2 * mesh.vertices).sigmoid() * 255
    assert float((mesh.colors - expected)[inner].abs().max()) < 1
    (plain,) = model.extract_mesh(codes[:1], has_vertex_color=False, resolution=40)
    assert plain.colors is None
    assert torch.equal(plain.faces, mesh.faces)


def test_a_lower_threshold_gives_a_larger_mesh(model, codes):
    sizes = []
    for threshold in (5.0, 25.0, 60.0):
        (mesh,) = model.extract_mesh(codes[:1], resolution=50, threshold=threshold)
        scale = math.sqrt(1 - math.log(threshold / 25) / 4)
        volume = as_trimesh(mesh).volume
        assert volume == pytest.approx(4 / 3 * math.pi * float(AXES.prod()) * scale**3, rel=0.03)
        sizes.append(volume)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("chunk_size", [0, 97, 5000])
def test_chunk_size_has_no_effect(model, codes, chunk_size):
    (expected,) = model.extract_mesh(codes[:1], resolution=35)
    view = model.render(codes[:1], 2, height=9, width=14, return_type="pt")
    model.renderer.set_chunk_size(chunk_size)
    try:
        (mesh,) = model.extract_mesh(codes[:1], resolution=35)
        chunked = model.render(codes[:1], 2, height=9, width=14, return_type="pt")
    finally:
        model.renderer.chunk_size = None
    assert torch.equal(mesh.faces, expected.faces)
    torch.testing.assert_close(mesh.vertices, expected.vertices, atol=1e-5, rtol=0)
    assert int((mesh.colors.int() - expected.colors.int()).abs().max()) <= 1
    torch.testing.assert_close(torch.stack(chunked[0]), torch.stack(view[0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 1}, r"resolution: expected grid points in \[2, 1024\], got 1"),
        ({"resolution": 64.0}, "resolution: expected grid points"),
        ({"threshold": 0.0}, "threshold: expected a positive density"),
        ({"threshold": float("nan")}, "threshold: expected a positive density"),
        ({"has_vertex_color": 256}, "has_vertex_color: expected True or False, got 256"),
        ({"threshold": 1e4}, "threshold: expected a density that scene 0 crosses, got 10000"),
    ],
)
def test_arguments_out_of_range(model, codes, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.extract_mesh(codes[:1], **({"resolution": 20} | arguments))


def test_scenes_that_are_none(model, codes):
    with pytest.raises(ValueError, match="scene 1 crosses"):
        model.extract_mesh(codes, resolution=20)
    with pytest.raises(ValueError, match=r"scene_codes: expected shape \(B, 3, 4, S, S\)"):
        model.extract_mesh(codes[0])
    with pytest.raises(ValueError, match="scene_codes: expected finite values"):
        model.extract_mesh(codes[:1] * float("nan"))
    with pytest.raises(ValueError, match="chunk_size"):
        model.renderer.set_chunk_size(-1)


# --- coarse to fine ---


def counting(density, resolution):
    """The field as `sample_grid` takes it, and the places that it was asked for."""
    field, asked = on_grid(density, resolution, torch.device("cpu")), []

    def evaluate(places):
        asked.append(places)
        return field(places)

    return evaluate, asked


@pytest.mark.parametrize("raw", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_coarse_to_fine_equals_dense_on_thin_parts(shape, raw):
    resolution, cpu = 121, torch.device("cpu")
    evaluate, _ = counting(lambda p: DENSITIES[raw](SHAPES[shape](p)), resolution)
    dense = extract.sample_grid(evaluate, resolution, 4.0, 1, cpu)
    vertices, faces = marching_cubes(-dense, -4.0)
    assert len(faces) > 100
    for stride in (3, 4, 7):  # 7 leaves a last cell of one voxel
        refined = extract.sample_grid(evaluate, resolution, 4.0, stride, cpu)
        some_vertices, some_faces = marching_cubes(-refined, -4.0)
        assert torch.equal(some_faces, faces)
        torch.testing.assert_close(some_vertices, vertices, atol=1e-3, rtol=0)


def test_few_points_are_evaluated():
    evaluate, asked = counting(lambda p: DENSITIES["linear"](SHAPES["table"](p)), 193)
    extract.surface(evaluate, 193, 4.0, torch.device("cpu"))
    assert sum(map(len, asked)) < 0.12 * 193**3


def test_a_surface_is_followed_where_slopes_do_not_show_it():
    """A rod in a field that is flat but for one voxel around it, found only where it meets a ball."""

    def field(p):
        distance = torch.minimum((p - torch.tensor([-0.6, 0.0, 0.0])).norm(dim=1) - 0.203,
                                 rod(p, (-0.6, 0.02, 0.02), (0.8, 0.41, 0.02), 1.2 * VOXEL))  # fmt: skip
        return 4 - (distance / VOXEL).clamp(-1, 1)

    evaluate, _ = counting(field, 121)
    dense = extract.sample_grid(evaluate, 121, 4.0, 1, torch.device("cpu"))
    refined = extract.sample_grid(evaluate, 121, 4.0, 10, torch.device("cpu"))
    assert torch.equal(refined > 4, dense > 4)


def test_a_surface_that_leaves_the_grid_is_open_as_in_the_dense_one():
    evaluate, _ = counting(lambda p: 4 - 10 * (p.norm(dim=1) - 1.2), 50)
    dense = extract.sample_grid(evaluate, 50, 4.0, 1, torch.device("cpu"))
    refined = extract.sample_grid(evaluate, 50, 4.0, 5, torch.device("cpu"))
    assert torch.equal(refined > 4, dense > 4)


# --- renders ---


def test_views_go_around_as_the_orbit_does():
    origins, directions = orbit_rays(4, 30.0, 2.0, 50.0, 5, 7)
    assert origins.shape == directions.shape == (4, 5, 7, 3)
    high, out = 2 * math.sin(math.pi / 6), 2 * math.cos(math.pi / 6)
    stands = torch.tensor([[out, 0, high], [0, out, high], [-out, 0, high], [0, -out, high]])
    torch.testing.assert_close(origins[:, 0, 0], stands, atol=1e-6, rtol=0)
    torch.testing.assert_close(directions[:, 2, 3], -stands / 2, atol=1e-6, rtol=0)  # the middle pixel: at the origin
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(4, 5, 7))
    assert (directions[0, :, -1, 1] > directions[0, :, 0, 1]).all()  # +y on the right of the input view
    assert (directions[:, 0, :, 2] > directions[:, -1, :, 2]).all()  # +z upwards
    # the angle between the top and bottom edges, half a pixel beyond the outer pixels' centres
    slope = math.tan(math.radians(25))
    _, level = orbit_rays(1, 0.0, 2.0, 50.0, 5, 7)
    top, bottom = level[0, 0, 3], level[0, -1, 3]
    assert float(top[2] / -top[0]) == pytest.approx(0.8 * slope, abs=1e-6)
    assert float(bottom[2] / -bottom[0]) == pytest.approx(-0.8 * slope, abs=1e-6)


def test_renders_show_the_object_where_it_is(model, codes):
    (views,) = model.render(codes[:1], 4, camera_distance=2.5, height=48, width=64, return_type="pt")
    for view, (right, forward) in zip(views, (((0, 1, 0), (-1, 0, 0)), ((-1, 0, 0), (0, -1, 0))), strict=False):
        covered = (view.min(-1).values < 0.9).nonzero().float() + 0.5
        row, column = covered.mean(0)
        right, forward = torch.tensor(right).float(), torch.tensor(forward).float()
        depth = 2.5 + float(forward @ CENTER)
        focal = 24 / math.tan(math.radians(20))
        assert float(column) == pytest.approx(32 + focal * float(right @ CENTER) / depth, abs=1.5)
        assert float(row) == pytest.approx(24 - focal * float(CENTER[2]) / depth, abs=1.5)
    # an opaque surface shows the colour at the point where the ray meets it
    torch.testing.assert_close(views[0][0, 0], torch.ones(3))
    row, column = 29, 38
    origins, directions = orbit_rays(1, 0.0, 2.5, 40.0, 48, 64)
    o, d = ((t[0, row, column] - c) / AXES for t, c in ((origins, CENTER), (directions, torch.zeros(3))))
    b, c = float(o @ d), float(o @ o) - 1
    distance = (-b - math.sqrt(b * b - float(d @ d) * c)) / float(d @ d)
    hit = origins[0, row, column] + distance * directions[0, row, column]
    torch.testing.assert_close(views[0][row, column], (2 * hit).sigmoid(), atol=0.12, rtol=0)


def test_render_return_types(model, codes):
    images = {kind: model.render(codes, 3, height=6, width=4, return_type=kind) for kind in ("pil", "np", "pt")}
    assert [len(scene) for scene in images["pil"]] == [3, 3]
    assert images["pil"][0][0].size == (4, 6)
    for scene in range(2):
        for view in range(3):
            pixels = images["pt"][scene][view]
            assert np.array_equal(images["np"][scene][view], pixels.numpy())
            levels = np.asarray(images["pil"][scene][view]).astype(float)
            assert np.abs(levels - pixels.numpy() * 255).max() <= 1
    assert np.asarray(images["pil"][1][0]).min() == 255  # nothing there
    with pytest.raises(ValueError, match="return_type: expected 'pil', 'np' or 'pt', got 'jpg'"):
        model.render(codes, 1, return_type="jpg")
    with pytest.raises(ValueError, match="n_views, height, width"):
        model.render(codes, 0)
    with pytest.raises(ValueError, match="fovy_deg"):
        model.render(codes, 1, fovy_deg=180.0)


def test_rays_past_the_cube_show_white(model, codes):
    origins = torch.tensor([[2.0, 0.0, 0.9], [2.0, 0.0, 0.0], [0.0, 2.0, 0.2], [2.0, 0.2, -0.15]])
    directions = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    colors = model.renderer(model.decoder, codes[0], origins, directions)
    assert torch.equal(colors[:3], torch.ones(3, 3))
    assert float(colors[3].min()) < 0.7
    with pytest.raises(ValueError, match="rays_d"):
        model.renderer(model.decoder, codes[0], origins, directions[:2])
