"""What a finished stage depends on, in a few characters: models, pictures, tensors."""

import hashlib
from pathlib import Path

import torch

from .image import read_picture
from .mini.config import WEIGHTS as EMBEDDED_WEIGHTS
from .settings import EMBEDDED

MODEL_FILES = (".json", ".yaml", ".safetensors", ".ckpt")


def model_identity(model: str | Path) -> list:
    """What tells a model or another from the same place: names, sizes and times of its files; a repository's name."""
    path = EMBEDDED_WEIGHTS if model == EMBEDDED else Path(model).expanduser()
    if not path.exists():
        return [str(model)]
    files = sorted(p for p in path.rglob("*") if p.suffix in MODEL_FILES) if path.is_dir() else [path]
    states = [(file, file.stat()) for file in files]
    return [str(path.resolve()), *([str(f.relative_to(path)), s.st_size, s.st_mtime_ns] for f, s in states)]


def digest_picture(photo: str | Path) -> str:
    """Of the decoded pixels. Raises ImageError for what is no picture."""
    picture = read_picture(photo)
    return hashlib.sha256(f"{picture.mode} {picture.size} ".encode() + picture.tobytes()).hexdigest()[:16]


def digest(tensor: torch.Tensor) -> str:
    """Of a tensor's bytes."""
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
