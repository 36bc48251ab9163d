"""Triangle meshes as pictures: which triangle a pixel shows (mesh_raster), and the shaded, textured look (mesh_render).

Cameras are OpenCV's: `viewmats` map world to camera (x right, y down, z forward) and are rigid, `Ks` have the last row
(0, 0, 1) and positive focal lengths, pixel centres lie at +0.5. Triangles are two-sided. A sample belongs to a
triangle by homogeneous edge functions in double precision (Olano and Greer 1997), so triangles that cross the near
plane are cut at it sample by sample, and triangles that share an edge leave no gap. At equal float32 depth the lower
triangle wins; results are the same from run to run. A triangle without area or with a vertex that is not finite draws
nothing.

A face index out of range raises ValueError on the CPU. On CUDA, where looking would wait for the GPU, such a face
draws nothing.
"""

from collections.abc import Iterable, Sequence

import torch

from sv3d_fast.kernels import native
from sv3d_fast.kernels.op import Implementation, Op


def _ready(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return tensor.contiguous()


def _scratch(images: int, height: int, width: int, triangles: int, device: torch.device) -> torch.Tensor:
    """Room for a 64-bit key per sample and the queue of large triangles."""
    return torch.empty(8 * images * height * width + 4 * (triangles + 1), dtype=torch.uint8, device=device)


def _check_cameras(viewmats: torch.Tensor, Ks: torch.Tensor, dims: int) -> None:
    leading = "(O, C, " if dims == 4 else "(C, "
    if viewmats.ndim != dims or viewmats.shape[-2:] != (4, 4):
        raise ValueError(f"viewmats: expected shape {leading}4, 4), got {tuple(viewmats.shape)}")
    if Ks.shape != (*viewmats.shape[:-2], 3, 3):
        raise ValueError(f"Ks: expected shape {(*viewmats.shape[:-2], 3, 3)}, got {tuple(Ks.shape)}")


def _raster_native(vertices, faces, viewmats, Ks, height, width, near=0.01):
    _check_cameras(viewmats, Ks, 3)
    if height < 1 or width < 1:
        raise ValueError(f"height and width: expected positive numbers of pixels, got {height} and {width}")
    device, views = vertices.device, len(viewmats)
    ids = torch.empty((1, views, height, width), dtype=torch.int32, device=device)
    weights = torch.empty((1, views, height, width, 2), device=device)
    depth = torch.empty((1, views, height, width), device=device)
    inputs = (_ready(vertices), _ready(faces), _ready(viewmats[None]), _ready(Ks[None]), float(near))
    if device.type == "cuda":
        scratch = _scratch(views, height, width, len(faces) * views, device)
        native.load("cuda").mesh_raster(*inputs, scratch, ids, weights, depth)
    else:
        native.load("cpu").mesh_raster(*inputs, ids, weights, depth)
    return ids[0], weights[0], depth[0]


def raster_reference(
    vertices: torch.Tensor, faces: torch.Tensor, viewmats: torch.Tensor, Ks: torch.Tensor, height: int, width: int,
    near: float = 0.01,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """mesh_raster in float64, every triangle against every pixel: the ray through a pixel solved for its weights.

    A pixel exactly on an edge counts for both triangles.
    """
    _check_cameras(viewmats, Ks, 3)
    if len(faces) and (int(faces.min()) < 0 or int(faces.max()) >= len(vertices)):
        raise ValueError(f"faces: expected indices in [0, {len(vertices)}), got {faces.min()}..{faces.max()}")
    device, views = vertices.device, len(viewmats)
    y, x = torch.meshgrid(
        torch.arange(height, device=device).double() + 0.5, torch.arange(width, device=device).double() + 0.5,
        indexing="ij",
    )  # fmt: skip
    pixels = torch.stack([x, y, torch.ones_like(x)]).reshape(3, -1)
    ids = torch.full((views, height * width), -1, dtype=torch.int32, device=device)
    weights = torch.zeros((views, height * width, 2), device=device)
    depth = torch.full((views, height * width), torch.inf, device=device)
    rotation, translation = viewmats[:, :3, :3].double(), viewmats[:, :3, 3:].double()
    corners = Ks.double() @ (rotation @ vertices.double().mT + translation)  # (C, 3, V), homogeneous pixels
    for face, (i, j, k) in enumerate(faces.tolist()):
        triangle = corners[:, :, [i, j, k]]
        usable = triangle.isfinite().all(-1).all(-1)
        triangle = torch.where(usable[:, None, None], triangle, torch.zeros_like(triangle))
        inverse, singular = torch.linalg.inv_ex(triangle)
        usable &= (singular == 0) & inverse.isfinite().all(-1).all(-1)
        parts = inverse @ pixels  # weight / depth of each corner
        total = parts.sum(1)
        z = (1 / total).float()
        covered = usable[:, None] & (parts >= 0).all(1) & (z >= near) & (z < depth)
        depth = torch.where(covered, z, depth)
        ids = torch.where(covered, face, ids)
        weights = torch.where(covered[..., None], (parts[:, :2] / total[:, None]).mT.float(), weights)
    shape = (views, height, width)
    return ids.reshape(shape), weights.reshape(*shape, 2), depth.reshape(shape)


def _render_native(
    vertices, faces, vertex_offsets, face_offsets, uvs, texture, normals, viewmats, Ks, size, lights, ambient,
    background, supersample=2, near=0.01,
):  # fmt: skip
    _check_cameras(viewmats, Ks, 4)
    if size < 1 or supersample < 1:
        raise ValueError(f"size and supersample: expected positive numbers, got {size} and {supersample}")
    device, (objects, views) = vertices.device, viewmats.shape[:2]
    rgb = torch.empty((objects, views, size, size, 3), dtype=torch.uint8, device=device)
    alpha = torch.empty((objects, views, size, size), dtype=torch.uint8, device=device)
    inputs = (
        _ready(vertices), _ready(faces),
        None if vertex_offsets is None else _ready(vertex_offsets),
        None if face_offsets is None else _ready(face_offsets),
        _ready(uvs), _ready(texture), None if normals is None else _ready(normals), _ready(viewmats), _ready(Ks),
        _ready(lights), _ready(ambient), _ready(background), float(near), int(supersample),
    )  # fmt: skip
    if device.type == "cuda":
        side = size * supersample
        scratch = _scratch(objects * views, side, side, len(faces) * views, device)
        native.load("cuda").mesh_render(*inputs, scratch, rgb, alpha)
    else:
        native.load("cpu").mesh_render(*inputs, rgb, alpha)
    return rgb, alpha


def _shade_reference(vertices, faces, uvs, texture, normals, viewmats, lights, ids, weights):
    """(C, H, W, 3) albedo in 0..1, and (C, H, W) cosines weighted by intensity, summed over the lights."""
    face = ids.clamp(min=0).long()
    corner = faces.long()[face]  # (C, H, W, 3)
    w = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)[..., None]
    uv = (w * uvs[face]).sum(-2)
    grid = torch.stack([2 * uv[..., 0] - 1, 1 - 2 * uv[..., 1]], -1)
    picture = (texture.float() / 255).permute(2, 0, 1).expand(len(ids), -1, -1, -1)
    albedo = torch.nn.functional.grid_sample(picture, grid, padding_mode="border", align_corners=False)
    points = vertices[corner]
    flat = torch.linalg.cross(points[..., 1, :] - points[..., 0, :], points[..., 2, :] - points[..., 0, :])
    eye = -(viewmats[:, :3, :3].mT @ viewmats[:, :3, 3:])[:, None, None, :, 0]
    facing = (flat * (eye - points[..., 0, :])).sum(-1, keepdim=True)
    normal = flat = torch.nn.functional.normalize(torch.where(facing < 0, -flat, flat), dim=-1, eps=1e-30)
    if normals is not None:
        smooth = (w * normals[corner]).sum(-2)
        smooth = torch.where((smooth * flat).sum(-1, keepdim=True) < 0, -smooth, smooth)
        usable = smooth.norm(dim=-1, keepdim=True) > 0
        normal = torch.where(usable, torch.nn.functional.normalize(smooth, dim=-1, eps=1e-30), flat)
    cosine = (normal @ lights[:, :3].mT).clamp(min=0)
    return albedo.permute(0, 2, 3, 1), cosine @ lights[:, 3]


def render_batch_reference(
    vertices, faces, vertex_offsets, face_offsets, uvs, textures, normals, viewmats, Ks, size, lights, ambient,
    background, supersample=2, near=0.01,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """mesh_render_batch in plain torch, object by object on raster_reference."""
    _check_cameras(viewmats, Ks, 4)
    vertex_at = [0, len(vertices)] if vertex_offsets is None else vertex_offsets.tolist()
    face_at = [0, len(faces)] if face_offsets is None else face_offsets.tolist()
    colors, coverages = [], []
    for o, (views, K) in enumerate(zip(viewmats, Ks, strict=True)):
        own_vertices = slice(vertex_at[o], vertex_at[o + 1])
        own_faces = slice(face_at[o], face_at[o + 1])
        mesh = (vertices[own_vertices], faces[own_faces])
        samples = torch.cat([K[:, :2] * supersample, K[:, 2:]], 1)
        ids, weights, _ = raster_reference(*mesh, views, samples, size * supersample, size * supersample, near)
        covered = (ids >= 0).float()[..., None]
        color = background[o].expand(*ids.shape, 3)
        if len(mesh[1]):
            normal = None if normals is None else normals[own_vertices]
            albedo, light = _shade_reference(*mesh, uvs[own_faces], textures[o], normal, views, lights[o], ids, weights)
            shaded = albedo * (ambient[o] + light).clamp(0, 1)[..., None]
            color = torch.where(covered > 0, shaded, color)
        boxes = torch.cat([color, covered], -1).reshape(len(views), size, supersample, size, supersample, 4)
        pixels = (boxes.mean((2, 4)).clamp(0, 1) * 255 + 0.5).to(torch.uint8)
        colors.append(pixels[..., :3])
        coverages.append(pixels[..., 3])
    return torch.stack(colors), torch.stack(coverages)


def _one(run_batch):
    """The batch form run on one object."""

    def run(
        vertices, faces, uvs, texture, normals, viewmats, Ks, size, lights, ambient, background, supersample=2,
        near=0.01,
    ):  # fmt: skip
        device = vertices.device
        ambient = torch.full((1,), float(ambient), device=device)
        background = torch.as_tensor(background, dtype=torch.float32, device=device)
        rgb, alpha = run_batch(
            vertices, faces, None, None, uvs, texture[None], normals, viewmats[None], Ks[None], size, lights[None],
            ambient, background[None], supersample, near,
        )  # fmt: skip
        return rgb[0], alpha[0]

    return run


render_reference = _one(render_batch_reference)


def _cameras(views: int, size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    from sv3d_fast.camera import Orbit

    orbit = Orbit.sine(frames=views)
    return orbit.world_to_camera().to(device), orbit.intrinsics(size).to(device)


def _example_mesh(faces: int, device: str) -> tuple[torch.Tensor, ...]:
    """Random triangles around the origin, their texture coordinates and a texture."""
    generator = torch.Generator().manual_seed(faces)
    centre = torch.rand((faces, 1, 3), generator=generator) - 0.5
    vertices = (centre + 0.3 * torch.randn((faces, 3, 3), generator=generator)).reshape(-1, 3)
    indices = torch.arange(3 * faces, dtype=torch.int32).reshape(faces, 3)
    uvs = torch.rand((faces, 3, 2), generator=generator)
    texture = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
    return tuple(t.to(device) for t in (vertices, indices, uvs, texture))


def _raster_examples(device: str) -> Iterable[tuple]:
    for faces, views, height, width in ((40, 2, 37, 53), (1, 1, 1, 1), (200, 3, 64, 64)):
        viewmats, Ks = _cameras(views, height, device)
        yield (*_example_mesh(faces, device)[:2], viewmats, Ks, height, width)


def _render_examples(device: str) -> Iterable[tuple]:
    lights = torch.tensor([[0.6, 0.0, 0.8, 0.7], [0.0, -1.0, 0.0, 0.3]], device=device)
    for faces, views, size, supersample in ((40, 2, 33, 2), (1, 1, 1, 1), (100, 3, 16, 3)):
        vertices, indices, uvs, texture = _example_mesh(faces, device)
        normals = torch.nn.functional.normalize(vertices, dim=-1) if supersample == 3 else None
        cameras = _cameras(views, size, device)
        yield vertices, indices, uvs, texture, normals, *cameras, size, lights, 0.3, (1.0, 1.0, 1.0), supersample


def _batch_examples(device: str) -> Iterable[tuple]:
    meshes = [_example_mesh(faces, device) for faces in (30, 0, 7)]
    vertices, faces, uvs, textures = zip(*meshes, strict=True)
    offsets = [torch.tensor([0, *map(len, parts)], device=device).cumsum(0) for parts in (vertices, faces)]
    viewmats, Ks = (c.expand(3, *c.shape) for c in _cameras(2, 19, device))
    lights = torch.tensor([0.6, 0.0, 0.8, 0.7], device=device).expand(3, 1, 4)
    ambient, background = torch.linspace(0.1, 0.5, 3, device=device), torch.eye(3, device=device)
    yield (
        torch.cat(vertices), torch.cat(faces), *offsets, torch.cat(uvs), torch.stack(textures), None, viewmats, Ks, 19,
        lights, ambient, background,
    )  # fmt: skip


def _op(name: str, reference, run, examples, tolerance: float) -> Op:
    implementations = [
        Implementation("cuda", run, lambda vertices, *args, **kwargs: native.why_not("cuda", vertices)),
        Implementation("csrc", run, lambda vertices, *args, **kwargs: native.why_not("cpu", vertices)),
    ]
    return Op(name, reference, implementations, examples, tolerance, "csrc/mesh_raster.h")


_RASTER = _op("mesh_raster", raster_reference, _raster_native, _raster_examples, 1e-5)
_BATCH = _op("mesh_render_batch", render_batch_reference, _render_native, _batch_examples, 1e-2)
_RENDER = _op("mesh_render", render_reference, _one(_render_native), _render_examples, 1e-2)


def mesh_raster(
    vertices: torch.Tensor,
    faces: torch.Tensor,
    viewmats: torch.Tensor,
    Ks: torch.Tensor,
    height: int,
    width: int,
    near: float = 0.01,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The nearest triangle at every pixel centre of every view.

    vertices: (V, 3) float32, world. faces: (F, 3) int32. viewmats: (C, 4, 4), Ks: (C, 3, 3) float32 in pixels.
    near: samples at a smaller camera depth are not drawn.
    Returns triangle_id (C, H, W) int32, -1 where there is none; barycentrics (C, H, W, 2) float32, the
    perspective-correct weights of the triangle's corners 0 and 1 (corner 2 has the rest; 0 where there is none);
    depth (C, H, W) float32 camera z, +inf where there is none.
    Raises ValueError for shapes, dtypes or devices that don't fit and, on the CPU, for a face index out of range.
    """
    return _RASTER(vertices, faces, viewmats, Ks, height, width, near, implementation=implementation)


def mesh_render(
    vertices: torch.Tensor,
    faces: torch.Tensor,
    uvs: torch.Tensor,
    texture: torch.Tensor,
    normals: torch.Tensor | None,
    viewmats: torch.Tensor,
    Ks: torch.Tensor,
    size: int,
    lights: torch.Tensor,
    ambient: float,
    background: torch.Tensor | Sequence[float],
    supersample: int = 2,
    near: float = 0.01,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Square pictures of a textured, lit mesh.

    uvs: (F, 3, 2) float32, u right, v up. texture: (R, R, 3) uint8 sRGB, row 0 at v = 1, looked up bilinearly and
    clamped at its border. normals: (V, 3) float32 vertex normals, or None for face normals; a normal is turned to the
    side of its face that the camera sees. lights: (L, 4) float32, the unit direction towards the light in the world
    and its intensity. background: 3 numbers in [0, 1]. Ks: intrinsics for `size`, in pixels. The rest as mesh_raster.
    Colours are sRGB values as they are: albedo * clamp(ambient + sum_i intensity_i * max(0, n . l_i), 0, 1), averaged
    with the background over supersample^2 samples of a pixel.
    Returns rgb (C, size, size, 3) uint8 and alpha (C, size, size) uint8, the share of the samples that are covered.
    Raises ValueError as mesh_raster.
    """
    return _RENDER(
        vertices, faces, uvs, texture, normals, viewmats, Ks, size, lights, ambient, background, supersample, near,
        implementation=implementation,
    )  # fmt: skip


def mesh_render_batch(
    vertices: torch.Tensor,
    faces: torch.Tensor,
    vertex_offsets: torch.Tensor,
    face_offsets: torch.Tensor,
    uvs: torch.Tensor,
    textures: torch.Tensor,
    normals: torch.Tensor | None,
    viewmats: torch.Tensor,
    Ks: torch.Tensor,
    size: int,
    lights: torch.Tensor,
    ambient: torch.Tensor,
    background: torch.Tensor,
    supersample: int = 2,
    near: float = 0.01,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """mesh_render of O different objects in one launch.

    vertices, faces, uvs, normals: those of all objects, one after the other; faces index their own object's vertices.
    vertex_offsets, face_offsets: (O + 1,) int64, where each object starts, the total last, on the same device.
    textures: (O, R, R, 3). viewmats: (O, C, 4, 4). Ks: (O, C, 3, 3). lights: (O, L, 4). ambient: (O,) and
    background: (O, 3) float32.
    Returns rgb (O, C, size, size, 3) uint8 and alpha (O, C, size, size) uint8. Raises ValueError as mesh_raster.
    """
    return _BATCH(
        vertices, faces, vertex_offsets, face_offsets, uvs, textures, normals, viewmats, Ks, size, lights, ambient,
        background, supersample, near, implementation=implementation,
    )  # fmt: skip
