"""Differentiable Gaussian splatting of coloured splats into pinhole views, as gsplat's classic `rasterization` does.

Perspective EWA splatting (Zwicker et al. 2001) with the constants of 3D Gaussian splatting (Kerbl et al. 2023) as
gsplat 1.5.3 has them: the Jacobian is taken inside 1.3 fields of view, eps2d is added to the screen-space
covariance, an alpha under 1/255 contributes nothing, alpha is capped at 0.999 and a pixel stops before the splat
that would take its transmittance to 1e-4 or less. Splats are composited front to back by the depth of their
centres, ties by index; pixel centres lie at +0.5.
"""

import importlib.util
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sv3d_fast.kernels import native
from sv3d_fast.kernels.op import Implementation, Op

ALPHA_MIN = 1 / 255  # an alpha below this contributes nothing
ALPHA_MAX = 0.999
TRANSMITTANCE_MIN = 1e-4  # a pixel stops before the splat that would reach this
FRUSTUM_MARGIN = 0.15  # of the image, beyond each edge: where the Jacobian of the projection is clamped
MAX_CHANNELS = 16
_TILE = 32  # pixels, of the reference: fewer tensor calls against fewer wasted pixels


def reference(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    backgrounds: Tensor | None = None,
    near: float = 0.01,
    eps2d: float = 0.3,
) -> tuple[Tensor, Tensor]:
    """Renders N splats into C views of height x width pixels. Plain torch; any floating dtype.

    means (N, 3), quats (N, 4) w first and of any length, scales (N, 3) standard deviations, opacities (N,) in
    [0, 1], colors (N, D) or, one set a view, (C, N, D) with D from 1 to 16; viewmats (C, 4, 4) world-to-camera
    (OpenCV axes), Ks (C, 3, 3) in pixels, backgrounds (C, D) composited behind or None for black. Splats nearer than
    `near` are left out.
    Returns colors (C, height, width, D) and alphas (C, height, width, 1).

    Differentiable in the five tensors of the splats; cameras and backgrounds get no gradient. A splat with a
    non-finite value contributes nothing and gets zero gradients. Raises ValueError for shapes, dtypes or devices
    that don't agree and for cameras or backgrounds that require gradients.
    """
    _check(means, quats, scales, opacities, colors, viewmats, Ks, width, height, backgrounds, near, eps2d)
    images, alphas = [], []
    behind = [None] * len(Ks) if backgrounds is None else backgrounds
    for viewmat, K, background, own in zip(viewmats, Ks, behind, _per_view(colors, len(Ks)), strict=True):
        splats = means, quats, scales, opacities, own
        finite = _finite(*splats)
        camera = (viewmat, K, width, height, eps2d)
        with torch.no_grad():
            means2d, depths, conics, variances = project(means, quats, scales, *camera)
            projected = torch.cat([means2d, conics, variances], -1).isfinite().all(-1)
            visible = torch.where(finite & projected & (depths >= near) & (opacities >= ALPHA_MIN))[0]
            order = visible[depths[visible].argsort(stable=True)]
        means_, quats_, scales_, opacities_, colors_ = (t[order] for t in splats)
        means2d, _, conics, variances = project(means_, quats_, scales_, *camera)
        image, transmittance = _blend(means2d, conics, variances, opacities_, colors_, width, height)
        images.append(image if background is None else image + transmittance * background)
        alphas.append(1 - transmittance)
    return torch.stack(images), torch.stack(alphas)


