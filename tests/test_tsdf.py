"""TSDF fusion: an analytic sphere's depth maps give the sphere back; native and reference agree."""

import math

import pytest
import torch

from sv3d_fast.camera import Orbit
from sv3d_fast.kernels.marching_cubes import marching_cubes
from sv3d_fast.kernels.tsdf import tsdf_fuse

RADIUS, HALF_EXTENT = 0.4, 0.6


def sphere_views(orbit, size, radius=RADIUS):
    """Camera z of the first hit of each pixel's ray with a sphere at the origin, and weights by the cosine there."""
    K = orbit.intrinsics(size)[0]
    pixel = torch.arange(size) + 0.5
    v, u = torch.meshgrid(pixel, pixel, indexing="ij")
    ray = torch.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], torch.ones_like(u)], -1).double()
    a, b, c = ray.square().sum(-1), -2 * orbit.radius * ray[..., 2], orbit.radius**2 - radius**2
    root = b * b - 4 * a * c
    depth = torch.where(root > 0, (-b - root.clamp(min=0).sqrt()) / (2 * a), math.inf)
    normal = (ray * depth.nan_to_num(posinf=0)[..., None] - torch.tensor([0, 0, orbit.radius])) / radius
    cosine = -(normal * ray).sum(-1) / ray.norm(dim=-1)
    weight = torch.where(root > 0, cosine, 0.1)
    return depth.float().repeat(len(orbit), 1, 1), weight.float().repeat(len(orbit), 1, 1)


def all_round(count=4):
    azimuths = torch.arange(count) * (360.0 / count)
    elevations = torch.tensor([-89.0, -45, 0, 45, 89])
    return Orbit(elevations.repeat_interleave(count), azimuths.repeat(5))


@pytest.mark.parametrize("implementation", ["csrc", "reference"])
def test_sphere_is_recovered_within_half_a_voxel(implementation):
    orbit, resolution = all_round(), 48
    voxel = 2 * HALF_EXTENT / resolution
    depths, weights = sphere_views(orbit, 96)
    tsdf, weight = tsdf_fuse(
        depths, weights, orbit.world_to_camera(), orbit.intrinsics(96), resolution, HALF_EXTENT, 4 * voxel,
        implementation=implementation,
    )  # fmt: skip
    center = (torch.arange(resolution) + 0.5) * voxel - HALF_EXTENT
    r = torch.stack(torch.meshgrid(center, center, center, indexing="ij"), -1).norm(dim=-1)
    assert (tsdf[r > RADIUS + voxel] > 0).all()
    assert (weight[r < RADIUS - 6 * voxel] == 0).all()
    assert (weight[(r - RADIUS).abs() < voxel] > 0).all()

    vertices, _ = marching_cubes(torch.where(weight > 0, tsdf, -1.0))
    radii = ((vertices + 0.5) * voxel - HALF_EXTENT).norm(dim=1)
    assert (radii - RADIUS).abs().max() < 0.5 * voxel


