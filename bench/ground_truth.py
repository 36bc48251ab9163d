"""Orbits of known meshes: 14 small CC0 models, exact renders of them, and the ways in which frames can be spoilt."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sv3d_fast.camera import Orbit
from sv3d_fast.kernels.mesh_raster import mesh_render
from sv3d_fast.mini.bake import bake
from sv3d_fast.mini.catalogue import Model, read_library
from sv3d_fast.mini.data import fetch, to_world
from sv3d_fast.mini.geometry import fit_to_frame, shade_smoothly
from sv3d_fast.mini.pack import Entry, Object, load_objects, write_pack
from sv3d_fast.mini.scenes import STANDARD_AMBIENT, STANDARD_LIGHTS
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.video import OrbitVideo

LIBRARY = "BlendSwap-CC-0.sh3f"
MODELS = (
    "crate", "stoneLantern", "barrel", "tetrapak", "bread", "couch2", "chair2", "rock1", "basketball", "cupcake",
    "hotDog", "woodToy", "tableWithTablecloth", "osakaChair",
)  # fmt: skip
ATLAS = 1024
SUPERSAMPLING = 4
LOWEST, HIGHEST = -10.0, 40.0  # elevations of the novel views, degrees
REFERENCE = 576  # the size that the pixels of WARP and BLUR are given at
GAIN, WARP, BLUR, CRF = 0.1, 2.0, 3.0, 23  # colour gain either way, pixels, pixels (at the very back), of H.264


@dataclass(frozen=True)
class Truth:
    """A model as it is rendered: surface with texture, and the normals that shade it, (V, 3)."""

    name: str
    mesh: Mesh
    normals: torch.Tensor

    def orbit(self, orbit: Orbit, size: int) -> OrbitVideo:
        """Anti-aliased frames on white with their masks, light standing still in the world."""
        mesh, device = self.mesh, self.mesh.vertices.device
        cameras = orbit.world_to_camera().to(device), orbit.intrinsics(size).to(device)
        lights = torch.tensor(STANDARD_LIGHTS, device=device)
        rgb, alpha = mesh_render(
            mesh.vertices, mesh.faces, mesh.uvs, mesh.texture, self.normals, *cameras, size, lights, STANDARD_AMBIENT,
            (1.0, 1.0, 1.0), SUPERSAMPLING,
        )  # fmt: skip
        return OrbitVideo(rgb, orbit, alpha.float() / 255)


def write_models(path: Path, cache: Path) -> None:
    """Fetches the furniture library into `cache` unless it is there, and packs the 14 models with their materials."""
    libraries, _ = fetch(cache)
    entries = {_name(model.key): _entry(model) for model in read_library(libraries / LIBRARY)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_pack(path, [entries[name] for name in MODELS])


def read_models(path: Path, names: Sequence[str], device: torch.device) -> list[Truth]:
    """The models of these names. Raises ValueError for a name that the pack lacks."""
    objects = {_name(o.key): o for o in load_objects(path, "held_out")}
    missing = sorted(set(names) - set(objects))
    if missing:
        raise ValueError(f"models: expected names of {sorted(objects)}, got {missing}")
    return [_truth(name, objects[name], device) for name in names]


def novel_views(orbit: Orbit) -> Orbit:
    """A camera halfway between each two of an orbit's, elevations spread over LOWEST to HIGHEST in a mixed order."""
    count = len(orbit)
    stride = next(s for s in range(round(0.382 * count), count + 1) if np.gcd(s, count) == 1)
    share = (torch.arange(count) * stride % count) / max(count - 1, 1)
    return Orbit(LOWEST + (HIGHEST - LOWEST) * share, orbit.azimuths + 180 / count, orbit.radius, orbit.fov)


