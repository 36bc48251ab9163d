"""Marching cubes: closed, oriented, on the level set, and the same vertices as scikit-image's."""

import pytest
import torch
import trimesh
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes as skimage_marching_cubes

from sv3d_fast.kernels.marching_cubes import EDGES, NO_EDGE, case_table, marching_cubes

IMPLEMENTATIONS = ("csrc", "reference")


def mesh_of(vertices, faces):
    return trimesh.Trimesh(vertices.numpy(), faces.numpy(), process=False)


def closed_noise(seed, shape=(13, 20, 17)):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.pad(noise, (1,) * 6, value=1.0)


def sphere_field(shape=(31, 36, 33), radius=11.3):
    center = (torch.tensor(shape) - 1) / 2
    points = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), -1)
    return (points - center).norm(dim=-1) - radius, center


def test_the_table_cuts_every_case_exactly_where_it_changes_sign():
    table = case_table()
    for case in range(256):
        used = set(table[case][table[case] != NO_EDGE].tolist())
        assert used == {e for e, (a, b) in enumerate(EDGES) if (case >> a ^ case >> b) & 1}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sphere_is_closed_on_the_surface_and_wound_outwards(implementation):
    field, center = sphere_field()
    vertices, faces = marching_cubes(field, implementation=implementation)
    mesh = mesh_of(vertices, faces)
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.euler_number == 2
    assert abs((vertices - center).norm(dim=1) - 11.3).max() < 0.02
    assert mesh.volume == pytest.approx(4 / 3 * torch.pi * 11.3**3, rel=0.01)


def test_torus_has_one_handle():
    x, y, z = torch.meshgrid(torch.arange(40.0), torch.arange(41.0), torch.arange(19.0), indexing="ij")
    ring = ((x - 19.3).square() + (y - 20.1).square()).sqrt() - 12
    vertices, faces = marching_cubes((ring.square() + (z - 9.2).square()).sqrt() - 4.5)
    mesh = mesh_of(vertices, faces)
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.euler_number == 0
    assert mesh.volume == pytest.approx(2 * torch.pi**2 * 12 * 4.5**2, rel=0.02)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_noise_is_a_closed_manifold(seed, ties):
    """Noise holds every ambiguous case; rounded noise holds values that equal the level."""
    field = closed_noise(seed)
    field = field.round() if ties else field
    vertices, faces = marching_cubes(field)
    mesh = mesh_of(vertices, faces)
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.volume > 0
    assert mesh.area_faces.min() > 0
    assert len(torch.unique(vertices, dim=0)) == len(vertices)
    assert torch.equal(faces.unique(), torch.arange(len(vertices), dtype=torch.int32))


@pytest.mark.parametrize("seed", range(2))
def test_vertices_are_those_of_scikit_image(seed):
    field = gaussian_filter(closed_noise(seed, (22, 18, 25)).numpy(), 1.0) + 0.02
    vertices, _ = marching_cubes(torch.from_numpy(field), 0.01)
    theirs, _, _, _ = skimage_marching_cubes(field, 0.01, method="lorensen")
    theirs = torch.from_numpy(theirs.copy()).unique(dim=0)
    assert len(vertices) == len(theirs)
    assert cKDTree(vertices.numpy()).query(theirs.numpy())[0].max() < 2e-3
    assert cKDTree(theirs.numpy()).query(vertices.numpy())[0].max() < 2e-3


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 7), (5, 1, 1), (2, 2, 2), (3, 2, 9), (40, 33, 37)])
def test_native_equals_the_reference_at_odd_shapes(shape):
    field = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    vertices, faces = marching_cubes(field, 0.2, implementation="csrc")
    expected_vertices, expected_faces = marching_cubes(field, 0.2, implementation="reference")
    torch.testing.assert_close(vertices, expected_vertices, rtol=1e-6, atol=1e-5)
    assert torch.equal(faces, expected_faces)


SHAPES = [(1, 1, 1), (1, 5, 7), (5, 1, 1), (4, 5, 1), (2, 2, 2), (4, 5, 31), (4, 5, 32), (3, 4, 33), (40, 33, 97)]


@pytest.mark.gpu
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_equals_the_cpu_at_odd_shapes(shape, ties):
    field = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    field, level = (field.round(), 0.0) if ties else (field, 0.2)
    vertices, faces = marching_cubes(field.cuda(), level, implementation="cuda")
    expected_vertices, expected_faces = marching_cubes(field, level, implementation="csrc")
    torch.testing.assert_close(vertices.cpu(), expected_vertices, rtol=1e-6, atol=1e-5)
    assert torch.equal(faces.cpu(), expected_faces)


@pytest.mark.gpu
def test_cuda_takes_views_and_gives_the_same_bits_each_time():
    field = closed_noise(6, (70, 31, 45)).cuda()
    first = marching_cubes(field.permute(2, 0, 1), implementation="cuda")
    second = marching_cubes(field.permute(2, 0, 1).contiguous(), implementation="cuda")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    mesh = mesh_of(*(t.cpu() for t in first))
    assert mesh.is_watertight
    assert mesh.is_winding_consistent


@pytest.mark.gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (4, 6, 40)])
def test_cuda_finds_a_value_that_is_not_finite(place, value):
    field = torch.ones(5, 7, 41, device="cuda")
    field[place] = value
    with pytest.raises(ValueError, match="field: expected finite"):
        marching_cubes(field, implementation="cuda")


def test_result_does_not_depend_on_the_number_of_threads():
    field = closed_noise(5, (50, 31, 40))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = marching_cubes(field)
        torch.set_num_threads(3)
        three = marching_cubes(field)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [-1.0, 1.0, 0.0])
def test_uniform_field_has_no_surface(implementation, value):
    vertices, faces = marching_cubes(torch.full((4, 5, 6), value), implementation=implementation)
    assert vertices.shape == (0, 3)
    assert faces.shape == (0, 3)


def test_view_that_is_not_contiguous():
    field = closed_noise(1)
    a = marching_cubes(field.permute(2, 0, 1))
    b = marching_cubes(field.permute(2, 0, 1).contiguous())
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("field", "level", "named"),
    [
        (torch.zeros(3, 3), 0.0, "field"),
        (torch.zeros(3, 3, 3, dtype=torch.float64), 0.0, "field"),
        (torch.zeros(3, 0, 3), 0.0, "field"),
        (torch.full((3, 3, 3), float("nan")), 0.0, "field"),
        (torch.full((3, 3, 3), float("inf")), 0.0, "field"),
        (torch.zeros(3, 3, 3), float("nan"), "level"),
    ],
)
def test_bad_input_is_named(field, level, named, implementation):
    with pytest.raises(ValueError, match=named):
        marching_cubes(field, level, implementation=implementation)
