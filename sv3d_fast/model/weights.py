"""Loading and saving a whole SV3D: official single files, diffusers-layout folders, Hub repositories."""

import functools
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import hub
from .checkpoint import PICKLES, CheckpointError, Part, TensorStore, check, fill, refuse_pickle, write_tensors
from .clip import CLIPImageTower
from .config import ModelConfig
from .folder_config import EXTRA, JSONFile, check_index, folder_files, read_config
from .names import CLIP_PREFIX, ENCODER_PREFIX, UNET_PREFIX, Source, clip_names, vae_names
from .unet import SV3DUNet
from .unet_names import official_names
from .vae import SV3DVAE

NOTICE = (
    "Stable Video 3D weights are licensed by Stability AI, not by this package: "
    "see the licence that came with them (https://huggingface.co/stabilityai/sv3d)"
)
OFFICIAL_FILES = {"u": "sv3d_u.safetensors", "p": "sv3d_p.safetensors"}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "image_encoder": "model"}
VECTOR = f"{UNET_PREFIX}label_emb.0.0.weight"
OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


@dataclass(frozen=True)
class SV3DModel:
    """The networks of an SV3D and their configuration.

    notice: whose licence the weights are under; None for weights that came with no such duty.
    """

    config: ModelConfig
    unet: SV3DUNet
    vae: SV3DVAE
    image_encoder: CLIPImageTower
    notice: str | None = None


def load_model(
    path_or_repo_id: str | os.PathLike,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    revision: str | None = None,
) -> SV3DModel:
    """Loads a model in eval mode, without gradients, in `dtype` on `device`.

    path_or_repo_id: an official file (sv3d_u.safetensors, sv3d_p.safetensors), a folder that holds such files or has
        diffusers' layout, or the name of a Hub repository with either. What exists here never touches the network.
    dtype: of all networks, or one for each of "unet", "vae" and "image_encoder" (float32 where it names none).
    variant: which weights, where there are several: "u" or "p" of the official files ("p" by default), or the variant
        of diffusers' file names, such as "fp16".
    cache_dir, local_files_only, token, revision: as huggingface_hub's snapshot_download takes them.
    Raises CheckpointError (a ValueError), in one line, for weights that can't be found, read or used.
    """
    dtypes, place = _dtypes(dtype), _device(device)
    path = Path(path_or_repo_id).expanduser()
    if not path.exists():
        if isinstance(path_or_repo_id, os.PathLike) or not _may_be_repository(path_or_repo_id):
            raise CheckpointError(f"{path}: no such file or folder")
        where = {"cache_dir": cache_dir, "local_files_only": local_files_only, "token": token, "revision": revision}
        path = _fetch(path_or_repo_id, variant, where)
    if path.is_dir() and not (path / "model_index.json").exists():
        path = _official_file(path, variant)
    model = _load_folder(path, variant, dtypes, place) if path.is_dir() else _load_file(path, variant, dtypes, place)
    if model.notice:
        _print_once(model.notice)
    return model


@functools.cache
def _print_once(notice: str) -> None:
    warnings.warn(notice, stacklevel=3)


def _dtypes(dtype: torch.dtype | Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    named = dtype if isinstance(dtype, Mapping) else dict.fromkeys(STEMS, dtype)
    if unknown := set(named) - set(STEMS):
        raise ValueError(f"dtype: expected the names {', '.join(STEMS)}, got {', '.join(map(repr, sorted(unknown)))}")
    for value in named.values():
        if value not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"dtype: expected float16, bfloat16, float32 or float64, got {value}")
    return dict.fromkeys(STEMS, torch.float32) | dict(named)


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected a device such as 'cpu' or 'cuda:0', got {device!r}") from None
    count = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= count:
        raise ValueError(f"device: expected one of the {count} CUDA devices here, got {device!r}")
    return place


def _may_be_repository(name: str) -> bool:
    is_path = name.startswith((".", "~", "/")) or "\\" in name or Path(name).suffix in (".safetensors", *PICKLES)
    return name.count("/") <= 1 and not is_path


