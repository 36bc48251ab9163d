"""Volume rendering of a field (Mildenhall et al. 2020), as TripoSR's training did it, and its cameras."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import TripoSRConfig
from .field import Decoder, Field

TIGHTENED = 1 - 1e-3  # rays are cut at a cube slightly smaller than the planes span
SHORTEST = 0.01  # of a ray's stretch in the cube; a shorter one shows the background
PARALLEL = 1e-6  # smallest component of a direction that is divided by
CHUNKS = {"cpu": 1 << 13, "cuda": 1 << 22}  # points; on a CPU what the decoder holds of them fits the cache


class Renderer:
    """Renders scene codes on white. `set_chunk_size` bounds the memory of all queries, those for meshes included."""

    def __init__(self, config: TripoSRConfig):
        self.radius = config.radius
        self.density_bias = config.density_bias
        self.samples = config.samples
        self.chunk_size: int | None = None

    def set_chunk_size(self, chunk_size: int) -> None:
        """How many points go through the decoder at a time; 0 for all of them; what suits the device unless set.

        Raises ValueError below 0.
        """
        if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 0:
            raise ValueError(f"chunk_size: expected a number of points, or 0 for all at once, got {chunk_size!r}")
        self.chunk_size = chunk_size

    def field(self, decoder: Decoder, scene_code: Tensor) -> Field:
        """The field of one scene code (3, C, S, S)."""
        chunk = CHUNKS.get(scene_code.device.type, 0) if self.chunk_size is None else self.chunk_size
        return Field(scene_code, decoder, self.radius, chunk)

    def density(self, raw: Tensor) -> Tensor:
        """The decoder's raw density -> density, to which opacity per length relates."""
        return (raw + self.density_bias).exp()

    def raw_level(self, density: float) -> float:
        """The raw density at which the density has a value."""
        return math.log(density) - self.density_bias

    def query_triplane(self, decoder: Decoder, positions: Tensor, triplane: Tensor) -> dict[str, Tensor]:
        """Raw "density" and "density_act", (..., 1), and "color" (..., 3) at positions (..., 3) in the world."""
        raw, color = self.field(decoder, triplane).query(positions)
        return {"density": raw[..., None], "density_act": self.density(raw)[..., None], "color": color}

    @torch.no_grad()
    def __call__(self, decoder: Decoder, triplane: Tensor, rays_o: Tensor, rays_d: Tensor) -> Tensor:
        """Colours (..., 3) in [0, 1] along rays from origins (..., 3) in unit directions (..., 3), on white."""
        if rays_o.shape != rays_d.shape or rays_o.shape[-1] != 3:
            raise ValueError(f"rays_d: expected (..., 3) like rays_o {tuple(rays_o.shape)}, got {tuple(rays_d.shape)}")
        field = self.field(decoder, triplane)
        origins, directions = rays_o.reshape(-1, 3), rays_d.reshape(-1, 3)
        image = torch.ones_like(origins)
        near, far = _stretch(origins, directions, self.radius * TIGHTENED)
        hits = (far - near > SHORTEST).nonzero()[:, 0]
        rays = max(1, field.chunk_size // self.samples if field.chunk_size else len(hits))
        for some in hits.split(rays):
            image[some] = self._march(field, origins[some], directions[some], near[some], far[some])
        return image.view(rays_o.shape)

    def _march(self, field: Field, origins: Tensor, directions: Tensor, near: Tensor, far: Tensor) -> Tensor:
        """Colours (N, 3) of rays with their stretches from `near` to `far` (N,)."""
        edges = torch.linspace(0, 1, self.samples + 1, device=origins.device)
        middles = (edges[:-1] + edges[1:]) / 2
        distances = near[:, None] * (1 - middles) + far[:, None] * middles
        raw, color = field.query(origins[:, None] + distances[..., None] * directions[:, None])
        # The length of a step is its share of the stretch, not metric: so the field was trained.
        alpha = 1 - torch.exp(-edges.diff() * self.density(raw))
        passed = torch.cumprod(1 - alpha[:, :-1] + 1e-10, dim=1)
        weights = alpha * torch.cat([torch.ones_like(alpha[:, :1]), passed], dim=1)
        return (weights[..., None] * color).sum(1) + 1 - weights.sum(1, keepdim=True)


def _stretch(origins: Tensor, directions: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Where rays (N, 3) enter and leave the cube [-radius, radius] ** 3: distances (N,); far < near if they miss it."""
    divisors = torch.where(directions.abs() < PARALLEL, PARALLEL, directions)
    a, b = (radius - origins) / divisors, (-radius - origins) / divisors
    return torch.minimum(a, b).amax(1).clamp(min=0), torch.maximum(a, b).amin(1)


def orbit_rays(
    n_views: int, elevation_deg: float, camera_distance: float, fovy_deg: float, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Origins and unit directions, (n_views, height, width, 3) float32, of cameras evenly spaced around the z axis.

    They look at the origin from camera_distance. View 0 stands at azimuth 0, on +x for elevation 0, as the camera of
    the input picture does; the next ones follow counter-clockwise seen from above. fovy_deg: vertical field of view.
    """
    azimuth = torch.arange(n_views) * (2 * math.pi / n_views)
    elevation = math.radians(elevation_deg)
    around, zero = torch.stack([azimuth.cos(), azimuth.sin()], dim=1), torch.zeros(n_views, 1)
    backward = torch.cat([math.cos(elevation) * around, zero + math.sin(elevation)], dim=1)
    right = torch.stack([-azimuth.sin(), azimuth.cos(), zero[:, 0]], dim=1)
    up = torch.linalg.cross(backward, right)

    pixel = 2 * math.tan(math.radians(fovy_deg) / 2) / height  # its side at distance 1
    x = (torch.arange(width) + 0.5 - width / 2) * pixel
    y = (height / 2 - torch.arange(height) - 0.5) * pixel
    per_view = [t[:, None, None] for t in (right, up, backward)]
    directions = x[:, None] * per_view[0] + y[:, None, None] * per_view[1] - per_view[2]
    origins = (camera_distance * per_view[2]).expand_as(directions)
    return origins, F.normalize(directions, dim=-1)
