"""The UNet's widest blocks streamed from main memory while the others run, three slots on the GPU between them.

At SV3D's sizes two thirds of the weights lie in the layers of 1280 channels, which take a third of a step. The first
blocks travel while the finest levels run; after that a block's copy starts when the block that had its slot is done,
and travels behind the two in between. The copies are part of the step's CUDA graph. On a CPU the same code copies in
main memory, in order.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .model.fused_transformer import FusedTransformer
from .model.fused_unet import FusedUNet
from .offload import room, view

SLOTS = 3
LEAST = 2**16  # bytes of a tensor that is worth streaming
WIDE = 1 / 3  # of the widest block's bytes: what a block must have to be streamed

Block = tuple[nn.Module, list[Tensor]]


def streamable(network: FusedUNet) -> list[Block]:
    """The blocks to stream, in the order in which a step runs them, with those of their tensors that only it reads."""
    blocks = [(block, _of_a_step(block)) for block in network.blocks()]
    widest = max(sum(map(room, tensors)) for _, tensors in blocks)
    return [(block, tensors) for block, tensors in blocks if sum(map(room, tensors)) > WIDE * widest]


def slot_size(blocks: Sequence[Block]) -> int:
    """Bytes of each of the slots."""
    return max((sum(map(room, tensors)) for _, tensors in blocks), default=0)


class WeightStream:
    """While it is open, each block's weights lie in a slot on `device` when the block runs, and nowhere else there.

    blocks: as `streamable` gives them, their tensors in main memory. `close` puts them back there, bit for bit.
    """

    def __init__(self, network: FusedUNet, blocks: Sequence[Block], device: torch.device):
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slots = [torch.empty(slot_size(blocks), dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._homes = [(tensor, tensor.data) for _, tensors in blocks for tensor in tensors]
        self._hosts: list[Tensor] = []
        self._ready: list[torch.cuda.Event | None] = [None] * len(blocks)
        self._handles: list[RemovableHandle] = [
            network.register_forward_pre_hook(self._begin),
            network.register_forward_hook(self._end, always_call=True),
        ]
        for index, (block, tensors) in enumerate(blocks):
            self._hosts.append(self._move_out(tensors, self._slots[index % SLOTS]))
            self._handles.append(block.register_forward_pre_hook(self._at(index, self._arrive)))
            self._handles.append(block.register_forward_hook(self._at(index, self._leave)))

    def close(self) -> None:
        """Ends the streaming; the slots are let go of."""
        for handle in self._handles:
            handle.remove()
        for tensor, home in self._homes:
            tensor.data = home
        self._handles, self._homes, self._hosts, self._slots = [], [], [], []

    def _move_out(self, tensors: list[Tensor], slot: Tensor) -> Tensor:
        """The tensors' values as the slot is to have them, in main memory; the tensors become views of the slot."""
        host = torch.empty(sum(map(room, tensors)), dtype=torch.uint8, pin_memory=self._side is not None)
        at = 0
        for tensor in tensors:
            view(host, at, tensor).copy_(tensor.data)
            tensor.data = view(slot, at, tensor)
            at += room(tensor)
        return host

    def _at(self, index: int, act: Callable[[int], None]) -> Callable:
        return lambda *_: act(index)

    def _begin(self, *_) -> None:
        for index in range(min(SLOTS, len(self._hosts))):
            self._fetch(index)

    def _arrive(self, index: int) -> None:
        if (ready := self._ready[index]) is not None:
            torch.cuda.current_stream().wait_event(ready)

    def _leave(self, index: int) -> None:
        if index + SLOTS < len(self._hosts):
            self._fetch(index + SLOTS)

    def _end(self, *_) -> None:
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)  # a graph's capture wants every branch to join again

    def _fetch(self, index: int) -> None:
        """Starts the copy of a block into its slot, behind all that was asked of the GPU so far."""
        host = self._hosts[index]
        place = self._slots[index % SLOTS][: len(host)]
        if self._side is None:
            place.copy_(host)
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            place.copy_(host, non_blocking=True)
            self._ready[index] = self._side.record_event()


def _of_a_step(block: nn.Module) -> list[Tensor]:
    """The large tensors that the forward pass alone reads."""
    other = block.prepared() if isinstance(block, FusedTransformer) else []
    kept = {id(tensor) for module in other for tensor in (*module.parameters(), *module.buffers())}
    tensors = (*block.parameters(), *block.buffers())
    return [tensor for tensor in tensors if id(tensor) not in kept and tensor.nbytes >= LEAST]
