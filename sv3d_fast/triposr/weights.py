"""TripoSR's weights: the official pickle, read as tensors and nothing else, or safetensors."""

import pickle
import struct
import zipfile
from pathlib import Path

import torch
from torch import nn

from sv3d_fast.model.checkpoint import PICKLES, CheckpointError, Part, TensorStore, check, fill

TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# What a reader of pickles and archives raises on damaged files, next to its own error.
DAMAGED = (
    OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError,
    struct.error, OverflowError, MemoryError, zipfile.BadZipFile,
)  # fmt: skip


class PickledStore(TensorStore):
    """The tensors of a checkpoint pickled by torch.save, a flat dictionary by name; no code in it is ever run.

    Raises CheckpointError for a file that is damaged, or holds anything but plain tensors.
    """

    def __init__(self, path: Path):
        super().__init__([])
        try:
            # archives are mapped rather than read: a load then needs the memory of the network alone
            loaded = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{path}: refused: not a checkpoint of tensors alone, and loading anything else can run code in it"
            ) from None
        except DAMAGED as error:
            line = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{path}: not a readable checkpoint: {line}") from None
        if not isinstance(loaded, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in loaded.items()
        ):
            raise CheckpointError(f"{path}: expected a dictionary of tensors by name, as model.state_dict() gives it")
        self._tensors: dict[str, torch.Tensor] = loaded
        for name, tensor in loaded.items():
            strided = tensor.layout == torch.strided and not tensor.is_quantized
            self.files[name] = path
            self.shapes[name] = tensor.shape
            self.types[name] = TYPES.get(tensor.dtype, str(tensor.dtype)) if strided else str(tensor.layout)

    def get(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def load_weights(model: nn.Module, path: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Fills a model on the meta device, whose names are the official ones; it ends in eval mode without gradients.

    path: a .safetensors file or a pickle (.ckpt and the like). Raises CheckpointError, in one line, for files that
    can't be read and for tensors that are missing, too many, misshapen, of no floating type or not finite.
    """
    suffix = path.suffix.lower()
    if suffix != ".safetensors" and suffix not in PICKLES:
        raise CheckpointError(f"{path}: expected a .safetensors file or a checkpoint ({', '.join(PICKLES)})")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    store = PickledStore(path) if suffix in PICKLES else TensorStore([path])
    part = Part("TripoSR", model, store, {})
    check(path, [part], tolerated=lambda name: False)
    fill(part, path, dtype, device)
