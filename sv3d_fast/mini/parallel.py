"""One process per GPU under torchrun, or a single process without it."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Workers:
    """The processes of a training run; `device` is this one's."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replaces each tensor by its mean over the processes; one message for all of them."""
        if self.count == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        start = 0
        for t in tensors:
            t.copy_(flat[start : start + t.numel()].view_as(t))
            start += t.numel()

    def same(self, module: torch.nn.Module) -> None:
        """Gives every process the weights of the first."""
        if self.count > 1:
            for tensor in (*module.parameters(), *module.buffers()):  # a state dict can hold copies
                dist.broadcast(tensor.data, 0)

    def agree(self, value: float) -> float:
        """The first process's value, for all: what depends on a clock."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return shared.item()


def start_workers() -> Workers:
    """Joins the group that torchrun describes; the CPU without a GPU."""
    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if count > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Workers(rank, count, device)
