"""What a run does: one value that the command line, the manifest and every front end share."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .formats import GLB, MESH_FORMATS, PLY, SPLAT_FORMATS, TEXTURE_FORMATS
from .sizes import parse_size

EMBEDDED = "mini"
AUTO = "auto"
DTYPES = (AUTO, "float16", "bfloat16", "float32")
PURPOSES: dict[str, dict[str, Any]] = {
    "web": {  # a GLB below 2 MB whatever the texture, AR on a phone, splats at a quarter of the PLY
        "target_faces": 10_000, "texture_resolution": 1024, "texture_format": "jpeg",
        "mesh_formats": (GLB, "usdz"), "splat_formats": (PLY, "spz"),
    },
    "game": {"target_faces": 5_000, "texture_resolution": 1024, "mesh_formats": (GLB, "obj")},
    "print": {"target_faces": 100_000, "watertight": True, "mesh_formats": (GLB, "stl", "3mf")},
}  # fmt: skip
# settings that are several of these
NAMES: dict[str, Mapping[str, Any]] = {"mesh_formats": MESH_FORMATS, "splat_formats": SPLAT_FORMATS}


@dataclass(frozen=True)
class Settings:
    """Settings of `run`; the defaults are production values. Raises ValueError, naming the setting, for a bad one.

    `Settings.of` also takes what a purpose sets where nothing else is given.

    model: "mini" (embedded), a checkpoint file, a folder, or a repository id. seed: of the noise and of the fit.
    steps: denoising steps; None for the model's own. elevation: of the input view, degrees. orbit: "static", "sine", or
    a JSON file of poses. frame_size: pixels along a side; None for the model's own. foreground_ratio: longest side of
    the object over the picture's; None keeps the picture's own (the official behaviour) but for the embedded model.
    remove_background: False takes the picture as it is. matting_model: local ONNX file for background removal.
    decode_chunk_size: frames decoded at once; no effect on the result, but each takes 1.1 GiB of a GPU at 576². None
    for one on a GPU, and seven on a CPU, where that is faster.
    max_memory: of a GPU, that making the orbit may take, such as "6GiB"; decode_chunk_size is then the most.
    texture_resolution: pixels. mc_resolution: voxels along a side of the surface grid. target_faces: of the mesh.
    watertight: a mesh that isn't is an error.
    mesh_formats, splat_formats: files to write besides mesh.glb and splats.ply, which are always written.
    texture_format: "png" or "jpeg", in GLB and USDZ. unlit: the GLB asks viewers to leave out their lights.
    height_mm: of the mesh in STL and 3MF, millimetres. purpose: "web", "game" or "print", what `of` chose the settings
    for; by itself it changes nothing. device: "auto", "cpu", "cuda", "cuda:1", ... dtype: of UNet and image tower;
    "auto" is float16 on a GPU and float32 on a CPU, bfloat16 is for weights that outgrow float16, and rounds eight
    times as coarsely. cfg_parallel: the next GPU takes one half of guidance in every step, and of the decoding: the
    same orbit sooner.
    """

    model: str = EMBEDDED
    seed: int = 0
    steps: int | None = None
    elevation: float = 10.0
    orbit: str = "static"
    frame_size: int | None = None
    foreground_ratio: float | None = None
    remove_background: bool = True
    matting_model: Path | None = None
    decode_chunk_size: int | None = None
    max_memory: str | None = None
    texture_resolution: int = 1024
    mc_resolution: int = 128
    target_faces: int = 20_000
    watertight: bool = False
    mesh_formats: tuple[str, ...] = (GLB, "obj")
    splat_formats: tuple[str, ...] = (PLY,)
    texture_format: str = "png"
    unlit: bool = False
    height_mm: float = 100.0
    purpose: str | None = None
    device: str = AUTO
    dtype: str = AUTO
    cfg_parallel: bool = False

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "matting_model" and isinstance(value, str):
                object.__setattr__(self, f.name, Path(value))
            elif f.name in ("model", "orbit") and isinstance(value, Path):
                object.__setattr__(self, f.name, str(value))
            elif f.name in NAMES:
                object.__setattr__(self, f.name, _names(f.name, value, NAMES[f.name]))
            elif not _is_of(value, f.type):
                raise ValueError(f"{f.name}: expected {getattr(f.type, '__name__', f.type)}, got {value!r}")
        for name, low, high in (
            ("steps", 1, 1000),
            ("elevation", -89, 89),
            ("frame_size", 64, 2048),
            ("foreground_ratio", 0.1, 1.0),
            ("decode_chunk_size", 1, 10_000),
            ("texture_resolution", 64, 8192),
            ("mc_resolution", 16, 512),
            ("target_faces", 100, 5_000_000),
            ("height_mm", 1, 10_000),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {value}")
        for name, known in (("texture_format", TEXTURE_FORMATS), ("purpose", (None, *PURPOSES)), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected {' or '.join(filter(None, known))}, got {getattr(self, name)!r}")
        if self.max_memory is not None:
            parse_size("max_memory", self.max_memory)
            if self.cfg_parallel:
                raise ValueError("cfg_parallel: contradicts max_memory, which plans one GPU; give one of the two")
            if self.dtype == "float32":
                raise ValueError("max_memory: contradicts dtype float32; steps of 16 bits alone are planned")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected a whole number from 0 to 2^63 - 1, got {self.seed}")
        if self.frame_size is not None and self.frame_size % 64:
            raise ValueError(f"frame_size: expected a multiple of 64, got {self.frame_size}")
        if self.matting_model is not None and not self.remove_background:
            raise ValueError("matting_model: contradicts remove_background=False; give one of the two")

    @classmethod
    def of(cls, **given: Any) -> "Settings":
        """Settings as `given`, and the others as the given purpose sets them."""
        return cls(**with_purpose(given))

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return {f.name: str(v) if isinstance(v := getattr(self, f.name), Path) else v for f in fields(self)}


def with_purpose(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` settings with those of its "purpose", if it has one, that it leaves open."""
    return {**PURPOSES.get(given.get("purpose") or "", {}), **given}


def _names(name: str, value: Any, known: Iterable[str]) -> tuple[str, ...]:
    """Names of formats, each once. Raises ValueError for others."""
    if not isinstance(value, list | tuple) or not value or not all(isinstance(v, str) and v in known for v in value):
        raise ValueError(f"{name}: expected some of {', '.join(known)} in a list, got {value!r}")
    return tuple(dict.fromkeys(value))


def _is_of(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):  # Python counts True as a whole number
        return kind is bool
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))
