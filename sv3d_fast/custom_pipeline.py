"""Loads one component at a time, as diffusers does for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`.

diffusers finds a class by the entry in model_index.json, sees by its base how to load it, and calls `from_pretrained`
with the component's folder. These classes stand in those entries and return SV3D's own networks.
"""

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from .model.config import ModelConfig
from .model.weights import declare, load_network


def component_entries() -> dict[str, list[str]]:
    """[module, class] of each component that the pipeline's constructor needs, as in model_index.json."""
    return {
        "unet": [__name__, UNet.__name__],
        "vae": [__name__, VAE.__name__],
        "image_encoder": [__name__, ImageEncoder.__name__],
        "model_config": [__name__, Config.__name__],
    }


class _Network(ModelMixin):
    """Tells diffusers to pass precision and variant to `from_pretrained`; never made itself."""

    name: ClassVar[str]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | os.PathLike,
        *,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        device_map: Any = None,
        **_: Any,
    ) -> nn.Module:
        """The network of the folder's parent that bears its name, float32 by default. Raises CheckpointError, and
        ValueError for a device_map that parts the networks."""
        if device_map is not None and not isinstance(device_map, str):
            raise ValueError(f"device_map: expected one device, such as 'cuda', got {device_map!r}")
        return load_network(
            Path(folder).parent, cls.name, dtype=torch_dtype or torch.float32, device=device_map or "cpu",
            variant=variant,
        )  # fmt: skip


class UNet(_Network):
    name = "unet"


class VAE(_Network):
    name = "vae"


class ImageEncoder(_Network):
    name = "image_encoder"


class Config(DiffusionPipeline):
    """Sizes and sampler; it has no folder of its own, so diffusers passes the whole model's."""

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> ModelConfig:  # type: ignore[override]
        return declare(Path(folder)).config
