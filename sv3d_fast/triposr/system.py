"""TripoSR with the official interface: pictures to scene codes, scene codes to meshes and renders."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from sv3d_fast.files import atomic_file, make_folder
from sv3d_fast.model import hub
from sv3d_fast.model.checkpoint import CheckpointError
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.scene.texels import Texels, padded
from sv3d_fast.scene.unwrap import unwrap

from . import graphed
from .backbone import Backbone, TriplaneTokens, Upsampler
from .config import TripoSRConfig, config_yaml, read_config
from .extract import surface
from .field import Decoder
from .picture import Picture, as_batch
from .render import Renderer, orbit_rays
from .vit import ImageTokenizer
from .weights import load_weights

CONFIG_NAME, WEIGHTS_NAME = "config.yaml", "model.safetensors"
OFFICIAL_NAME = "model.ckpt"  # of the weights of stabilityai/TripoSR
MAX_RESOLUTION = 1024


class TripoSR(nn.Module):
    """A picture of an object to its shape and colours (Tochilkin et al. 2024), exact, with the official names.

    model([picture], device) gives scene codes; extract_mesh and render take them.
    """

    def __init__(self, config: TripoSRConfig):
        super().__init__()
        self.config = config
        self.image_tokenizer = ImageTokenizer(config.vit)
        self.tokenizer = TriplaneTokens(config)
        self.backbone = Backbone(config)
        self.post_processor = Upsampler(config)
        self.decoder = Decoder(config)
        self.renderer = Renderer(config)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        config_name: str = CONFIG_NAME,
        weight_name: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> "TripoSR":
        """Loads a model in eval mode, without gradients.

        pretrained_model_name_or_path: a folder with both files, or, where there is none, the name of a Hub
            repository, such as stabilityai/TripoSR.
        weight_name: the official pickle, which is read as tensors alone, or a .safetensors file. None takes a
            folder's model.safetensors if it has one (see save_pretrained), else model.ckpt, the official name.
        dtype: of the weights; None takes float16 on a GPU, where 16-bit networks run fused, and float32 elsewhere.
        Raises CheckpointError (a ValueError), in one line, for files that can't be found, read or used; ValueError
        for what is no device.
        """
        place = _device(device)
        folder = Path(pretrained_model_name_or_path).expanduser()
        if not folder.exists():
            if isinstance(pretrained_model_name_or_path, os.PathLike):
                raise CheckpointError(f"{folder}: no such folder")
            folder = hub.fetch(pretrained_model_name_or_path, [config_name, weight_name or OFFICIAL_NAME])
        if weight_name is None:
            weight_name = WEIGHTS_NAME if (folder / WEIGHTS_NAME).is_file() else OFFICIAL_NAME
        config = read_config(folder / config_name)
        with torch.device("meta"):
            model = cls(config)
        dtype = dtype or (torch.float16 if place.type == "cuda" else torch.float32)
        load_weights(model, folder / weight_name, dtype, place)
        return model

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes config.yaml and model.safetensors, which from_pretrained reads. Raises OutputError."""
        path = make_folder(folder)
        with atomic_file(path / CONFIG_NAME) as file:
            file.write_text(config_yaml(self.config), encoding="utf-8")
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with atomic_file(path / WEIGHTS_NAME) as file:
            save_file(state, file, metadata={"format": "pt"})

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tokenizer.embeddings.device

    def forward(self, images: Picture | Sequence[Picture], device: str | torch.device | None = None) -> Tensor:
        """Scene codes (B, 3, plane_channels, S, S) of one picture or several, as `as_batch` takes them.

        RGBA pictures and Subjects are prepared; others should show the object on grey at 0.85 of the picture's side.
        device: that of the model, which may be left out. Raises ValueError for another one, and for what is no
        picture. On a GPU, 16-bit networks run fused (see `graphed.why_not_fused`), in the first call after a while
        of preparation for each of the batch sizes 1, 2, 4 and 8, which others are split into.
        """
        place = self.device if device is None else _device(device)
        if place.type != self.device.type or place.index not in (None, self.device.index):
            raise ValueError(f"device: expected {self.device}, where the model is, got {device}")
        pixels = as_batch(images, self.config.image_size, self.device, torch.float32)
        differentiated = torch.is_grad_enabled() and pixels.requires_grad
        if differentiated or graphed.why_not_fused(self):
            return self.plain(pixels.to(self.tokenizer.embeddings.dtype))
        return graphed.graphed(self)(pixels)

    def plain(self, pixels: Tensor) -> Tensor:
        """Scene codes of pictures (B, 3, image_size, image_size) in [0, 1] by the networks as they are defined."""
        image_tokens = self.image_tokenizer(pixels)
        tokens = self.tokenizer().expand(len(pixels), -1, -1)
        return self.post_processor(self.tokenizer.as_planes(self.backbone(tokens, image_tokens)))

    @torch.no_grad()
    def extract_mesh(
        self, scene_codes: Tensor, has_vertex_color: bool = True, resolution: int = 256, threshold: float = 25.0
    ) -> list[Mesh]:
        """The surface where density is `threshold`, one mesh a scene, on the device of the codes.

        resolution: grid points along a side of the cube [-radius, radius] ** 3. Meshes are in world axes (z up, the
        input camera on +x), which are TripoSR's own, and closed where the object stays inside the cube. Vertices are
        placed on the raw density, which is near linear through the surface; on the density itself, its exponential,
        interpolation would pull them to grid points and show as terraces.
        Raises ValueError for arguments out of range and for scenes whose density doesn't reach the threshold.
        """
        self._check_codes(scene_codes)
        if not isinstance(has_vertex_color, bool):
            raise ValueError(f"has_vertex_color: expected True or False, got {has_vertex_color!r}")
        if not isinstance(resolution, int) or not 2 <= resolution <= MAX_RESOLUTION:
            raise ValueError(f"resolution: expected grid points in [2, {MAX_RESOLUTION}], got {resolution!r}")
        if not (threshold > 0 and math.isfinite(threshold)):
            raise ValueError(f"threshold: expected a positive density, got {threshold}")
        return [self._mesh(code, n, has_vertex_color, resolution, threshold) for n, code in enumerate(scene_codes)]

    def _mesh(self, code: Tensor, n: int, has_vertex_color: bool, resolution: int, threshold: float) -> Mesh:
        field = self.renderer.field(self.decoder, code)
        level = self.renderer.raw_level(threshold)
        vertices, faces = surface(field.on_grid(resolution), resolution, level, field.device)
        if not len(faces):
            raise ValueError(f"threshold: expected a density that scene {n} crosses, got {threshold}")
        vertices = vertices * (2 * field.radius / (resolution - 1)) - field.radius
        if not has_vertex_color:
            return Mesh(vertices, faces)
        _, color = field.query(vertices)
        return Mesh(vertices, faces, colors=(color * 255).round().to(torch.uint8))

    @torch.no_grad()
    def bake_texture(self, mesh: Mesh, scene_code: Tensor, resolution: int = 2048) -> Mesh:
        """The mesh of a scene (3, plane_channels, S, S) with uvs and a texture of its colours.

        resolution: texels along a side. Charts are projections onto a cube. Raises ValueError for a resolution outside
        16 to 8192 texels.
        """
        self._check_codes(scene_code[None])
        if not 16 <= resolution <= 8192:
            raise ValueError(f"resolution: expected 16 to 8192 texels, got {resolution}")
        uvs = unwrap(mesh.vertices.cpu(), mesh.faces.cpu(), time_limit=0).uvs
        mesh = replace(mesh, uvs=torch.from_numpy(uvs).to(mesh.vertices.device))
        texels = Texels.of(mesh, resolution)
        _, color = self.renderer.field(self.decoder, scene_code).query(texels.positions)
        return replace(mesh, texture=padded(texels.index, color, resolution))

    @torch.no_grad()
    def render(
        self,
        scene_codes: Tensor,
        n_views: int,
        elevation_deg: float = 0.0,
        camera_distance: float = 1.9,
        fovy_deg: float = 40.0,
        height: int = 256,
        width: int = 256,
        return_type: str = "pil",
    ) -> list[list[Image.Image]] | list[list[np.ndarray]] | list[list[Tensor]]:
        """Volume renders on white from n_views cameras around each scene, the input view first (see orbit_rays).

        return_type: "pil" (RGB images), "np" or "pt" ((height, width, 3) float32 in [0, 1]).
        Raises ValueError for arguments out of range.
        """
        self._check_codes(scene_codes)
        convert = {"pil": _to_pil, "np": lambda image: image.cpu().numpy(), "pt": lambda image: image}
        if return_type not in convert:
            raise ValueError(f"return_type: expected 'pil', 'np' or 'pt', got {return_type!r}")
        if min(n_views, height, width) < 1:
            raise ValueError(f"n_views, height, width: expected positive numbers, got {n_views}, {height}, {width}")
        if not 0 < fovy_deg < 180:
            raise ValueError(f"fovy_deg: expected degrees in (0, 180), got {fovy_deg}")
        rays = orbit_rays(n_views, elevation_deg, camera_distance, fovy_deg, height, width)
        origins, directions = (t.to(scene_codes.device) for t in rays)
        return [
            [
                convert[return_type](self.renderer(self.decoder, code, origins[view], directions[view]))
                for view in range(n_views)
            ]
            for code in scene_codes
        ]

    def _check_codes(self, scene_codes: Tensor) -> None:
        if scene_codes.ndim != 5 or scene_codes.shape[1:3] != (3, self.config.plane_channels):
            expected = f"(B, 3, {self.config.plane_channels}, S, S)"
            raise ValueError(f"scene_codes: expected shape {expected}, got {tuple(scene_codes.shape)}")
        if not scene_codes.isfinite().all():
            raise ValueError("scene_codes: expected finite values, got NaN or infinity")


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected a device such as 'cpu' or 'cuda:0', got {device!r}") from None


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).to(torch.uint8).cpu().numpy())
