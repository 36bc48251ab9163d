"""TripoSR's configuration and its official file, config.yaml; the defaults are those of stabilityai/TripoSR."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sv3d_fast.model.checkpoint import CheckpointError
from sv3d_fast.model.folder_config import JSONFile

VIT_NAME = "facebook/dino-vitb16"
# The file names classes to be imported; none ever is, they are compared with the ones whose parts are here.
CLASSES = {
    "image_tokenizer_cls": "tsr.models.tokenizers.image.DINOSingleImageTokenizer",
    "tokenizer_cls": "tsr.models.tokenizers.triplane.Triplane1DTokenizer",
    "backbone_cls": "tsr.models.transformer.transformer_1d.Transformer1D",
    "post_processor_cls": "tsr.models.network_utils.TriplaneUpsampleNetwork",
    "decoder_cls": "tsr.models.network_utils.NeRFMLP",
    "renderer_cls": "tsr.models.nerf_renderer.TriplaneNeRFRenderer",
}
# Settings with one supported value: key -> (what the class takes where the file is silent, what is supported).
FIXED: dict[str, tuple[Any, Any]] = {
    "backbone.attention_bias": (False, False),
    "backbone.activation_fn": ("geglu", "geglu"),
    "backbone.dropout": (0.0, 0.0),
    "backbone.norm_type": ("layer_norm", "layer_norm"),
    "backbone.only_cross_attention": (False, False),
    "backbone.double_self_attention": (False, False),
    "backbone.norm_elementwise_affine": (True, True),
    "decoder.activation": ("relu", "silu"),
    "decoder.bias": (True, True),
    "renderer.feature_reduction": ("concat", "concat"),
    "renderer.density_activation": ("trunc_exp", "exp"),
    "renderer.color_activation": ("sigmoid", "sigmoid"),
    "renderer.randomized": (False, False),
}
IDLE = (  # settings that change no value at inference
    "image_tokenizer.pretrained_model_name_or_path",
    "image_tokenizer.enable_gradient_checkpointing",
    "backbone.gradient_checkpointing",
    "backbone.upcast_attention",
    "decoder.weight_init",
    "decoder.bias_init",
)
REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # another key of the file, as in OmegaConf's interpolation


@dataclass(frozen=True)
class ViTConfig:
    """The vision transformer that turns the picture into tokens; image_size is the one it was trained at."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    norm_eps: float = 1e-12
    image_size: int = 224
    patch: int = 16

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"vit: expected heads that divide the width {self.width}, got {self.heads}")
        if self.image_size % self.patch:
            raise ValueError(f"vit: expected a patch that divides the image size {self.image_size}, got {self.patch}")


@dataclass(frozen=True)
class TripoSRConfig:
    """A whole TripoSR.

    image_size: side of the picture in pixels. plane_size, channels: of the triplane of tokens. heads, head_width,
    layers, groups: of the transformer and its group norm. plane_channels: of the scene codes' planes, which have
    twice the size. neurons, hidden_layers: of the decoder. radius: half the side of the cube that the planes span.
    density_bias: added to the decoder's raw density before exp. samples: a ray in volume rendering.
    """

    image_size: int = 512
    vit: ViTConfig = field(default_factory=ViTConfig)
    plane_size: int = 32
    channels: int = 1024
    heads: int = 16
    head_width: int = 64
    layers: int = 16
    groups: int = 32
    plane_channels: int = 40
    neurons: int = 64
    hidden_layers: int = 9
    radius: float = 0.87
    density_bias: float = -1.0
    samples: int = 128

    def __post_init__(self):
        if self.image_size % self.vit.patch:
            raise ValueError(
                f"cond_image_size: expected a multiple of the patch size {self.vit.patch}, got {self.image_size}"
            )
        if self.channels % self.groups:
            raise ValueError(f"norm_num_groups: expected a divisor of {self.channels} channels, got {self.groups}")
        if not self.radius > 0:
            raise ValueError(f"radius: expected a positive number, got {self.radius}")


# Key of the file -> field; several keys that must agree share a field, with a factor.
VIT_SIZES = {
    "vit.hidden_size": "width",
    "vit.num_hidden_layers": "layers",
    "vit.num_attention_heads": "heads",
    "vit.intermediate_size": "mlp_width",
    "vit.image_size": "image_size",
    "vit.patch_size": "patch",
}
SIZES = {
    "cond_image_size": "image_size",
    "tokenizer.plane_size": "plane_size",
    "tokenizer.num_channels": "channels",
    "backbone.num_attention_heads": "heads",
    "backbone.attention_head_dim": "head_width",
    "backbone.num_layers": "layers",
    "post_processor.out_channels": "plane_channels",
    "decoder.n_neurons": "neurons",
    "decoder.n_hidden_layers": "hidden_layers",
    "renderer.num_samples_per_ray": "samples",
}


