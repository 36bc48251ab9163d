"""Safetensors files as lazy stores of named tensors; filling networks from them, and writing them.

Everything is checked by name, shape and type before the first tensor is read. Tensors go one by one from the mapped
file to their place, so that a load needs the memory of the finished network and little more.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .names import Source

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
NAMED = 8  # tensors that an error names
MAPPED = 2**29  # bytes read through one mapping; the pages of a mapping stay resident until it is dropped


class CheckpointError(ValueError):
    """Weights that can't be used: the message says, in one line, where and why."""


def refuse_pickle(path: Path) -> None:
    """Raises CheckpointError for a file name of a pickled checkpoint."""
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path}: refused, since loading a pickled checkpoint ({path.suffix}) can run any code in it; "
            f"expected .safetensors"
        )


class TensorStore:
    """The tensors of one or several safetensors files, by name. Only headers are read until `get`.

    shapes: name -> shape. types: name -> safetensors' type name. Raises CheckpointError for files that can't be read.
    """

    def __init__(self, paths: Sequence[Path]):
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.types: dict[str, str] = {}
        self._open_path: Path | None = None
        self._open_file: Any = None
        self._bytes_read = 0
        for path in paths:
            file = _open(path)
            for name in file.keys():
                tensor = file.get_slice(name)
                self.files[name] = path
                self.shapes[name] = torch.Size(tensor.get_shape())
                self.types[name] = tensor.get_dtype()

    def get(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, as a view of the mapped file."""
        path = self.files[name]
        if path != self._open_path or self._bytes_read > MAPPED:
            self._open_file = None
            self._open_path, self._open_file, self._bytes_read = path, _open(path), 0
        try:
            tensor = self._open_file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: can't read {name}: {_line(error)}") from None
        self._bytes_read += tensor.nbytes
        return tensor


def _open(path: Path):
    refuse_pickle(path)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {_what_it_is(path) or _line(error)}") from None


def _what_it_is(path: Path) -> str | None:
    """What a file that safetensors can't read turns out to be, where that is known to happen."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "it is a pickled checkpoint under that name, refused since loading one can run any code in it"
    if start.startswith(b"version https://"):
        return "it is a Git LFS pointer, not the weights; fetch them with 'git lfs pull'"
    return None


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Part:
    """A network on the meta device and where each of its tensors is.

    sources: a name of the network's state dict -> where the store has it; the same name where it isn't listed.
    """

    label: str
    module: nn.Module
    store: TensorStore
    sources: dict[str, Source]

    def source(self, name: str) -> Source:
        return self.sources.get(name) or Source(name)


def check(where: Path, parts: Iterable[Part], tolerated: Callable[[str], bool]) -> None:
    """Raises CheckpointError for tensors that are missing, misshapen or of no floating type, and for unexpected ones.

    tolerated: says of a tensor that no part takes whether it is known to be harmless.
    """
    problems, taken, stores = [], set(), {}
    for part in parts:
        stores[id(part.store)] = part.store
        for name, target in part.module.state_dict().items():
            source = part.source(name)
            taken.add((id(part.store), source.name))
            shape = part.store.shapes.get(source.name)
            expected = source.stored_shape(target.shape)
            if shape is None:
                problems.append(f"missing {source.name} ({part.label})")
            elif shape != expected:
                problems.append(f"{source.name} is {tuple(shape)}, expected {tuple(expected)}")
            elif part.store.types[source.name] not in FLOATS:
                problems.append(f"{source.name} is of type {part.store.types[source.name]}, expected floating point")
    for key, store in stores.items():
        problems += [f"unexpected {n}" for n in store.shapes if (key, n) not in taken and not tolerated(n)]
    _raise_all(where, "tensors don't fit", list(dict.fromkeys(problems)))


def _raise_all(where: Path, what: str, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise CheckpointError(f"{where}: {len(problems)} {what}: {'; '.join(problems[:NAMED])}{more}")


def fill(part: Part, where: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Reads a part's tensors, which `check` has passed, into its module, which ends in eval mode without gradients.

    Raises CheckpointError for values that aren't finite in `dtype`.
    """
    state, broken = {}, []
    for name, target in part.module.state_dict().items():
        source = part.source(name)
        tensor = source.take(part.store.get(source.name), target.shape)
        # copied even where nothing changes: a view of the file would break when somebody overwrites it
        tensor = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        if not torch.stack(tensor.aminmax()).isfinite().all():  # 30 times faster than a test of every value
            broken.append(source.name)
        state[name] = tensor
    _raise_all(where, f"tensors hold values that aren't finite in {str(dtype).removeprefix('torch.')}", broken)
    part.module.load_state_dict(state, assign=True)
    part.module.requires_grad_(False).eval()


def write_tensors(module: nn.Module, folder: Path, stem: str, max_shard_size: int | str) -> None:
    """Writes a network's state dict as `stem`.safetensors, or as numbered shards with diffusers' index file."""
    state = module.state_dict()
    try:
        plan = split_torch_state_dict_into_shards(
            state, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError:
        raise ValueError(f"max_shard_size: expected a size such as '5GB', got {max_shard_size!r}") from None
    for file, names in plan.filename_to_tensors.items():
        shard = {name: state[name].detach().cpu().contiguous() for name in names}
        path = folder / file
        path.touch()  # with the permissions that the umask leaves; save_file replaces it by a file of mode 0600
        mode = path.stat().st_mode
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(mode)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
