"""SV3D's networks as a diffusers pipeline holds them: loaded, saved, moved between devices."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers import EulerDiscreteScheduler
from diffusers.video_processor import VideoProcessor
from torch import nn

from .custom_pipeline import component_entries
from .model.clip import CLIPImageTower
from .model.config import ModelConfig
from .model.folder_config import EXTRA, folder_files
from .model.unet import SV3DUNet
from .model.vae import SV3DVAE
from .model.weights import NOTICE, SV3DModel, load_model, save_model
from .offload import resident, streamed, tensors_of
from .prediction import release

NETWORKS = ("unet", "vae", "image_encoder")


class Turns:
    """A lock for the calls of one pipeline, which a thread that has it may take again; its copies are new ones."""

    def __init__(self):
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple:
        return Turns, ()


class NetworksPipeline(DiffusionPipeline):
    """The part of a diffusers pipeline that every pipeline of SV3D's networks shares.

    model_config: sizes of the networks and the sampler's settings. notice: whose licence the weights are under.
    """

    model_cpu_offload_seq = "image_encoder->unet->vae"  # type: ignore[assignment]
    unet: SV3DUNet
    vae: SV3DVAE
    image_encoder: CLIPImageTower
    model_config: ModelConfig

    def __init__(
        self,
        unet: SV3DUNet,
        vae: SV3DVAE,
        image_encoder: CLIPImageTower,
        model_config: ModelConfig,
        notice: str | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, vae=vae, image_encoder=image_encoder, model_config=model_config)
        self.register_to_config(notice=notice)
        self.notice = notice
        self.vae_scale_factor = model_config.vae.factor
        self.video_processor = VideoProcessor(do_resize=True, vae_scale_factor=self.vae_scale_factor)
        self._offload_device: torch.device | None = None
        self._offload_by_block = False
        self._turns = Turns()

    @classmethod
    def from_pretrained(  # type: ignore[override]  # named keywords: an unknown one is a TypeError
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        torch_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        variant: str | None = None,
        device_map: str | torch.device | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = True,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
    ) -> Self:
        """Loads every layout that `sv3d_fast.model.weights.load_model` reads: official file, folder, Hub repository.

        dtype (torch_dtype is its older name): of all networks, or by name with "default" for the rest; float32 if not
        given. device_map: one device, such as "cuda". use_safetensors, low_cpu_mem_usage: always so; for callers that
        say it. Raises ValueError (CheckpointError) for weights that can't be found, read or used.
        """
        if dtype is not None and torch_dtype is not None:
            raise ValueError("torch_dtype: the older name of dtype; expected one of the two")
        if use_safetensors is False or not low_cpu_mem_usage:
            raise ValueError("use_safetensors and low_cpu_mem_usage: expected True: weights are only read so")
        wanted = dtype or torch_dtype or torch.float32
        if isinstance(wanted, Mapping):
            named = {name: precision for name, precision in wanted.items() if name != "default"}
            wanted = dict.fromkeys(NETWORKS, wanted.get("default", torch.float32)) | named
        model = load_model(
            pretrained_model_name_or_path, dtype=wanted, device=device_map or "cpu", variant=variant,
            cache_dir=cache_dir, local_files_only=local_files_only, token=token, revision=revision,
        )  # fmt: skip
        pipe = cls(model.unet, model.vae, model.image_encoder, model.config, model.notice)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """For `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`: what to build the pipeline from, given the
        contents of a folder's model_index.json; this package's networks in place of diffusers'."""
        notice = config_dict.get(EXTRA, {"notice": NOTICE}).get("notice")
        return {**component_entries(), "notice": notice}, kwargs, {}

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Writes a folder of diffusers' layout in the networks' precision; see `sv3d_fast.model.weights.save_model`."""
        if not safe_serialization or variant is not None:
            raise ValueError("safe_serialization and variant: expected True and None: only plain safetensors are saved")
        save_model(self.model, save_directory, max_shard_size=max_shard_size or "5GB")

    @property
    def model(self) -> SV3DModel:
        """The networks and their configuration as the rest of this package takes them."""
        return SV3DModel(self.model_config, self.unet, self.vae, self.image_encoder, self.notice)

    @property
    def components(self) -> dict[str, Any]:
        """What the constructor takes: `type(pipe)(**pipe.components)` is the same pipeline and shares its weights."""
        return super().components | {"notice": self.notice}

    @property
    def scheduler(self) -> EulerDiscreteScheduler:
        """The sampler as a diffusers scheduler of the same sigmas, for reading: sampling is by Euler's method alone."""
        files = folder_files(self.model_config, False, None)
        return EulerDiscreteScheduler.from_config(files["scheduler/scheduler_config.json"])

    @property
    def device(self) -> torch.device:
        """Where the networks are stored."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the UNet."""
        return next(self.unet.parameters()).dtype

    @property
    def _execution_device(self) -> torch.device:
        return self._offload_device or self.device

    def to(self, *args, **kwargs) -> Self:
        """`torch.nn.Module.to` of all networks. Moving them to an accelerator ends an offload."""
        kwargs.pop("silence_dtype_warnings", None)
        for name in NETWORKS:
            getattr(self, name).to(*args, **kwargs)
        if self.device.type != "cpu":
            self._offload_device = None
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keeps the networks in main memory; the encoders, the UNet and the decoder visit the GPU in turn.

        Where there is no GPU the call is accepted, and the networks run where they are stored, on the CPU.
        """
        self._offload(gpu_id, device, by_block=False)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """As `enable_model_cpu_offload`, but the UNet visits block by block: least memory, a transfer in every step."""
        self._offload(gpu_id, device, by_block=True)

    def enable_group_offload(self, *args, **kwargs) -> None:
        """Not offered: diffusers' hooks would miss weights. Raises NotImplementedError."""
        raise NotImplementedError("enable_group_offload: use enable_sequential_cpu_offload, which moves whole blocks")

    def remove_all_hooks(self) -> None:
        """Ends an offload; the networks stay in main memory until `to`."""
        self._offload_device = None

    def enable_vae_slicing(self) -> None:
        """Accepted; `decode_chunk_size` sets how many frames are decoded at once."""

    def disable_vae_slicing(self) -> None:
        """Accepted; `decode_chunk_size` sets how many frames are decoded at once."""

    def _offload(self, gpu_id: int | None, device: torch.device | str | None, *, by_block: bool) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        target = torch.device(device)
        if gpu_id is not None and target.index is not None:
            raise ValueError(f"gpu_id: {gpu_id} and device={device} both name a GPU; expected one of the two")
        if target.type != "cpu":
            target = torch.device(target.type, target.index or gpu_id or 0)
        if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device: expected one of the {torch.cuda.device_count()} CUDA devices here, got {target}")
        self.to("cpu")
        self._offload_device, self._offload_by_block = (None if target.type == "cpu" else target), by_block

    def _loaded(self, *names: str) -> AbstractContextManager[None]:
        """The named networks where they run."""
        if self._offload_device is None:
            return nullcontext()
        networks = [getattr(self, name) for name in names]
        if self._offload_by_block and names == ("unet",):
            (unet,) = networks
            return streamed(unet, [*unet.down_blocks, unet.mid_block, *unet.up_blocks], self._offload_device)
        return self._visiting(networks, self._offload_device)

    @contextmanager
    def _visiting(self, networks: list[nn.Module], device: torch.device) -> Iterator[None]:
        try:
            with resident(tensors_of(*networks), device):
                yield
        finally:
            release(self.unet)  # what was fused of it would stay behind
