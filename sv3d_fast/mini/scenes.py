"""Random training scenes: an object, its pose and colours, an orbit around it and the light on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sv3d_fast.camera import FRAMES, Orbit
from sv3d_fast.kernels.mesh_raster import mesh_render_batch

from .pack import GENERATED, Object

SUPERSAMPLE = 2
LIGHTS = 3
TEXTURE = 256  # pixels along a side, for all objects
MODELLED_SHARE = 0.5  # of the scenes: objects that somebody modelled, few beside the generated ones
EXCHANGED_SHARE = 0.3  # of the other textures, whose channels are exchanged: more hues, but no wood is blue
PHOTOGRAPHED_SHARE = 0.5  # of the scenes: as products are photographed, from the front and in the evaluation's light
# The light of every evaluation: soft, with a key from the front left above and a fill from the right.
STANDARD_LIGHTS = ((0.62, 0.48, 0.62, 0.45), (0.35, -0.85, 0.4, 0.18), (0.0, 0.0, 1.0, 0.0))
STANDARD_AMBIENT = 0.6


@dataclass(frozen=True)
class Views:
    """Rendered orbits: frames (O, T, S, S, 3) uint8 on white, alpha (O, T, S, S) uint8, one orbit per object."""

    frames: torch.Tensor
    alpha: torch.Tensor
    orbits: Sequence[Orbit]


class Stage:
    """Objects on a device, ready to be rendered in batches.

    objects: the meshes (sv3d_fast.mini.pack). size: pixels along a side. device: where to render.
    Raises ValueError without an object and for textures that are not square or whose side doesn't divide TEXTURE.
    """

    def __init__(self, objects: Sequence[Object], size: int, device: torch.device):
        self.objects, self.size, self.device = objects, size, device
        if not objects:
            raise ValueError("objects: expected at least one, got none")
        # copies: arrays that can't be written to make no tensors
        self.vertices = [torch.tensor(o.vertices, device=device) for o in objects]
        self.faces = [torch.tensor(o.faces, dtype=torch.int32, device=device) for o in objects]
        self.uvs = [torch.tensor(o.uvs, device=device) for o in objects]
        self.normals = [torch.tensor(o.normals, device=device) for o in objects]
        self.textures = torch.stack([_texture(o.texture, device) for o in objects])
        self.odds = odds([o.source not in GENERATED for o in objects])

    def render(
        self,
        chosen: Sequence[int],
        orbits: Sequence[Orbit],
        vertices: Sequence[torch.Tensor],
        normals: Sequence[torch.Tensor],
        textures: torch.Tensor,
        lights,
        ambient,
    ) -> Views:
        """The O objects of index `chosen`, one orbit each, on white.

        vertices, normals: (V, 3) of each. textures: (O, R, R, 3) uint8. lights: (O, LIGHTS, 4) or (LIGHTS, 4) for all,
        directions towards the light and intensities. ambient: (O,) or one number for all.
        """
        at, count = self.device, len(chosen)
        faces = [self.faces[i] for i in chosen]
        frames, alpha = mesh_render_batch(
            torch.cat(list(vertices)),
            torch.cat(faces),
            _offsets(vertices, at),
            _offsets(faces, at),
            torch.cat([self.uvs[i] for i in chosen]),
            textures,
            torch.cat(list(normals)),
            torch.stack([o.world_to_camera() for o in orbits]).to(at, non_blocking=True),
            torch.stack([o.intrinsics(self.size) for o in orbits]).to(at, non_blocking=True),
            self.size,
            _numbers(lights, at).expand(count, LIGHTS, 4).contiguous(),
            _numbers(ambient, at).expand(count).contiguous(),
            torch.ones(count, 3, device=at),
            SUPERSAMPLE,
        )
        return Views(frames, alpha, orbits)

    def standard(self, chosen: Sequence[int], orbit: Orbit) -> Views:
        """Objects as they are, in the light of every evaluation."""
        return self.render(
            chosen,
            [orbit] * len(chosen),
            [self.vertices[i] for i in chosen],
            [self.normals[i] for i in chosen],
            self.textures[list(chosen)],
            STANDARD_LIGHTS,
            STANDARD_AMBIENT,
        )

    def random(self, count: int, rng: np.random.Generator) -> Views:
        """`count` random objects, posed, stretched, mirrored, recoloured and lit at random, some as in a catalogue."""
        chosen = rng.choice(len(self.objects), size=count, p=self.odds).tolist()
        photographed = rng.random(count) < PHOTOGRAPHED_SHARE
        orbits = [level_orbit(rng) if p else random_orbit(rng) for p in photographed]
        shapes = [random_shape(rng, front=p).to(self.device, non_blocking=True) for p in photographed]
        bends = random_bends(rng, count).to(self.device, non_blocking=True)
        bent = [bent_along(self.vertices[i], self.normals[i], bend) for i, bend in zip(chosen, bends, strict=True)]
        vertices = [
            framed(points @ shape, orbit, rng.uniform(0.72, 0.96))
            for (points, _), shape, orbit in zip(bent, shapes, orbits, strict=True)
        ]
        normals = [
            torch.nn.functional.normalize(normal @ torch.linalg.inv_ex(shape).inverse.mT, dim=-1)
            for (_, normal), shape in zip(bent, shapes, strict=True)
        ]
        textures = recolored(self.textures[chosen], rng, np.where(photographed, 0, EXCHANGED_SHARE))
        lights = np.stack([STANDARD_LIGHTS if p else random_lights(rng) for p in photographed])
        ambient = np.where(photographed, STANDARD_AMBIENT, rng.uniform(0.5, 0.85, count))
        return self.render(chosen, orbits, vertices, normals, textures, lights, ambient)


def odds(modelled: Sequence[bool]) -> np.ndarray:
    """(N,) how likely each object is to be chosen: MODELLED_SHARE for the modelled ones, if there are others too."""
    flags = np.array(modelled)
    count = int(flags.sum())
    if count in (0, len(flags)):
        return np.full(len(flags), 1 / len(flags))
    return np.where(flags, MODELLED_SHARE / count, (1 - MODELLED_SHARE) / (len(flags) - count))


def random_orbit(rng: np.random.Generator, frames: int = FRAMES) -> Orbit:
    """Static, sinusoidal or irregular, input elevation in -5..40 degrees (the ranges of the paper, appendix B)."""
    elevation = np.clip(rng.normal(12, 8), -5, 40) if rng.random() < 0.5 else rng.uniform(-5, 40)
    kind = rng.random()
    if kind < 0.3:
        return Orbit.static(elevation, frames)
    if kind < 0.7:
        amplitude = rng.uniform(5, 30) * rng.choice([-1, 1])
        return Orbit.sine(elevation, amplitude, frames)
    steps = rng.uniform(0.3, 1.7, frames)
    azimuths = np.cumsum(steps) * 360 / steps.sum()
    azimuths[-1] = 0
    waves = sum(rng.uniform(0, 12) * np.sin(k * np.radians(azimuths)) * rng.choice([-1, 1]) for k in range(1, 4))
    return Orbit(torch.from_numpy(np.clip(elevation + waves, -60, 80)).float(), torch.from_numpy(azimuths).float())


def level_orbit(rng: np.random.Generator, frames: int = FRAMES) -> Orbit:
    """Static, from slightly above, as products are photographed."""
    return Orbit.static(float(np.clip(rng.normal(10, 4), -5, 40)), frames)


def random_shape(rng: np.random.Generator, *, front: bool) -> torch.Tensor:
    """(3, 3) matrix applied from the right: stretch per axis, mirror, and turn about the vertical.

    front: turned by a few degrees only, and not from any side.
    """
    stretch = np.exp(rng.normal(0, 0.15, 3)) * [1, rng.choice([-1, 1]), 1]
    turn = rng.normal(0, math.radians(8)) if front else rng.uniform(0, 2 * math.pi)
    c, s = math.cos(turn), math.sin(turn)
    return torch.from_numpy((np.diag(stretch) @ [[c, s, 0], [-s, c, 0], [0, 0, 1]]).astype(np.float32))


def random_bends(rng: np.random.Generator, count: int) -> torch.Tensor:
    """(count, 3, 2) a and b of each axis for `bent_along`, |a| + |b| at most 0.7; no b across, where things are
    symmetric."""
    bends = np.clip(rng.normal(0, 0.2, (count, 3, 2)), -0.35, 0.35)
    bends[:, 1, 1] = 0
    return torch.from_numpy(bends.astype(np.float32))


def bent_along(vertices: torch.Tensor, normals: torch.Tensor, bend: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vertices and normals (V, 3) with other proportions: each axis is stretched here and compressed there.

    bend: (3, 2). A coordinate u of the bounding box, -1..1, goes to u + (a sin(pi u) - b cos(pi u)) / pi: a cupboard
    stays one, with a taller plinth or shallower shelves, and there are more cupboards than anybody modelled.
    """
    low, high = vertices.aminmax(dim=0)
    half = (high - low) / 2
    angle = (vertices - low - half) / half.clamp_min(1e-6) * math.pi
    a, b = bend.unbind(1)
    sine, cosine = angle.sin(), angle.cos()
    moved = vertices + (a * sine - b * cosine) * half / math.pi
    return moved, torch.nn.functional.normalize(normals / (1 + a * cosine + b * sine), dim=-1)