def random_views(views, height, width, resolution):
    generator = torch.Generator().manual_seed(views)
    depths = 2 + 0.2 * torch.rand((views, height, width), generator=generator)
    depths[:, :, : width // 4] = math.inf
    weights = torch.rand((views, height, width), generator=generator).sub(0.2).clamp(min=0)
    orbit = Orbit(torch.rand(views, generator=generator) * 60 - 30, torch.rand(views, generator=generator) * 360)
    K = torch.tensor([[1.6 * width, 0, 0.47 * width], [0, 1.6 * height, 0.53 * height], [0, 0, 1]]).repeat(views, 1, 1)
    return depths, weights, orbit.world_to_camera(), K, resolution, HALF_EXTENT, 0.07


def assert_same(results, expected, share=2e-4):
    for ours, theirs in zip(results, expected, strict=True):  # a voxel between two pixels may fall into either
        differs = ~torch.isclose(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)
        assert differs.float().mean() < share


@pytest.mark.parametrize(("views", "height", "width", "resolution"), [(1, 1, 1, 1), (3, 37, 50, 19), (2, 65, 9, 34)])
def test_native_equals_the_reference(views, height, width, resolution):
    inputs = random_views(views, height, width, resolution)
    assert_same(tsdf_fuse(*inputs, implementation="csrc"), tsdf_fuse(*inputs, implementation="reference"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("views", "height", "width", "resolution"),
    [(1, 1, 1, 1), (3, 37, 50, 19), (2, 65, 9, 36), (5, 64, 70, 64), (1, 9, 300, 101)],
)
def test_cuda_equals_the_cpu(views, height, width, resolution):
    inputs = random_views(views, height, width, resolution)
    on_gpu = [a.cuda() if torch.is_tensor(a) else a for a in inputs]
    results = tsdf_fuse(*on_gpu, implementation="cuda")
    assert_same(results, tsdf_fuse(*inputs, implementation="csrc"), share=1e-3)
    again = tsdf_fuse(*on_gpu, implementation="cuda")
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


def test_a_ray_that_hits_nothing_frees_what_it_passes():
    orbit = Orbit.static(0.0, 1)
    depths = torch.full((1, 8, 8), math.inf)
    inputs = orbit.world_to_camera(), orbit.intrinsics(8), 6, 0.3, 0.05
    tsdf, weight = tsdf_fuse(depths, torch.ones_like(depths), *inputs)
    assert (tsdf == 1).all()
    assert (weight == 1).all()
    tsdf, weight = tsdf_fuse(depths, torch.zeros_like(depths), *inputs)
    assert not tsdf.any()
    assert not weight.any()


def test_what_lies_behind_a_surface_or_the_camera_is_not_seen():
    orbit = Orbit.static(0.0, 1)  # at (2, 0, 0)
    depths = torch.full((1, 8, 8), 2.0)
    tsdf, weight = tsdf_fuse(
        depths, torch.ones_like(depths), orbit.world_to_camera(), orbit.intrinsics(8), 20, 0.3, 0.06
    )
    x = (torch.arange(20) + 0.5) * 0.03 - 0.3
    assert (weight[x < -0.061] == 0).all()
    torch.testing.assert_close(tsdf[x > -0.059, 10, 10], (x[x > -0.059] / 0.06).clamp(max=1), atol=1e-4, rtol=0)
    _, weight = tsdf_fuse(depths, torch.ones_like(depths), orbit.world_to_camera(), orbit.intrinsics(8), 20, 6.0, 99.0)
    assert not weight[(torch.arange(20) + 0.5) * 0.6 - 6 > 2.0].any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bad_input_is_named(device):
    orbit = Orbit.static(0.0, 2)
    good = {
        "depths": torch.ones(2, 4, 5),
        "weights": torch.ones(2, 4, 5),
        "viewmats": orbit.world_to_camera(),
        "Ks": orbit.intrinsics(4),
        "resolution": 5,
        "half_extent": 0.5,
        "truncation": 0.1,
    }
    good = {name: value.to(device) if torch.is_tensor(value) else value for name, value in good.items()}
    tsdf_fuse(*good.values())
    for name, value in (
        ("depths", torch.ones(4, 5)),
        ("depths", torch.full((2, 4, 5), math.nan)),
        ("depths", torch.ones(2, 0, 5)),
        ("weights", torch.ones(2, 5, 4)),
        ("weights", -torch.ones(2, 4, 5)),
        ("viewmats", torch.eye(4)),
        ("viewmats", good["viewmats"].double()),
        ("viewmats", torch.full((2, 4, 4), math.nan)),
        ("Ks", torch.ones(1, 3, 3)),
        ("Ks", torch.full((2, 3, 3), math.inf)),
        ("resolution", 0),
        ("half_extent", 0.0),
        ("truncation", math.nan),
    ):
        value = value.to(device) if torch.is_tensor(value) else value
        with pytest.raises(ValueError, match=name):
            tsdf_fuse(*(good | {name: value}).values())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_cameras_whose_products_overflow_do_no_harm(device):
    depths, huge = torch.ones(2, 3, 4, device=device), torch.full((2, 4, 4), 3e38, device=device)
    signs, Ks = torch.tensor([1.0, -1, 1, -1], device=device), torch.full((2, 3, 3), 3e38, device=device)
    for result in tsdf_fuse(depths, depths, huge * signs, Ks, 9, 0.5, 0.1):
        assert result.isfinite().all()
