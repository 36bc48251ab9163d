"""Networks that stay in main memory and visit an accelerator while they run.

Hooks on `forward`, as accelerate has them, would miss the weights that the networks read without calling the layer
that holds them; so what moves is the storage of parameters, in whole networks or in blocks of one.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def resident(tensors: Iterable[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Parameters and buffers lie on `device` inside, and where they were, bit for bit, afterwards."""
    homes = []
    try:
        for tensor in tensors:
            homes.append((tensor, tensor.data))
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, home in homes:
            tensor.data = home


@contextmanager
def streamed(network: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, each of `blocks` lies on `device` while its forward runs, the rest of `network` all the time."""
    within = {id(tensor) for block in blocks for tensor in tensors_of(block)}
    rest = [tensor for tensor in tensors_of(network) if id(tensor) not in within]
    with ExitStack() as stack:
        stack.enter_context(resident(rest, device))
        for block in blocks:
            for handle in _visit_on_forward(block, device):
                stack.callback(handle.remove)
        yield


ALIGNED = 512  # bytes; what the GPU's bulk copies of tiles want is 16


@contextmanager
def packed(tensors: Iterable[torch.Tensor], device: torch.device) -> Iterator[None]:
    """As `resident`, in one piece of memory: not a byte is lost between tensors, and none stays behind."""
    homes = [(tensor, tensor.data) for tensor in tensors]
    piece = torch.empty(sum(room(home) for _, home in homes), dtype=torch.uint8, device=device)
    try:
        at = 0
        for tensor, home in homes:
            tensor.data = view(piece, at, home).copy_(home)
            at += room(home)
        yield
    finally:
        for tensor, home in homes:
            tensor.data = home


def room(tensor: torch.Tensor) -> int:
    """Bytes that a tensor takes in a piece of memory that several share."""
    return -(-tensor.nbytes // ALIGNED) * ALIGNED


def view(piece: torch.Tensor, at: int, like: torch.Tensor) -> torch.Tensor:
    """The bytes of a piece of memory from `at` on as a tensor of `like`'s type, shape and order in memory."""
    flat = piece[at : at + like.nbytes].view(like.dtype)
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset())


def tensors_of(*networks: nn.Module) -> list[torch.Tensor]:
    """All parameters and buffers."""
    return [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]


def _visit_on_forward(block: nn.Module, device: torch.device):
    visit = ExitStack()

    def enter(*_):
        visit.enter_context(resident(tensors_of(block), device))

    def leave(*_):
        visit.close()

    yield block.register_forward_pre_hook(enter)
    yield block.register_forward_hook(leave, always_call=True)  # an error must not leave the block behind
