"""What `sv3d-fast info` prints: versions, devices, and for each op which implementations can run here and why not."""

import importlib
import pkgutil
import platform
from importlib import metadata

import torch

from . import __version__, kernels
from .kernels import native
from .kernels.op import Op, registry
from .sizes import parse_size

PACKAGES = (
    "torch", "triton", "numpy", "diffusers", "transformers", "gsplat", "trimesh", "xatlas", "pillow", "av", "rembg",
)  # fmt: skip


def describe() -> str:
    """The whole text."""
    lines = [f"sv3d-fast {__version__}, Python {platform.python_version()} on {platform.platform()}"]
    lines.append("packages    " + ", ".join(f"{name} {version or '-'}" for name, version in versions().items()))
    lines += [f"native {kind:<5}{_native(kind)}" for kind in ("cpu", "cuda")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            lines.append(f"cuda:{index}      {p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}")
    else:
        lines.append("cuda        no device; everything runs on the CPU")
    lines.append("")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, op in sorted(ops().items()):
        example = next(iter(op.examples(device)))
        lines.append(f"{name:<20} {op.choose(*example).name}")
        for implementation in op.implementations:
            for reason in implementation.why_not(*example):
                lines.append(f"{'':<20}   not {implementation.name}: {reason}")
    return "\n".join(lines)


def describe_plans(max_memory: str | None) -> str:
    """The plans for an orbit at SV3D's own sizes, or with a budget the one that it gets. Raises ValueError for a budget
    that can't be read or is too little."""
    from .memory import Shape, table
    from .model.config import ModelConfig

    config = ModelConfig()
    budget = None if max_memory is None else parse_size("max_memory", max_memory)
    return table(config, Shape(config.image_size, config.frames), budget)


def chosen_implementations(device: str) -> dict[str, str]:
    """Name of the implementation that each op runs on a device type ("cpu" or "cuda"), judged by its first example."""
    return {name: op.choose(*next(iter(op.examples(device)))).name for name, op in sorted(ops().items())}


def ops() -> dict[str, Op]:
    """Every op there is, by name."""
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    return registry


def versions() -> dict[str, str | None]:
    """Version of each package that results depend on; None for one that is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _native(kind: str) -> str:
    if not native.available(kind):
        return "not built"
    if kind == "cuda" and not torch.cuda.is_available():
        return "built"  # it loads only where a driver is
    try:
        library = native.load(kind)
        return f"built {library.build_info()}" if kind == "cpu" else "built"  # the CPU's alone tells how
    except native.NativeLibraryError as error:
        return f"built, but {error}"
