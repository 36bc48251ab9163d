"""The JSON files of a diffusers-layout folder, to and from ModelConfig.

The keys are those of UNetSpatioTemporalConditionModel, AutoencoderKL and CLIPVisionModelWithProjection, so that those
classes read a folder of ours too. What they have no key for stands under "sv3d_fast" in unet/config.json.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from .checkpoint import CheckpointError
from .clip import MEAN, STD
from .config import CLIPConfig, ModelConfig, SamplerConfig, UNetConfig, VAEConfig

EXTRA = "sv3d_fast"
CLASSES = {
    "unet": ("UNetSpatioTemporalConditionModel", "SV3DUNetSpatioTemporalConditionModel"),
    "vae": ("AutoencoderKL",),
    "image_encoder": ("CLIPVisionModelWithProjection",),
}
DOWN = ("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal")
UP = ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")
REQUIRED = object()
# Far above every known network, and low enough that a damaged or hostile file is refused before a network is built.
MAX_SIZE, MAX_LAYERS, MAX_LEVELS, MAX_FRAMES, MAX_SIDE = 1 << 16, 256, 16, 1000, 4096

T = TypeVar("T")


@dataclass(frozen=True)
class JSONFile:
    """A JSON object of a file; reading a key checks its type. Raises CheckpointError naming the file and the key."""

    path: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "JSONFile":
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a readable JSON file: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
        return cls(path, values)

    def nested(self, key: str) -> "JSONFile":
        """The object under a key, empty where the file has none."""
        return JSONFile(self.path, self.get(key, dict, {}))

    def get(self, key: str, kind: type[T], default: Any = REQUIRED) -> T:
        value = self.values.get(key, default)
        if value is REQUIRED:
            raise CheckpointError(f"{self.path}: {key} is missing")
        if kind is float and isinstance(value, int) and abs(value) <= sys.float_info.max:
            value = float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise CheckpointError(f"{self.path}: {key}: expected {kind.__name__}, got {_short(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{self.path}: {key}: expected a finite number, got {value}")
        return value

    def size(self, key: str, default: Any = REQUIRED, limit: int = MAX_SIZE) -> int:
        value = self.get(key, int, default)
        if value < 1:
            raise CheckpointError(f"{self.path}: {key}: expected at least 1, got {_short(value)}")
        limit = MAX_LAYERS if "layers" in key else limit
        if value > limit:
            raise CheckpointError(f"{self.path}: {key}: expected at most {limit}, got {_short(value)}")
        return value

    def sizes(self, key: str) -> tuple[int, ...]:
        values = self.get(key, list)
        if not 0 < len(values) <= MAX_LEVELS or not all(type(v) is int and 0 < v <= MAX_SIZE for v in values):
            raise CheckpointError(
                f"{self.path}: {key}: expected 1 to {MAX_LEVELS} integers from 1 to {MAX_SIZE}, got {_short(values)}"
            )
        return tuple(values)

    def same(self, key: str, default: int) -> int:
        """An integer, or a list of equal ones, one a level."""
        value = self.values.get(key)
        if isinstance(value, list) and value and value == value[:1] * len(value):
            return JSONFile(self.path, {key: value[0]}).size(key)
        return self.size(key, default)

    def expect(self, key: str, default: Any, supported: Any) -> None:
        """Refuses a setting that changes the network into one that this package doesn't have."""
        value = self.values.get(key, default)
        if value != supported:
            raise CheckpointError(f"{self.path}: {key}: only {supported!r} is supported, got {value!r}")


def _short(value: Any) -> str:
    """A value of a file for an error's line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."


def read_config(folder: Path) -> tuple[ModelConfig, bool]:
    """The configuration of a folder, and whether its autoencoder has a post_quant_conv.

    Raises CheckpointError for missing or invalid files, and for networks that aren't SV3D's.
    """
    return configure(*(JSONFile.read(folder / name / "config.json") for name in CLASSES))


def configure(unet: JSONFile, vae: JSONFile, image_encoder: JSONFile) -> tuple[ModelConfig, bool]:
    """As `read_config`, from the networks' configurations themselves."""
    vae_config, post_quant_conv = _built(vae, _read_vae)
    clip = _built(image_encoder, _read_clip)
    unet_config, rest = _built(unet, lambda file: (_read_unet(file), _read_rest(file, vae_config)))
    return ModelConfig(unet=unet_config, vae=vae_config, clip=clip, **rest), post_quant_conv