def _fetch(repo_id: str, variant: str | None, where: dict) -> Path:
    """Downloads the small files, which tell the layout, and then no other weights than those asked for."""
    folder = hub.fetch(repo_id, ["*.json"], **where)
    if not (folder / "model_index.json").exists():
        if variant not in (None, *OFFICIAL_FILES):
            raise CheckpointError(
                f"variant: {repo_id} has no model_index.json, so expected 'u' or 'p', got {variant!r}; "
                f"the precision is dtype="
            )
        return hub.fetch(repo_id, [OFFICIAL_FILES[variant or "p"]], **where)
    ignored = [f"*{end}" for end in PICKLES]
    if variant is None:
        files = [f"{name}/{stem}{end}" for name, stem in STEMS.items() for end in (".safetensors", "-*.safetensors")]
        ignored.append("*-of-*.*.safetensors")  # shards of variants, under their old names
    else:
        files = [f"{name}/{stem}*.{variant}{end}" for name, stem in STEMS.items() for end in (".*", "-*")]
    return hub.fetch(repo_id, ["*.json", *files], ignore=ignored, **where)


def _official_file(folder: Path, variant: str | None) -> Path:
    found = [kind for kind, name in OFFICIAL_FILES.items() if (folder / name).is_file()]
    if not found:
        expected = ", ".join(OFFICIAL_FILES.values())
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLES)
        if pickles:
            refuse_pickle(folder / pickles[0])
        raise CheckpointError(f"{folder}: no model here: expected model_index.json, or one of {expected}")
    if variant not in (None, *found):
        kinds = " or ".join(map(repr, found))
        raise CheckpointError(f"variant: {folder} holds official files, expected {kinds}, got {variant!r}")
    return folder / OFFICIAL_FILES[variant or found[-1]]


def _load_file(path: Path, variant: str | None, dtypes: dict[str, torch.dtype], device: torch.device) -> SV3DModel:
    refuse_pickle(path)
    if variant not in (None, *OFFICIAL_FILES):
        raise CheckpointError(f"variant: {path} is a single file, expected 'u' or 'p', got {variant!r}")
    model = load_official(path, dtypes, device)
    if variant not in (None, model.config.unet.variant):
        raise CheckpointError(f"variant: {path} holds SV3D_{model.config.unet.variant}, got {variant!r}")
    return model


def load_official(
    path: Path, dtypes: dict[str, torch.dtype], device: torch.device, config: ModelConfig | None = None
) -> SV3DModel:
    """Loads an official single file (generative-models' names); u or p is told by the width of the vector embedding.

    config: sizes of the networks, but for that width; SV3D's by default. Raises CheckpointError.
    """
    store = TensorStore([path])
    if VECTOR not in store.shapes or len(store.shapes[VECTOR]) != 2:
        raise CheckpointError(f"{path}: not an official SV3D checkpoint: no matrix {VECTOR}")
    width = store.shapes[VECTOR][1]
    if width not in (256, 1280):
        what = "Stable Video Diffusion (vector width 768)" if width == 768 else f"a model of vector width {width}"
        raise CheckpointError(f"{path}: this is {what}, not SV3D (256 or 1280)")
    config = config or ModelConfig()
    config = replace(config, unet=replace(config.unet, vector_dim=width))
    with torch.device("meta"):
        model = SV3DModel(
            config, SV3DUNet(config.unet), SV3DVAE(config.vae), CLIPImageTower(config.clip), notice=NOTICE
        )
    unet_names = {ours: Source(UNET_PREFIX + name) for name, ours in official_names(config.unet).items()}
    parts = [
        Part("unet", model.unet, store, unet_names),
        Part("vae", model.vae, store, vae_names(config.vae)),
        Part("image_encoder", model.image_encoder, store, clip_names(config.clip)),
    ]
    # Beside what runs, the file has CLIP's text side and the conditioner's own copy of a decoder.
    unused = (CLIP_PREFIX, f"{ENCODER_PREFIX}decoder.", f"{ENCODER_PREFIX}post_quant_conv.")
    check(path, parts, lambda name: name.startswith(unused) and not name.startswith(f"{CLIP_PREFIX}visual."))
    for part in parts:
        fill(part, path, dtypes[part.label], device)
    return model


def _load_folder(folder: Path, variant: str | None, dtypes: dict[str, torch.dtype], device: torch.device) -> SV3DModel:
    model = declare(folder)
    parts = [_folder_part(model, folder, name, variant) for name in STEMS]
    _fill_folder(parts, folder, dtypes, device)
    return model


