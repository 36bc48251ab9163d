"""The splat rasteriser: the reference against gsplat's own maths, the native passes against the reference."""

import math

import pytest
import torch
from torch.nn import functional as F

from sv3d_fast.camera import Orbit
from sv3d_fast.kernels.op import UnsupportedError
from sv3d_fast.kernels.splat_raster import project, reference, splat_raster

NAMES = ("means", "quats", "scales", "opacities", "colors")


def scene(n=200, channels=3, views=2, width=53, height=37, size=0.05, seed=0, dtype=torch.float32):
    """Splats in the unit ball, seen by `views` cameras of an orbit; backgrounds differ by view and channel."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(n, 3, generator=g) * 0.25
    quats = torch.randn(n, 4, generator=g) * 3
    scales = size * torch.exp(0.6 * torch.randn(n, 3, generator=g))
    opacities = torch.rand(n, generator=g)
    colors = torch.randn(n, channels, generator=g)
    orbit = Orbit.sine(frames=views)
    Ks = orbit.intrinsics(max(width, height))
    Ks[:, 0, 2], Ks[:, 1, 2] = width / 2 + 0.3, height / 2 - 0.7
    backgrounds = torch.randn(views, channels, generator=g)
    tensors = (means, quats, scales, opacities, colors, orbit.world_to_camera(), Ks)
    return (*(t.to(dtype) for t in tensors), width, height, backgrounds.to(dtype))


def run(implementation, arguments, **options):
    """Images, alphas and the gradients of the five tensors under random output gradients."""
    arguments = [a.clone().requires_grad_(i < 5) if torch.is_tensor(a) else a for i, a in enumerate(arguments)]
    images, alphas = splat_raster(*arguments, implementation=implementation, **options)
    g = torch.Generator().manual_seed(1)
    loss = (images * torch.randn(images.shape, generator=g).to(images.dtype)).sum()
    loss = loss + (alphas * torch.randn(alphas.shape, generator=g).to(images.dtype)).sum()
    loss.backward()
    return images.detach(), alphas.detach(), *(a.grad for a in arguments[:5])


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


def assert_agrees(arguments, **options):
    exact = [a.double() if torch.is_tensor(a) else a for a in arguments]
    got, expected = run("csrc", arguments, **options), run("reference", exact, **options)
    for name, a, b in zip(("images", "alphas", *NAMES), got, expected, strict=True):
        assert a.isfinite().all(), name
        assert relative(a, b) <= (1e-5 if name in ("images", "alphas") else 1e-4), name
    return got


CASES = {
    "odd": {},
    "one splat": {"n": 1, "size": 0.3},
    "one pixel": {"width": 1, "height": 1, "views": 1},
    "one channel": {"channels": 1},
    "seven channels": {"channels": 7},
    "sixteen channels": {"channels": 16, "n": 60},
    "many tiles": {"width": 150, "height": 70, "n": 300, "views": 3},
    "narrow": {"width": 5, "height": 90},
    "dense enough to saturate": {"n": 900, "size": 0.2, "views": 1},
    "needles": {"n": 60, "size": 0.05, "seed": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_native_agrees_with_the_reference(case):
    arguments = list(scene(**CASES[case]))
    if case == "needles":
        arguments[2] = arguments[2] * torch.tensor([0.02, 0.02, 6.0])
    assert_agrees(arguments)


def test_black_background_and_options():
    arguments = scene()[:-1]
    assert_agrees(arguments, near=2.0, eps2d=0.05)


def test_huge_splat_covers_everything_and_alpha_is_capped():
    arguments = list(scene(n=3, width=70, height=50))
    arguments[2][0], arguments[3][0], arguments[0][0] = 30.0, 1.0, 0.0
    _, alphas, *_ = assert_agrees(arguments)
    assert alphas.min() > 0.99


def test_splats_around_the_camera_and_beyond_the_frustum():
    arguments = list(scene(n=300, views=3))
    arguments[0] = arguments[0] * 8
    assert_agrees(arguments)


def test_ties_in_depth_go_by_index():
    arguments = list(scene(n=2, views=1, size=0.3))
    arguments[0][:], arguments[3][:] = 0.0, 0.7
    image, *_ = assert_agrees(arguments)
    swapped, *_ = run("csrc", [a.flip(0) if i < 5 else a for i, a in enumerate(arguments)])
    assert relative(swapped, image) > 0.01


@pytest.mark.parametrize("implementation", ["csrc", "reference"])
@pytest.mark.parametrize("case", ["none", "behind", "transparent"])
def test_nothing_to_see_shows_the_background(implementation, case):
    arguments = list(scene(n=0 if case == "none" else 20))
    if case == "behind":
        arguments[5] = torch.diag(torch.tensor([1.0, 1, 1, 1])).repeat(2, 1, 1)
        arguments[0] = arguments[0] - torch.tensor([0, 0, 10.0])
    if case == "transparent":
        arguments[3] = torch.zeros_like(arguments[3])
    images, alphas, *gradients = run(implementation, arguments)
    assert torch.equal(images, arguments[-1][:, None, None].expand_as(images))
    assert not alphas.any()
    for name, gradient in zip(NAMES, gradients, strict=True):
        assert not gradient.any(), name


@pytest.mark.parametrize("implementation", ["csrc", "reference"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("index", range(5), ids=NAMES)
def test_non_finite_splat_is_left_out(implementation, index, value):
    arguments = list(scene(n=30))
    without = [a[1:] if i < 5 else a for i, a in enumerate(arguments)]
    arguments[index][0] = value
    got, expected = run(implementation, arguments), run(implementation, without)
    for a, b in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(got[2:], expected[2:], strict=True):
        assert not a[0].any()
        torch.testing.assert_close(a[1:], b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["csrc", "reference"])
def test_extreme_finite_values_do_no_harm(implementation):
    arguments = list(scene(n=8))
    arguments[1][0] = 0.0  # no rotation
    arguments[2][1] = 1e30  # the covariance overflows
    arguments[2][2] = 0.0  # a point
    arguments[0][3] = 1e30
    arguments[1][4] = 1e-30
    for result in run(implementation, arguments):
        assert result.isfinite().all()


def test_same_bits_twice_and_for_any_view_alone():
    arguments = scene(n=800, views=3)
    first, second = run("csrc", arguments), run("csrc", arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = splat_raster(*arguments[:5], *(a[1:2] for a in arguments[5:7]), *arguments[7:9], arguments[9][1:2])
    assert torch.equal(alone[0][0], first[0][1])


def test_reference_projects_as_gsplat_does():
    from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci

    means, quats, scales, _, _, viewmats, Ks, width, height, _ = scene(n=300, dtype=torch.float64)
    means = means * 3  # some beyond the frustum, where the Jacobian is clamped
    covariances, _ = _quat_scale_to_covar_preci(quats, scales, True, False)
    _, centres, depths, conics, _ = _fully_fused_projection(means, covariances, viewmats, Ks, width, height, 0.3)
    clamped = 0
    for view in range(len(viewmats)):
        got = project(means, quats, scales, viewmats[view], Ks[view], width, height, 0.3)
        front = got[1] > 0.1
        clamped += int((got[0][front] < -0.15 * width).any(-1).sum())
        for a, b in zip(got, (centres[view], depths[view], conics[view]), strict=False):
            torch.testing.assert_close(a[front], b[front], rtol=1e-9, atol=1e-9)
    assert clamped > 5


def test_reference_blends_as_the_definition_says():
    arguments = scene(n=25, views=1, size=0.2, width=9, height=7, dtype=torch.float64)
    images, alphas = reference(*arguments)
    means, quats, scales, opacities, colors, viewmats, Ks, width, height, backgrounds = arguments
    centres, depths, conics, _ = project(means, quats, scales, viewmats[0], Ks[0], width, height, 0.3)
    for row in range(height):
        for column in range(width):
            color, through = torch.zeros(3, dtype=torch.float64), 1.0
            for i in depths.argsort().tolist():
                dx, dy = centres[i, 0] - (column + 0.5), centres[i, 1] - (row + 0.5)
                a, b, c = conics[i]
                alpha = min(0.999, float(opacities[i] * torch.exp(-(a * dx * dx + 2 * b * dx * dy + c * dy * dy) / 2)))
                if alpha < 1 / 255:
                    continue
                if through * (1 - alpha) <= 1e-4:
                    break
                color += through * alpha * colors[i]
                through *= 1 - alpha
            torch.testing.assert_close(images[0, row, column], color + through * backgrounds[0])
            assert float(alphas[0, row, column, 0]) == pytest.approx(1 - through)


def test_gradcheck_of_the_reference():
    *splats, viewmats, Ks, width, height, backgrounds = scene(n=4, width=5, height=4, size=0.4, dtype=torch.float64)
    splats = [t.requires_grad_() for t in splats]
    assert torch.autograd.gradcheck(lambda *s: reference(*s, viewmats, Ks, width, height, backgrounds), splats)


@pytest.mark.parametrize("index", range(5), ids=NAMES)
def test_native_gradient_is_the_slope_of_a_smooth_loss(index):
    arguments = list(scene(n=40, size=0.15, views=1, width=31, height=29))
    arguments[3] = 0.3 + 0.4 * arguments[3]
    g = torch.Generator().manual_seed(4)
    target = F.interpolate(torch.randn(1, 3, 4, 4, generator=g), (29, 31), mode="bilinear").movedim(1, -1).double()

    def loss(value):
        changed = [value if i == index else a for i, a in enumerate(arguments)]
        images, alphas = splat_raster(*changed, implementation="csrc")
        return (images.double() * target).sum() + alphas.double().square().sum()

    value = arguments[index].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(value), value)
    direction = gradient / gradient.norm()  # the steepest: the kink at alpha = 1/255 is least against it
    step = 1e-3
    with torch.no_grad():
        slope = (loss(arguments[index] + step * direction) - loss(arguments[index] - step * direction)) / (2 * step)
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.02)


def test_no_gradient_is_recorded_when_none_is_needed():
    images, alphas = splat_raster(*scene(), implementation="csrc")
    assert not images.requires_grad
    assert not alphas.requires_grad


def test_strided_inputs_and_partial_gradients():
    arguments = list(scene())
    expected = run("csrc", arguments)
    arguments[4] = arguments[4].T.contiguous().T
    colors = arguments[4].clone().requires_grad_()
    images, _ = splat_raster(*arguments[:4], colors, *arguments[5:], implementation="csrc")
    assert torch.equal(images.detach(), expected[0])
    images.sum().backward()
    assert colors.grad.isfinite().all()


BAD = {
    "means": lambda a: a.__setitem__(0, a[0][:, :2]),
    "quats": lambda a: a.__setitem__(1, a[1][1:]),
    "scales": lambda a: a.__setitem__(2, a[2].double()),
    "opacities": lambda a: a.__setitem__(3, a[3][:, None]),
    "colors": lambda a: a.__setitem__(4, torch.rand(len(a[0]), 17)),
    "viewmats": lambda a: a.__setitem__(5, a[5][0]),
    "Ks": lambda a: a.__setitem__(6, a[6][:1]),
    "width": lambda a: a.__setitem__(7, 0),
    "backgrounds": lambda a: a.__setitem__(9, a[9][:, :1]),
    "near": lambda a: a.append(0.0),
    "eps2d": lambda a: a.extend((0.01, -1.0)),
    "gets no gradient": lambda a: a[5].requires_grad_(),
}


@pytest.mark.parametrize("implementation", ["csrc", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(implementation, name):
    arguments = list(scene(n=5))
    BAD[name](arguments)
    with pytest.raises(ValueError, match=name):
        splat_raster(*arguments, implementation=implementation)


def test_implementations_say_why_they_can_not_run():
    arguments = scene(n=2, dtype=torch.float64)
    assert splat_raster.choose(*arguments).name == "reference"
    with pytest.raises(UnsupportedError, match="needs float32"):
        splat_raster(*arguments, implementation="csrc")
    with pytest.raises(UnsupportedError, match="needs CUDA tensors"):
        splat_raster(*arguments, implementation="gsplat")
    assert splat_raster.choose(*scene(n=2)).name == "csrc"


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["odd", "seven channels", "dense enough to saturate"])
def test_gsplat_agrees_with_the_reference(case):
    arguments = [a.cuda() if torch.is_tensor(a) else a for a in scene(**CASES[case])]
    leaves = [a.clone().requires_grad_(i < 5) if torch.is_tensor(a) else a for i, a in enumerate(arguments)]
    twins = [a.clone().requires_grad_(i < 5) if torch.is_tensor(a) else a for i, a in enumerate(arguments)]
    got, expected = splat_raster(*leaves, implementation="gsplat"), reference(*twins)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) <= 1e-4
    for pair in (got, expected):
        (pair[0].square().sum() + pair[1].square().sum()).backward()
    for name, a, b in zip(NAMES, leaves, twins, strict=False):
        assert relative(a.grad, b.grad) <= 2e-3, name


@pytest.mark.parametrize("implementation", ["csrc", "reference"])
def test_colours_of_each_view_are_those_of_separate_calls(implementation):
    *splats, colors, viewmats, Ks, width, height, backgrounds = scene(n=50, channels=4, views=3)
    own = torch.stack([colors, 1 - colors, colors.flip(1)])
    weights = torch.randn(3, height, width, 4, generator=torch.Generator().manual_seed(1))

    def gradients(render):
        leaves = [t.clone().requires_grad_() for t in (*splats, own)]
        image, alpha = render(leaves)
        return image, alpha, *torch.autograd.grad((image * weights).sum() + alpha.square().sum(), leaves)

    def together(leaves):
        return splat_raster(*leaves, viewmats, Ks, width, height, backgrounds, implementation=implementation)

    def apart(leaves):
        *shape, colors = leaves
        views = [
            splat_raster(*shape, colors[v], viewmats[v][None], Ks[v][None], width, height, backgrounds[v][None],
                         implementation="reference")
            for v in range(3)
        ]  # fmt: skip
        return tuple(map(torch.cat, zip(*views, strict=True)))

    for a, b in zip(gradients(together), gradients(apart), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()
