"""Orbits of cameras: the one place where camera conventions live.

World: right-handed, z up, the object at the origin. A camera at azimuth a and elevation e stands at
radius * (cos e cos a, cos e sin a, sin e) and looks at the origin; increasing azimuth moves counter-clockwise
seen from above. Angles are degrees at every public surface and float32 radians inside.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

FRAMES = 21
RADIUS = 2.0
FIELD_OF_VIEW = 33.8  # degrees, of SV3D's training renders (generative-models issue 342)


@dataclass(frozen=True)
class Orbit:
    """Cameras around an object, one per frame; the last frame is the input view (SV3D's order).

    elevations: (T,) float32 degrees above the horizon, absolute, each in (-90, 90).
    azimuths: (T,) float32 degrees, relative to the input view (the last frame, 0).
    radius: distance of the camera from the origin, in world units. fov: field of view in degrees, both ways.
    Raises ValueError for lengths that differ, non-finite angles or elevations at or beyond the poles.
    """

    elevations: torch.Tensor
    azimuths: torch.Tensor
    radius: float = RADIUS
    fov: float = FIELD_OF_VIEW

    def __post_init__(self):
        for name in ("elevations", "azimuths"):
            value = torch.as_tensor(getattr(self, name), dtype=torch.float32).detach().cpu().flatten()
            if not torch.isfinite(value).all():
                raise ValueError(f"{name}: expected finite degrees, got {value.tolist()}")
            object.__setattr__(self, name, value)
        if len(self.elevations) != len(self.azimuths) or len(self.azimuths) == 0:
            raise ValueError(
                f"elevations and azimuths: expected the same number of frames, at least one, "
                f"got {len(self.elevations)} and {len(self.azimuths)}"
            )
        if self.elevations.abs().max() >= 90:
            raise ValueError(f"elevations: expected degrees in (-90, 90), got {self.elevations.tolist()}")
        if not self.radius > 0:
            raise ValueError(f"radius: expected a positive distance, got {self.radius}")
        if not 0 < self.fov < 180:
            raise ValueError(f"fov: expected degrees in (0, 180), got {self.fov}")

    def __len__(self):
        return len(self.azimuths)

    @classmethod
    def static(cls, elevation: float = 10.0, frames: int = FRAMES) -> "Orbit":
        """One turn at constant elevation in equal steps; azimuth 0, the input view, comes last (official script)."""
        steps = torch.arange(1, frames + 1, dtype=torch.float64) * (360.0 / frames)
        return cls(torch.full((frames,), float(elevation)), (steps % 360.0).float())

    @classmethod
    def sine(cls, elevation: float = 10.0, amplitude: float = 30.0, frames: int = FRAMES) -> "Orbit":
        """One turn whose elevation swings once by +-amplitude around the input's (paper, table 8: "sine-30")."""
        static = cls.static(elevation, frames)
        swing = amplitude * torch.sin(torch.deg2rad(static.azimuths.double()))
        return cls((elevation + swing).clamp(-89, 89).float(), static.azimuths)

    @classmethod
    def from_poses(cls, poses: Sequence[dict]) -> "Orbit":
        """From [{"elevation": e, "azimuth": a}, ...] in degrees, the input view last; azimuths become relative to it.

        Raises ValueError for a pose that lacks a key.
        """
        for index, pose in enumerate(poses):
            missing = {"elevation", "azimuth"} - set(pose)
            if missing:
                raise ValueError(f"poses[{index}]: expected the keys elevation and azimuth, got {sorted(pose)}")
        azimuths = torch.tensor([float(p["azimuth"]) for p in poses], dtype=torch.float64)
        elevations = torch.tensor([float(p["elevation"]) for p in poses])
        return cls(elevations, ((azimuths - azimuths[-1:]) % 360.0).float())

    @property
    def polars_rad(self) -> torch.Tensor:
        """(T,) float32 radians from the up axis: what SV3D_p is conditioned on."""
        return torch.deg2rad(90.0 - self.elevations.double()).float()

    @property
    def azimuths_rad(self) -> torch.Tensor:
        """(T,) float32 radians in [0, 2 pi), relative to the last frame: what SV3D_p is conditioned on."""
        azimuths = self.azimuths.double()
        return torch.deg2rad((azimuths - azimuths[-1]) % 360.0).float()

    def camera_to_world(self) -> torch.Tensor:
        """(T, 4, 4) float32 camera-to-world, OpenCV axes (x right, y down, z forward)."""
        e, a = torch.deg2rad(self.elevations.double()), torch.deg2rad(self.azimuths.double())
        zero = torch.zeros_like(a)
        outward = torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()], -1)
        right = torch.stack([-a.sin(), a.cos(), zero], -1)
        down = torch.stack([e.sin() * a.cos(), e.sin() * a.sin(), -e.cos()], -1)
        matrix = torch.eye(4, dtype=torch.float64).repeat(len(self), 1, 1)
        matrix[:, :3, 0], matrix[:, :3, 1], matrix[:, :3, 2] = right, down, -outward
        matrix[:, :3, 3] = self.radius * outward
        return matrix.float()

    def world_to_camera(self) -> torch.Tensor:
        """(T, 4, 4) float32 world-to-camera, OpenCV axes: gsplat's `viewmats`."""
        pose = self.camera_to_world().double()
        rotation = pose[:, :3, :3].mT
        matrix = torch.eye(4, dtype=torch.float64).repeat(len(self), 1, 1)
        matrix[:, :3, :3] = rotation
        matrix[:, :3, 3:] = -rotation @ pose[:, :3, 3:]
        return matrix.float()

    def focal(self, size: int) -> float:
        """Focal length in pixels of a square image of `size` pixels; the principal point is its centre."""
        return 0.5 * size / math.tan(math.radians(self.fov) / 2)

    def intrinsics(self, size: int) -> torch.Tensor:
        """(T, 3, 3) float32 pinhole matrices of square images of `size` pixels; pixel centres lie at +0.5."""
        f, c = self.focal(size), size / 2
        return torch.tensor([[f, 0, c], [0, f, c], [0, 0, 1.0]]).repeat(len(self), 1, 1)

    def select(self, index) -> "Orbit":
        """The orbit of some of the frames (a slice or a list of indices); azimuths are kept as they are."""
        return Orbit(self.elevations[index], self.azimuths[index], self.radius, self.fov)

    def to_dict(self) -> dict:
        """Plain numbers for JSON; `Orbit(**d)` reads them back."""
        return {
            "elevations": [round(v, 6) for v in self.elevations.tolist()],
            "azimuths": [round(v, 6) for v in self.azimuths.tolist()],
            "radius": self.radius,
            "fov": self.fov,
        }