def _dependent(config: TripoSRConfig) -> dict[str, int]:
    """Sizes that the file states though others determine them."""
    return {
        "backbone.in_channels": config.channels,
        "backbone.cross_attention_dim": config.vit.width,
        "post_processor.in_channels": config.channels,
        "decoder.in_channels": 3 * config.plane_channels,
    }


def read_config(path: Path) -> TripoSRConfig:
    """Reads a config.yaml; a section `vit`, with transformers' names of ViT sizes, replaces the sizes of ViT-B/16.

    Raises CheckpointError, in one line, for a file that can't be read, and for classes, settings or sizes that
    aren't TripoSR's.
    """
    file = JSONFile(path, _flat(path))
    for key, name in CLASSES.items():
        if (given := file.get(key, str)) != name:
            raise CheckpointError(f"{path}: {key}: expected {name}, got {given!r}")
    for key, (default, supported) in FIXED.items():
        file.expect(key, default, supported)
    try:
        vit = _read_vit(file)
        sizes = {name: file.size(key) for key, name in SIZES.items()}
        config = TripoSRConfig(
            vit=vit,
            groups=file.size("backbone.norm_num_groups", 32),
            radius=file.get("renderer.radius", float),
            density_bias=file.get("renderer.density_bias", float, -1.0),
            **sizes,
        )
    except CheckpointError:
        raise
    except ValueError as error:  # of the configuration's own checks
        raise CheckpointError(f"{path}: {error}") from None
    dependent = _dependent(config)
    for key, size in dependent.items():
        if (given_size := file.size(key)) != size:
            raise CheckpointError(f"{path}: {key}: expected {size}, as the other parts have it, got {given_size}")
    known = {*CLASSES, *FIXED, *IDLE, *SIZES, *VIT_SIZES, *dependent, "vit.layer_norm_eps", "backbone.norm_num_groups"}
    if unknown := sorted(set(file.values) - known - {"renderer.radius", "renderer.density_bias"}):
        raise CheckpointError(f"{path}: unknown settings: {', '.join(unknown)}")
    return config


def _read_vit(file: JSONFile) -> ViTConfig:
    if any(key.startswith("vit.") for key in file.values):
        sizes = {name: file.size(key) for key, name in VIT_SIZES.items()}
        return ViTConfig(norm_eps=file.get("vit.layer_norm_eps", float, ViTConfig.norm_eps), **sizes)
    name = file.get("image_tokenizer.pretrained_model_name_or_path", str)
    if name != VIT_NAME:
        raise CheckpointError(
            f"{file.path}: image_tokenizer.pretrained_model_name_or_path: expected {VIT_NAME!r}, "
            f"or a section vit with its sizes, got {name!r}"
        )
    return ViTConfig()


def _flat(path: Path) -> dict[str, Any]:
    """The settings under dotted names ("tokenizer.plane_size"), with references to others resolved."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: not a readable YAML file: {reason}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: expected YAML settings, got {type(loaded).__name__}")
    flat: dict[str, Any] = {}
    for key, value in loaded.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": setting for name, setting in value.items()}
        else:
            flat[str(key)] = value
    for key, value in flat.items():
        if isinstance(value, str) and "${" in value:
            match = REFERENCE.fullmatch(value)
            target = flat.get(match[1]) if match else None
            if target is None or isinstance(target, str):
                raise CheckpointError(f"{path}: {key}: expected a value or a reference to one, got {value!r}")
            flat[key] = target
    return flat


def config_yaml(config: TripoSRConfig) -> str:
    """The text of a config.yaml that `read_config` reads back; the official classes do too if the ViT is ViT-B/16."""
    flat: dict[str, Any] = {
        "cond_image_size": config.image_size,
        **CLASSES,
        "image_tokenizer.pretrained_model_name_or_path": VIT_NAME,
        **{key: getattr(config, name) for key, name in SIZES.items()},
        **_dependent(config),
        "backbone.norm_num_groups": config.groups,
        "decoder.activation": "silu",
        "renderer.radius": config.radius,
        "renderer.feature_reduction": "concat",
        "renderer.density_activation": "exp",
        "renderer.density_bias": config.density_bias,
    }
    if config.vit != ViTConfig():
        flat |= {key: getattr(config.vit, name) for key, name in VIT_SIZES.items()}
        flat["vit.layer_norm_eps"] = config.vit.norm_eps
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return yaml.safe_dump(nested, sort_keys=False)
