"""What a preview does: one value that the command line and the manifest share."""

from dataclasses import dataclass, fields
from pathlib import Path

from .formats import MESH_FORMATS

AXES = ("gltf", "upstream")
REPOSITORY = "stabilityai/TripoSR"


@dataclass(frozen=True)
class PreviewSettings:
    """Settings of `preview`. Raises ValueError, naming the setting, for a bad one.

    model: a folder with config.yaml and model.ckpt or model.safetensors, or a repository id. foreground_ratio: longest
    side of the object over the picture's. remove_background: False takes the picture as it is. matting_model: local
    ONNX file for background removal. mc_resolution: grid points along a side. chunk_size: points that go through the
    decoder at a time, 0 for all, None for what suits the device; no effect on the result. batch_size: pictures that go
    through the networks at a time; None for what suits the device. mesh_formats: files to write of each mesh. axes:
    "gltf" has GLB and OBJ y up with the front at +z, "upstream" has every format z up with the front at +x.
    texture_resolution: texels along a side of a texture baked from the field, None for colours at the
    vertices. turntable: also render the scene from all around, as a video. device: "auto", "cpu", "cuda", "cuda:1", ...
    """

    model: str | None = None
    foreground_ratio: float = 0.85
    remove_background: bool = True
    matting_model: Path | None = None
    mc_resolution: int = 256
    chunk_size: int | None = None
    batch_size: int | None = None
    mesh_formats: tuple[str, ...] = ("glb",)
    axes: str = "gltf"
    texture_resolution: int | None = None
    turntable: bool = False
    device: str = "auto"

    def __post_init__(self):
        if not self.model:
            raise ValueError(
                f"model: no TripoSR checkpoint was given; its config.yaml and model.ckpt are on Hugging Face as "
                f"{REPOSITORY}: give their folder (--model FOLDER), or --model {REPOSITORY} to download them now "
                f"(1.7 GB); nothing is downloaded unless asked"
            )
        for name, low, high in (
            ("foreground_ratio", 0.1, 1.0),
            ("mc_resolution", 16, 1024),
            ("chunk_size", 0, 2**31),
            ("batch_size", 1, 1024),
            ("texture_resolution", 16, 8192),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {value}")
        if unknown := [name for name in self.mesh_formats if name not in MESH_FORMATS]:
            raise ValueError(f"mesh_formats: expected some of {', '.join(MESH_FORMATS)}, got {unknown[0]!r}")
        if not self.mesh_formats:
            raise ValueError("mesh_formats: expected at least one, got none")
        if self.axes not in AXES:
            raise ValueError(f"axes: expected {' or '.join(AXES)}, got {self.axes!r}")
        if self.matting_model is not None and not self.remove_background:
            raise ValueError("matting_model: contradicts remove_background=False; give one of the two")

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return {f.name: str(v) if isinstance(v := getattr(self, f.name), Path) else v for f in fields(self)}