def project(
    means: Tensor, quats: Tensor, scales: Tensor, viewmat: Tensor, K: Tensor, width: int, height: int, eps2d: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centres (N, 2) in pixels, depths (N,), inverse covariances (N, 3) as xx, xy, yy, and variances (N, 2) in px^2."""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    rotation = torch.stack(
        [
            1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
        ],
        -1,
    ).unflatten(-1, (3, 3))  # fmt: skip
    factor = viewmat[:3, :3] @ (rotation * scales[:, None, :])  # camera-frame covariance = factor factor^T
    x, y, z = (means @ viewmat[:3, :3].T + viewmat[:3, 3]).unbind(-1)
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    margin_x, margin_y = FRUSTUM_MARGIN * width, FRUSTUM_MARGIN * height
    u = torch.clamp(x / z, -(cx + margin_x) / fx, (width - cx + margin_x) / fx)
    v = torch.clamp(y / z, -(cy + margin_y) / fy, (height - cy + margin_y) / fy)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * u / z, zero, fy / z, -fy * v / z], -1).unflatten(-1, (2, 3))
    half = jacobian @ factor
    covariance = half @ half.mT
    xx, xy, yy = covariance[:, 0, 0] + eps2d, covariance[:, 0, 1], covariance[:, 1, 1] + eps2d
    determinant = xx * yy - xy * xy
    conics = torch.stack([yy, -xy, xx], -1) / determinant[:, None]
    return torch.stack([fx * x / z + cx, fy * y / z + cy], -1), z, conics, torch.stack([xx, yy], -1)


def _per_view(colors: Tensor, views: int) -> Tensor:
    """(C, N, D) colours of each view."""
    return colors if colors.ndim == 3 else colors.expand(views, -1, -1)


def _blend(means2d, conics, variances, opacities, colors, width, height) -> tuple[Tensor, Tensor]:
    """Image (height, width, D) on black and transmittance (height, width, 1) of splats sorted by depth."""
    reach = (2 * torch.log(opacities.detach() / ALPHA_MIN))[:, None].sqrt() * variances.detach().sqrt() + 1
    low, high = means2d.detach() - reach, means2d.detach() + reach
    rows = []
    for y0 in range(0, height, _TILE):
        row = []
        for x0 in range(0, width, _TILE):
            y1, x1 = min(y0 + _TILE, height), min(x0 + _TILE, width)
            inside = (low[:, 0] < x1) & (high[:, 0] > x0) & (low[:, 1] < y1) & (high[:, 1] > y0)
            hit = torch.where(inside)[0]
            ys = torch.arange(y0, y1, device=means2d.device, dtype=means2d.dtype) + 0.5
            xs = torch.arange(x0, x1, device=means2d.device, dtype=means2d.dtype) + 0.5
            dx = (means2d[hit, 0, None] - xs)[:, None, :]
            dy = (means2d[hit, 1, None] - ys)[:, :, None]
            a, b, c = (conics[hit, i, None, None] for i in range(3))
            sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
            alpha = torch.clamp(opacities[hit, None, None] * torch.exp(-sigma), max=ALPHA_MAX)
            alpha = torch.where((sigma >= 0) & (alpha >= ALPHA_MIN), alpha, 0)
            alive = torch.cumprod(1 - alpha.detach(), 0) > TRANSMITTANCE_MIN
            alpha = torch.where(alive, alpha, 0)
            after = torch.cumprod(torch.cat([torch.ones_like(xs + ys[:, None])[None], 1 - alpha]), 0)
            image = torch.einsum("nhw,nd->hwd", alpha * after[:-1], colors[hit])
            row.append(torch.cat([image, after[-1, :, :, None]], -1))
        rows.append(torch.cat(row, 1))
    result = torch.cat(rows)
    return result[..., :-1], result[..., -1:]


def _finite(*tensors: Tensor) -> Tensor:
    """(N,) whether every value of a splat is finite."""
    return torch.stack([t.detach().flatten(1).isfinite().all(1) if t.ndim > 1 else t.detach().isfinite()
                        for t in tensors]).all(0)  # fmt: skip


def _check(means, quats, scales, opacities, colors, viewmats, Ks, width, height, backgrounds, near, eps2d):
    n, channels = means.shape[0] if means.ndim else 0, colors.shape[-1] if colors.ndim else 0
    if not 1 <= channels <= MAX_CHANNELS:
        raise ValueError(
            f"colors: expected (N, D) or (C, N, D) with D from 1 to {MAX_CHANNELS}, got {tuple(colors.shape)}"
        )
    views = viewmats.shape[0] if viewmats.ndim else 0
    named = {
        "means": (means, (n, 3)), "quats": (quats, (n, 4)), "scales": (scales, (n, 3)),
        "opacities": (opacities, (n,)), "colors": (colors, (views, n, channels) if colors.ndim == 3 else (n, channels)),
        "viewmats": (viewmats, (views, 4, 4)), "Ks": (Ks, (views, 3, 3)),
    }  # fmt: skip
    if backgrounds is not None:
        named["backgrounds"] = (backgrounds, (views, channels))
    for name, (tensor, shape) in named.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != means.dtype or not tensor.is_floating_point() or tensor.device != means.device:
            raise ValueError(
                f"{name}: expected the floating dtype and device of means ({means.dtype}, {means.device}), "
                f"got {tensor.dtype}, {tensor.device}"
            )
        if name in ("viewmats", "Ks", "backgrounds") and tensor.requires_grad:
            raise ValueError(f"{name}: gets no gradient, so expected a tensor that doesn't require one")
    if views < 1 or width < 1 or height < 1:
        raise ValueError(f"views, width and height: expected at least one, got {views}, {width}, {height}")
    if not near > 0 or not eps2d >= 0:
        raise ValueError(f"near and eps2d: expected near > 0 and eps2d >= 0, got {near}, {eps2d}")


def _background(means, colors, viewmats, width, height, backgrounds) -> tuple[Tensor, Tensor]:
    """What views of no splats show."""
    shape = (len(viewmats), height, width, colors.shape[-1])
    image = colors.new_zeros(shape) if backgrounds is None else backgrounds[:, None, None].expand(shape).clone()
    return image, colors.new_zeros(*shape[:3], 1)


def _gsplat(
    means, quats, scales, opacities, colors, viewmats, Ks, width, height, backgrounds=None, near=0.01, eps2d=0.3
):
    _check(means, quats, scales, opacities, colors, viewmats, Ks, width, height, backgrounds, near, eps2d)
    if len(means) == 0:
        return _background(means, colors, viewmats, width, height, backgrounds)
    import gsplat

    # gsplat culls a splat of opacity 0 before it rasterises, whatever its other values are.
    finite = _finite(means, quats, scales, opacities, colors if colors.ndim == 2 else colors.movedim(0, 1))
    opacities = torch.where(finite, opacities, 0)
    image, alphas, _ = gsplat.rasterization(
        means, quats, scales, opacities, colors, viewmats, Ks, width, height,
        near_plane=near, eps2d=eps2d, backgrounds=backgrounds,
        packed=False, sh_degree=None, rasterize_mode="classic",
    )  # fmt: skip
    return image, alphas


class _Csrc(torch.autograd.Function):
    """The native passes; keeps the projections, the sorted tile lists and where each pixel stopped."""

    @staticmethod
    def forward(ctx, means, quats, scales, opacities, colors, viewmats, Ks, width, height, backgrounds, near, eps2d):
        cpu = native.load("cpu")
        splats = [t.detach().contiguous() for t in (means, quats, scales, opacities, colors)]
        cameras = [t.contiguous() for t in (viewmats, Ks)]
        colors = splats[-1]
        views, n, channels = len(viewmats), len(means), colors.shape[1]
        behind = colors.new_empty(0, channels) if backgrounds is None else backgrounds.contiguous()
        projected, keys = colors.new_empty(views, n, 10), colors.new_empty(views, n, 2)
        base = colors.new_empty(views * n + 1, dtype=torch.int32)
        pairs = cpu.splat_raster_project(*splats, *cameras, width, height, near, eps2d, projected, keys, base)
        tiles = -(-width // 16) * -(-height // 16)
        ids, slots = (base.new_empty(pairs) for _ in range(2))
        offsets, last = base.new_empty(views, tiles + 1), base.new_empty(views, height, width)
        images = colors.new_empty(views, height, width, channels)
        alphas, transmittance = (colors.new_empty(views, height, width) for _ in range(2))
        cpu.splat_raster_forward(
            projected, keys, base, colors, behind, width, height, ids, slots, offsets,
            images, alphas, transmittance, last,
        )  # fmt: skip
        ctx.eps2d = eps2d
        ctx.save_for_backward(*splats, *cameras, behind, projected, base, ids, slots, offsets, transmittance, last)
        return images, alphas[..., None]

    @staticmethod
    @once_differentiable
    def backward(ctx, v_images, v_alphas):
        means, quats, scales, opacities, colors, viewmats, Ks, behind, projected, base, *lists = ctx.saved_tensors
        height, width = v_images.shape[1:3]
        moments = colors.new_empty(len(lists[0]), 6 + colors.shape[1])
        native.load("cpu").splat_raster_backward(
            projected, colors, behind, width, height, *lists,
            v_images.contiguous(), v_alphas[..., 0].contiguous(), moments,
        )  # fmt: skip
        gradients = [torch.empty_like(t) for t in (means, quats, scales, opacities, colors)]
        native.load("cpu").splat_raster_project_backward(
            means, quats, scales, viewmats, Ks, width, height, ctx.eps2d, projected, base, moments, *gradients
        )
        return *gradients, *[None] * 7


def _csrc(means, quats, scales, opacities, colors, viewmats, Ks, width, height, backgrounds=None, near=0.01, eps2d=0.3):
    arguments = (means, quats, scales, opacities, colors, viewmats, Ks, width, height, backgrounds, near, eps2d)
    _check(*arguments)
    if colors.ndim == 2:
        return _Csrc.apply(*arguments)
    views = []
    for view, own in enumerate(colors):
        one = slice(view, view + 1)
        behind = None if backgrounds is None else backgrounds[one]
        splats = means, quats, scales, opacities, own
        views.append(_Csrc.apply(*splats, viewmats[one], Ks[one], width, height, behind, near, eps2d))
    images, alphas = zip(*views, strict=True)
    return torch.cat(images), torch.cat(alphas)


def _why_not_csrc(means, *args, **kwargs) -> list[str]:
    reasons = [] if means.device.type == "cpu" else [f"needs CPU tensors, got {means.device}"]
    if means.dtype != torch.float32:
        reasons.append(f"needs float32, got {means.dtype}")
    if not native.available("cpu"):
        reasons.append("the CPU library is not built")
    return reasons


def _why_not_gsplat(means, *args, **kwargs) -> list[str]:
    reasons = [] if means.is_cuda else [f"needs CUDA tensors, got {means.device}"]
    if means.dtype != torch.float32:
        reasons.append(f"needs float32, got {means.dtype}")
    if importlib.util.find_spec("gsplat") is None:
        reasons.append("gsplat is not installed")
    return reasons


def _scene(device: str, n: int, channels: int, views: int = 2, size: float = 0.06, seed: int = 0) -> tuple:
    """Splats of the unit ball seen from `views` cameras two units away."""
    g = torch.Generator().manual_seed(seed)
    means = F.normalize(torch.randn(n, 3, generator=g), dim=-1) * torch.rand(n, 1, generator=g) * 0.5
    quats = torch.randn(n, 4, generator=g)
    scales = size * torch.exp(0.5 * torch.randn(n, 3, generator=g))
    opacities = torch.rand(n, generator=g)
    colors = torch.rand(n, channels, generator=g)
    viewmats = torch.eye(4).repeat(views, 1, 1)
    angles = torch.arange(views) * 2.4
    viewmats[:, 0, 0], viewmats[:, 0, 2] = angles.cos(), angles.sin()
    viewmats[:, 2, 0], viewmats[:, 2, 2] = -angles.sin(), angles.cos()
    viewmats[:, 2, 3] = 2.0
    return tuple(t.to(device) for t in (means, quats, scales, opacities, colors, viewmats))


def _camera(device: str, views: int, width: int, height: int) -> Tensor:
    focal = 1.6 * max(width, height)
    return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], device=device).repeat(views, 1, 1)


def _examples(device: str) -> Iterator[tuple]:
    for n, channels, views, width, height in ((150, 3, 2, 53, 37), (1, 1, 1, 1, 1), (60, 7, 1, 32, 16)):
        scene = _scene(device, n, channels, views)
        backgrounds = torch.linspace(0, 1, views * channels, device=device).view(views, channels)
        yield (*scene, _camera(device, views, width, height), width, height, backgrounds)
    *splats, colors, viewmats = _scene(device, 40, 5, views=3)
    own = torch.stack([colors, colors.flip(0), -colors])
    yield (*splats, own, viewmats, _camera(device, 3, 29, 18), 29, 18)


splat_raster = Op(
    name="splat_raster",
    reference=reference,
    implementations=(
        Implementation("gsplat", _gsplat, _why_not_gsplat),
        Implementation("csrc", _csrc, _why_not_csrc),
    ),
    examples=_examples,
    tolerance=1e-5,
    source="gsplat 1.5.3, rasterization(rasterize_mode='classic')",
)
