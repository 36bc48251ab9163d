"""Nodes for ComfyUI, by its V3 schema: a picture to an orbit, splats and a textured mesh, as ComfyUI's own types.

A folder in ComfyUI's custom_nodes with the `__init__.py` of examples/comfyui shows them. They report their progress to
ComfyUI and stop when it is told to. comfy_api and comfy are ComfyUI's own modules, which only it has.
"""

import io as bytes_io
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy_api.latest import ComfyAPISync, ComfyExtension, Types, io
from PIL import Image

from sv3d_fast.events import Event, Progress
from sv3d_fast.orbit_stage import open_model
from sv3d_fast.pipeline import running
from sv3d_fast.scene.corners import split, to_y_up
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.scene.splat_axes import Axes
from sv3d_fast.scene.splats import SH_C0, Splats
from sv3d_fast.settings import AUTO, DTYPES, EMBEDDED, PURPOSES, Settings

CATEGORY = "sv3d-fast"
MODEL = io.Custom("SV3D_FAST_MODEL")
ANY_PURPOSE = "any"
# Its splats are y-down and face their viewer along -z: the axes of its meshes, which are glTF's, turned by 180 degrees
# about x (comfy_extras/nodes_gaussian_splat.py takes its cameras to the splats that way).
SPLAT_AXES = Axes((1, 2, 0), (1, -1, -1), (0.5, 0.5, 0.5, -0.5))


class LoadSV3D(io.ComfyNode):
    """The networks, opened once for all the pictures that go through them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SV3DFastLoadModel",
            display_name="Load SV3D (sv3d-fast)",
            category=CATEGORY,
            inputs=[
                io.String.Input("model", default=EMBEDDED, tooltip="mini, a checkpoint, a folder or a repository id"),
                io.String.Input("device", default=AUTO, tooltip="auto, cpu, cuda or cuda:N"),
                io.Combo.Input("dtype", options=list(DTYPES), default=AUTO, tooltip="bfloat16 where float16 overflows"),
            ],
            outputs=[MODEL.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model: str, device: str, dtype: str) -> io.NodeOutput:
        given = {"model": model, "device": device, "dtype": dtype}
        with torch.inference_mode(False):  # ComfyUI's is on; what is made in it can't take part in a fit
            return io.NodeOutput((given, open_model(Settings.of(**given))))


class ImageToMesh(io.ComfyNode):
    """All of `sv3d-fast run` on the first picture of a batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = Settings()
        return io.Schema(
            node_id="SV3DFastImageToMesh",
            display_name="Image to orbit, splats and mesh (sv3d-fast)",
            category=CATEGORY,
            inputs=[
                MODEL.Input("model"),
                io.Image.Input("image"),
                io.Int.Input("seed", default=default.seed, min=0, max=2**63 - 1, control_after_generate=True),
                io.Int.Input("steps", default=0, min=0, max=1000, tooltip="denoising steps; 0 for the model's own"),
                io.Float.Input("elevation", default=default.elevation, min=-89.0, max=89.0, tooltip="degrees"),
                io.Combo.Input("purpose", options=[ANY_PURPOSE, *PURPOSES], default=ANY_PURPOSE),
                io.Mask.Input("mask", optional=True, tooltip="1 on the object; without it the background is removed"),
            ],
            outputs=[
                io.Image.Output(display_name="orbit"),
                io.Splat.Output(display_name="splat"),
                io.Mesh.Output(display_name="mesh"),
                io.File3DGLB.Output(display_name="model_3d"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: tuple,
        image: torch.Tensor,
        seed: int,
        steps: int,
        elevation: float,
        purpose: str,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        given, networks = model
        settings = Settings.of(
            **given, seed=seed, steps=steps or None, elevation=elevation,
            purpose=None if purpose == ANY_PURPOSE else purpose,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="sv3d-fast-") as place:
            photo = Path(place) / "image.png"
            picture(image, mask).save(photo)
            with torch.inference_mode(False), torch.enable_grad():
                result = watch(running(photo, Path(place) / "result", settings, model=networks))
            glb = (result.folder / "mesh.glb").read_bytes()
        return io.NodeOutput(
            result.video.frames.float().cpu() / 255,
            to_splat(result.splats),
            to_mesh(result.mesh),
            Types.File3D(bytes_io.BytesIO(glb), file_format="glb"),
        )


def watch(events: Generator[Event, None, Any]) -> Any:
    """Runs a pipeline to its end, shows its progress in ComfyUI and stops where ComfyUI says so; returns its value."""
    shown = ComfyAPISync().execution
    try:
        while True:
            throw_exception_if_processing_interrupted()
            try:
                event = next(events)
            except StopIteration as stop:
                return stop.value
            if isinstance(event, Progress):
                shown.set_progress(event.done, event.total)
    finally:
        events.close()


def picture(image: torch.Tensor, mask: torch.Tensor | None) -> Image.Image:
    """The first of a batch (B, H, W, 3 or 4) in [0, 1]; a mask (B, H, W) becomes its transparency. Raises ValueError
    for a mask of another size."""
    pixels = image[0]
    if mask is not None:
        if mask.shape[-2:] != pixels.shape[:2]:
            raise ValueError(f"mask: expected the image's {tuple(pixels.shape[:2])}, got {tuple(mask.shape[-2:])}")
        pixels = torch.cat([pixels[..., :3], mask.reshape(-1, *mask.shape[-2:])[0, ..., None].to(pixels)], -1)
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def to_splat(splats: Splats) -> Types.SPLAT:
    """ComfyUI's splats: a batch of one, after the activations, where its cameras see them as they see the mesh."""
    s = splats.detach().to("cpu")
    means, quats = (torch.from_numpy(np.ascontiguousarray(part)).float()[None] for part in SPLAT_AXES.of_world(s))
    quats = torch.nn.functional.normalize(quats, dim=-1)
    harmonics = ((s.colors - 0.5) / SH_C0)[None, :, None]
    return Types.SPLAT(means, s.scales[None], quats, s.opacities[None, :, None], harmonics)


def to_mesh(mesh: Mesh) -> Types.MESH:
    """ComfyUI's mesh: a batch of one, in glTF's axes and texture coordinates, y up and v down."""
    parts = split(mesh)
    assert parts.uvs is not None  # for mypy: the mesh of a run has its texture
    assert mesh.texture is not None
    uvs = np.stack([parts.uvs[:, 0], 1 - parts.uvs[:, 1]], -1)
    vertices, normals, faces = to_y_up(parts.positions), to_y_up(parts.normals), parts.faces.astype(np.int64)
    one = [torch.from_numpy(np.ascontiguousarray(array))[None] for array in (vertices, faces, uvs, normals)]
    texture = mesh.texture[None].float().cpu() / 255
    return Types.MESH(one[0], one[1], uvs=one[2], normals=one[3], texture=texture)


class SV3DFastExtension(ComfyExtension):
    """The list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadSV3D, ImageToMesh]


async def comfy_entrypoint() -> SV3DFastExtension:
    """What ComfyUI calls for the nodes of a folder."""
    return SV3DFastExtension()