def random_lights(rng: np.random.Generator) -> np.ndarray:
    """(LIGHTS, 4): directions towards the light, mostly from above, and intensities."""
    directions = rng.normal(size=(LIGHTS, 3))
    directions[:, 2] = np.abs(directions[:, 2]) + 0.1
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    strength = rng.uniform(0, [0.55, 0.3, 0.15])
    return np.concatenate([directions, strength[:, None]], 1).astype(np.float32)


def framed(vertices: torch.Tensor, orbit: Orbit, fill: float) -> torch.Tensor:
    """Vertices (V, 3) moved to their box's centre and scaled so that the widest view fills `fill` of the frame.

    The widest view is that of about 512 of the vertices, so others can reach a little further.
    """
    low, high = vertices.aminmax(dim=0)
    vertices = vertices - (low + high) / 2
    sample = vertices[:: max(1, len(vertices) // 512)]
    rotation = orbit.world_to_camera()[:, :3, :3].to(vertices, non_blocking=True)
    camera = torch.einsum("tij,vj->tvi", rotation, sample)
    half = math.tan(math.radians(orbit.fov) / 2) * fill
    # |s x| <= half (r + s z) for every point and view, solved for the largest s that holds: one pass, no host sync
    spread = camera[..., :2].abs().amax(-1) - half * camera[..., 2]
    return vertices * (half * orbit.radius / spread.amax())


def recolored(textures: torch.Tensor, rng: np.random.Generator, exchanged: np.ndarray) -> torch.Tensor:
    """Textures (O, R, R, 3) uint8, each with its gain and gamma varied, some with their channels exchanged.

    exchanged: (O,) how likely that is.
    """
    gammas, mixes = np.exp(rng.normal(0, 0.15, len(textures))), []
    for chance in exchanged:
        mix = np.eye(3)[rng.permutation(3)] if rng.random() < chance else np.eye(3)
        mixes.append(mix * rng.uniform(0.75, 1.15) * rng.uniform(0.92, 1.08, (1, 3)))
    gamma = _numbers(gammas, textures.device)[:, None, None, None]
    gains = _numbers(np.stack(mixes), textures.device)[:, None]
    return (((textures.float() / 255) ** gamma @ gains) * 255).clamp(0, 255).to(torch.uint8)


def _texture(texture: np.ndarray, device: torch.device) -> torch.Tensor:
    """(R, R, 3) uint8 enlarged to the size that all textures share, of which R is a divisor."""
    side = len(texture)
    if texture.shape != (side, side, 3) or side == 0 or TEXTURE % side:
        raise ValueError(f"texture: expected (R, R, 3), R a divisor of {TEXTURE}, got {texture.shape}")
    times = TEXTURE // side
    small = torch.tensor(texture, device=device)
    return small[:, None, :, None].expand(-1, times, -1, times, -1).reshape(TEXTURE, TEXTURE, 3)


def _numbers(values, device: torch.device) -> torch.Tensor:
    """float32 on the device, without waiting for the work that is queued there."""
    return torch.as_tensor(values, dtype=torch.float32).to(device, non_blocking=True)


def _offsets(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *map(len, parts)]).cumsum(0).to(device, non_blocking=True)
