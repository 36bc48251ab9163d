"""The official checkpoint, a pickle, to files that run nothing when they are read."""

import os
from pathlib import Path

from sv3d_fast.files import OutputError
from sv3d_fast.model.checkpoint import CheckpointError

from .system import CONFIG_NAME, WEIGHTS_NAME, TripoSR


def convert(
    checkpoint: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Writes config.yaml and model.safetensors, which TripoSR.from_pretrained(folder) reads; returns their paths.

    Tensors are checked and become float32. config: the checkpoint's config.yaml, the one beside it if None. In the
    checkpoint's own folder config.yaml is written anew, with equal settings.
    Raises CheckpointError for files that are missing or can't be used, and OutputError where files stand in the way
    or can't be written.
    """
    checkpoint, folder = Path(checkpoint).expanduser(), Path(folder)
    settings = checkpoint.parent / CONFIG_NAME if config is None else Path(config).expanduser()
    if not checkpoint.is_file():
        raise CheckpointError(f"{checkpoint}: no such file")
    if not settings.is_file():
        raise CheckpointError(f"{settings}: no such file; it comes with the checkpoint, --config names another place")
    written = [folder / CONFIG_NAME, folder / WEIGHTS_NAME]
    in_the_way = [p for p in written if p.exists() and not p.samefile(settings)]
    if in_the_way and not overwrite:
        raise OutputError(f"{in_the_way[0]} is there already; give another folder, or --overwrite to replace it")
    model = TripoSR.from_pretrained(checkpoint.parent, str(settings.resolve()), checkpoint.name)
    model.save_pretrained(folder)
    return written
