"""Where a network stopped computing with numbers."""

from collections.abc import Callable

import torch
from torch import nn


@torch.no_grad()
def first_non_finite(network: nn.Module, run: Callable[[], object]) -> str | None:
    """Name of the first layer of `network`, in the order in which layers finish, whose output is not finite in `run`;
    None if all are. Each layer's output is read back, so this is for a run that is known to have failed."""
    found: list[str] = []

    def watch(name: str):
        def hook(module, arguments, output) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and not all(torch.isfinite(t).all() for t in tensors if isinstance(t, torch.Tensor)):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in network.named_modules() if name]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