def _built(file: JSONFile, read: Callable[[JSONFile], T]) -> T:
    try:
        return read(file)
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:  # of the configuration's own checks
        raise CheckpointError(f"{file.path}: {error}") from None


def _read_unet(file: JSONFile) -> UNetConfig:
    widths = file.sizes("block_out_channels")
    down = file.get("down_block_types", list)
    if len(down) != len(widths) or not all(kind in DOWN for kind in down):
        raise CheckpointError(f"{file.path}: down_block_types: expected {len(widths)} of {DOWN}, got {down}")
    attention = tuple(kind == DOWN[1] for kind in down)
    expected_up = [UP[a] for a in reversed(attention)]
    file.expect("up_block_types", expected_up, expected_up)
    file.expect("addition_time_embed_dim", 256, 256)
    if file.same("transformer_layers_per_block", 1) != 1:
        raise CheckpointError(f"{file.path}: transformer_layers_per_block: only 1 is supported")
    heads = file.values.get("num_attention_heads", [5, 10, 20, 20])
    heads = file.sizes("num_attention_heads") if isinstance(heads, list) else (file.size("num_attention_heads"),)
    heads = heads * len(widths) if len(heads) == 1 else heads
    if len(heads) != len(widths):
        raise CheckpointError(f"{file.path}: num_attention_heads: expected one a level, got {list(heads)}")
    used = [(w, h) for w, h, a in zip(widths, heads, attention, strict=True) if a] + [(widths[-1], heads[-1])]
    if any(w % h for w, h in used) or len({w // h for w, h in used}) != 1:
        raise CheckpointError(f"{file.path}: num_attention_heads: expected heads of one width, got {list(heads)}")
    vector = file.size("projection_class_embeddings_input_dim")
    if vector == 768:
        raise CheckpointError(f"{file.path}: this is Stable Video Diffusion (vector width 768), not SV3D (256 or 1280)")
    return UNetConfig(
        in_channels=file.size("in_channels"),
        out_channels=file.size("out_channels"),
        block_channels=widths,
        attention=attention,
        layers_per_block=file.same("layers_per_block", 2),
        head_channels=widths[-1] // heads[-1],
        context_dim=file.same("cross_attention_dim", 1024),
        vector_dim=vector,
        norm_eps=file.nested(EXTRA).get("norm_eps", str, "official"),
    )


def _read_rest(file: JSONFile, vae: VAEConfig) -> dict[str, Any]:
    """What a ModelConfig holds beside its networks. Folders of others say num_frames 25, SVD's; SV3D has 21."""
    ours = file.nested(EXTRA)
    sampler, defaults = ours.nested("sampler"), asdict(SamplerConfig())
    return {
        "sampler": SamplerConfig(**{name: sampler.get(name, type(value), value) for name, value in defaults.items()}),
        "image_size": ours.size("image_size", file.size("sample_size", 72) * vae.factor, MAX_SIDE),
        "frames": file.size("num_frames", limit=MAX_FRAMES) if ours.values else ModelConfig().frames,
    }


def _read_vae(file: JSONFile) -> tuple[VAEConfig, bool]:
    widths = file.sizes("block_out_channels")
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        file.expect(key, [kind], [kind] * len(widths))
    for key, supported in (
        ("in_channels", 3),
        ("out_channels", 3),
        ("act_fn", "silu"),
        ("norm_num_groups", 32),
        ("use_quant_conv", True),
        ("mid_block_add_attention", True),
    ):
        file.expect(key, supported, supported)
    for key in ("shift_factor", "latents_mean", "latents_std"):
        file.expect(key, None, None)
    config = VAEConfig(
        block_channels=widths,
        res_blocks=file.size("layers_per_block", 1),
        latent_channels=file.size("latent_channels", 4),
        scaling=file.get("scaling_factor", float, 0.18215),
    )
    return config, file.get("use_post_quant_conv", bool, True)


def _read_clip(file: JSONFile) -> CLIPConfig:
    file.expect("hidden_act", "quick_gelu", "gelu")
    file.expect("layer_norm_eps", 1e-5, 1e-5)
    file.expect("num_channels", 3, 3)
    return CLIPConfig(  # a key that is absent has the default of transformers' CLIPVisionConfig
        width=file.size("hidden_size", 768),
        layers=file.size("num_hidden_layers", 12),
        heads=file.size("num_attention_heads", 12),
        mlp_width=file.size("intermediate_size", 3072),
        patch=file.size("patch_size", 32),
        image_size=file.size("image_size", 224),
        projection=file.size("projection_dim", 512),
    )


def check_index(file: JSONFile) -> None:
    """Raises CheckpointError where model_index.json names a class that SV3D's networks don't have."""
    for name, classes in CLASSES.items():
        entry = file.get(name, list)
        if len(entry) != 2 or entry[1] not in classes:
            raise CheckpointError(f"{file.path}: {name}: expected class {' or '.join(classes)}, got {entry!r}")


def folder_files(config: ModelConfig, post_quant_conv: bool, notice: str | None) -> dict[str, dict[str, Any]]:
    """Relative path -> contents of every JSON file of a folder."""
    unet, vae, clip, sampler = config.unet, config.vae, config.clip, config.sampler
    levels = len(vae.block_channels)
    return {
        "model_index.json": {
            "_class_name": "StableVideo3DPipeline",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "image_encoder": ["transformers", CLASSES["image_encoder"][0]],
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "unet": ["diffusers", CLASSES["unet"][0]],
            "vae": ["diffusers", CLASSES["vae"][0]],
            EXTRA: {"notice": notice},
        },
        "unet/config.json": {
            "_class_name": CLASSES["unet"][0],
            "in_channels": unet.in_channels,
            "out_channels": unet.out_channels,
            "block_out_channels": list(unet.block_channels),
            "down_block_types": [DOWN[a] for a in unet.attention],
            "up_block_types": [UP[a] for a in reversed(unet.attention)],
            "layers_per_block": unet.layers_per_block,
            "transformer_layers_per_block": 1,
            "num_attention_heads": [max(c // unet.head_channels, 1) for c in unet.block_channels],
            "cross_attention_dim": unet.context_dim,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": unet.vector_dim,
            "sample_size": config.image_size // vae.factor,
            "num_frames": config.frames,
            EXTRA: {"norm_eps": unet.norm_eps, "image_size": config.image_size, "sampler": asdict(sampler)},
        },
        "vae/config.json": {
            "_class_name": CLASSES["vae"][0],
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": list(vae.block_channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": vae.res_blocks,
            "latent_channels": vae.latent_channels,
            "norm_num_groups": 32,
            "act_fn": "silu",
            "sample_size": config.image_size,
            "scaling_factor": vae.scaling,
            "force_upcast": True,
            "use_quant_conv": True,
            "use_post_quant_conv": post_quant_conv,
        },
        "image_encoder/config.json": {
            "architectures": [CLASSES["image_encoder"][0]],
            "model_type": "clip_vision_model",
            "hidden_size": clip.width,
            "num_hidden_layers": clip.layers,
            "num_attention_heads": clip.heads,
            "intermediate_size": clip.mlp_width,
            "patch_size": clip.patch,
            "image_size": clip.image_size,
            "projection_dim": clip.projection,
            "num_channels": 3,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "EulerDiscreteScheduler",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
            "prediction_type": "v_prediction",
            "interpolation_type": "linear",
            "use_karras_sigmas": True,
            "sigma_min": sampler.sigma_min,
            "sigma_max": sampler.sigma_max,
            "timestep_spacing": "leading",
            "timestep_type": "continuous",
            "steps_offset": 1,
        },
        "feature_extractor/preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "crop_size": {"height": clip.image_size, "width": clip.image_size},
            "size": {"shortest_edge": clip.image_size},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(MEAN),
            "image_std": list(STD),
            "resample": 3,
            "rescale_factor": 1 / 255,
        },
    }