def declare(folder: Path) -> SV3DModel:
    """The model that a folder of diffusers' layout describes, its networks without storage. Raises CheckpointError."""
    index = JSONFile.read(folder / "model_index.json")
    check_index(index)
    config, post_quant_conv = read_config(folder)
    # A folder that we didn't write is a conversion of the official weights.
    ours = index.get(EXTRA, dict, {"notice": NOTICE})
    notice = None if ours.get("notice") is None else JSONFile(index.path, ours).get("notice", str)
    try:
        with torch.device("meta"):
            vae = SV3DVAE(config.vae, post_quant_conv=post_quant_conv)
            return SV3DModel(config, SV3DUNet(config.unet), vae, CLIPImageTower(config.clip), notice)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def load_network(
    folder: Path, name: str, *, dtype: torch.dtype, device: str | torch.device, variant: str | None
) -> torch.nn.Module:
    """One network ("unet", "vae" or "image_encoder") of a folder of diffusers' layout, else as `load_model`."""
    part = _folder_part(declare(folder), folder, name, variant)
    _fill_folder([part], folder, _dtypes({name: dtype}), _device(device))
    return part.module


def _folder_part(model: SV3DModel, folder: Path, name: str, variant: str | None) -> Part:
    module = getattr(model, name)
    store = TensorStore(_weight_files(folder / name, STEMS[name], variant))
    return Part(name, module, store, _old_attention(module, store) if name == "vae" else {})


def _fill_folder(parts: list[Part], folder: Path, dtypes: dict[str, torch.dtype], device: torch.device) -> None:
    harmless = ("post_quant_conv.", "vision_model.embeddings.position_ids")
    check(folder, parts, lambda name: name.startswith(harmless))
    for part in parts:
        fill(part, folder / part.label, dtypes[part.label], device)


def _old_attention(module: SV3DVAE, store: TensorStore) -> dict[str, Source]:
    """The attention's names in folders that early versions of diffusers wrote."""
    sources = {}
    for name in module.state_dict():
        for new, old in OLD_ATTENTION.items():
            if new in name and name not in store.shapes and name.replace(new, old) in store.shapes:
                sources[name] = Source(name.replace(new, old))
    return sources


def _weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The safetensors files of one network: a single file, or the shards that its index lists."""
    single = folder / (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors")
    index = folder / (f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json")
    if single.is_file():
        return [single]
    if not index.is_file():
        there = sorted(p.name for p in folder.glob("*") if p.suffix == ".safetensors" or p.suffix.lower() in PICKLES)
        for name in there:
            refuse_pickle(folder / name)
        raise CheckpointError(
            f"{folder}: no {single.name} nor {index.name}; variant is {variant!r}, "
            f"there is {', '.join(there) or 'no weight file'}"
        )
    names = JSONFile.read(index).get("weight_map", dict).values()
    files = sorted({str(name) for name in names})
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: expected names of safetensors files beside it, got {name!r}")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index}: lists {name}, which is not there")
    return [folder / name for name in files]


def save_model(model: SV3DModel, folder: str | os.PathLike, *, max_shard_size: int | str = "5GB") -> None:
    """Writes a folder of diffusers' layout that `load_model` reads back exactly, in the precision of the networks.

    Everything is written beside `folder` and renamed at the end: it has the whole model, or is as it was before. An
    earlier model in its place is replaced. max_shard_size: bytes of a weight file, or a size such as "5GB".
    Raises ValueError where something else is in the way, or networks and configuration disagree.
    """
    target = Path(folder).expanduser().absolute()
    if target.exists() and not (target / "model_index.json").is_file() and not _is_empty_folder(target):
        raise ValueError(f"folder: expected a new or empty folder or an earlier model, got {target}")
    modules = {"unet": model.unet, "vae": model.vae, "image_encoder": model.image_encoder}
    configs = {"unet": model.config.unet, "vae": model.config.vae, "image_encoder": model.config.clip}
    for name, module in modules.items():
        if module.config != configs[name]:
            raise ValueError(f"model: {name} was built from {module.config}, its configuration says {configs[name]}")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = (target.with_name(f".{target.name}.{uuid.uuid4().hex}.{end}") for end in ("new", "old"))
    try:
        for path, contents in folder_files(model.config, model.vae.post_quant_conv is not None, model.notice).items():
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            (temporary / path).write_text(json.dumps(contents, indent=2) + "\n")
        if model.notice:
            (temporary / "NOTICE").write_text(model.notice + "\n")
        for name, module in modules.items():
            write_tensors(module, temporary / name, STEMS[name], max_shard_size)
        if target.exists():
            target.rename(aside)
        temporary.rename(target)
    finally:
        if aside.exists() and not target.exists():
            aside.rename(target)
        for leftover in (temporary, aside):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