def jittered(video: OrbitVideo, seed: int = 0) -> OrbitVideo:
    """Each view's object has gains of its own, 1 -+ GAIN per channel; the background stays white."""
    gains = 1 + GAIN * (2 * torch.rand(len(video.orbit), 1, 1, 3, generator=_generator(seed)) - 1)
    shade = 255 - video.frames.float()
    background = 255 * (1 - _alpha(video)[..., None])
    own = 255 - shade - background  # the object's part of each pixel
    frames = own * gains.to(own) + background
    return OrbitVideo(_bytes(frames), video.orbit, video.alpha)


def warped(video: OrbitVideo, seed: int = 0) -> OrbitVideo:
    """Each view is displaced by a smooth random field of up to WARP pixels, and its mask with it."""
    views, size = len(video.orbit), video.size
    coarse = 2 * torch.rand(views, 2, 5, 5, generator=_generator(seed)) - 1
    field = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True).clamp(-1, 1)
    pixels = (field * WARP * size / REFERENCE).permute(0, 2, 3, 1).to(video.frames.device)
    axis = (torch.arange(size, device=pixels.device) + 0.5) * 2 / size - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1) + pixels * 2 / size
    picture = torch.cat([video.frames.float(), 255 * _alpha(video)[..., None]], -1).permute(0, 3, 1, 2)
    moved = F.grid_sample(picture, grid, mode="bilinear", padding_mode="border", align_corners=False)
    moved = moved.permute(0, 2, 3, 1)
    return OrbitVideo(_bytes(moved[..., :3]), video.orbit, moved[..., 3] / 255)


def blurred(video: OrbitVideo) -> OrbitVideo:
    """Views behind the object lose detail: Gaussians of up to BLUR pixels opposite the input view."""
    back = -torch.cos(torch.deg2rad(video.orbit.azimuths - video.orbit.azimuths[-1]))
    sigmas = (BLUR * video.size / REFERENCE * back.clamp(min=0)).tolist()
    frames = video.frames.float().permute(0, 3, 1, 2)
    for view, sigma in enumerate(sigmas):
        if sigma > 0.1:
            frames[view] = _blur(frames[view], sigma)
    return OrbitVideo(_bytes(frames.permute(0, 2, 3, 1)), video.orbit, video.alpha)


def compressed(video: OrbitVideo) -> OrbitVideo:
    """The frames after H.264 at crf 23 and 4:2:0, without their masks, as an mp4 would give them."""
    import av  # here, since machines that measure on clean frames alone need not have it

    buffer, size = io.BytesIO(), video.size
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": str(CRF)})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for frame in video.frames.cpu().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer) as decoded:
        frames = [frame.to_ndarray(format="rgb24") for frame in decoded.decode(video=0)]
    return OrbitVideo(torch.from_numpy(np.stack(frames)).to(video.frames.device), video.orbit)


def _blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    radius = int(3 * sigma) + 1
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=image.device) / sigma) ** 2)
    taps = (taps / taps.sum()).view(1, 1, -1, 1)
    padded = F.pad(image[:, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, taps), taps.mT)[:, 0]


def _alpha(video: OrbitVideo) -> torch.Tensor:
    assert video.alpha is not None
    return video.alpha


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(0, 255).round().to(torch.uint8)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _name(key: str) -> str:
    return key.partition("#")[2]


def _entry(model: Model) -> Entry:
    uvs, texture = bake(model.mesh, model.pictures, ATLAS)
    used, faces = np.unique(model.mesh.faces, return_inverse=True)
    vertices = fit_to_frame(to_world(model.mesh.vertices[used]))
    vertices, faces, normals = shade_smoothly(vertices, faces.reshape(model.mesh.faces.shape))
    return Entry(
        model.title, model.key, model.library, model.category, model.creator, model.licence, "held_out",
        vertices, faces, normals, uvs, texture,
    )  # fmt: skip


def _truth(name: str, o: Object, device: torch.device) -> Truth:
    arrays = (o.vertices, o.faces, o.uvs, o.texture, o.normals)
    vertices, faces, uvs, texture, normals = (torch.tensor(a, device=device) for a in arrays)
    return Truth(name, Mesh(vertices, faces, uvs, texture), normals)
