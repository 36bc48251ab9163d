"""What an orbit needs of a GPU's memory, told before anything is allocated, and the plan that fits a budget.

Sizes come from a dry run of the very code that will run (`dry_run`), through the rules of PyTorch's allocator
(`allocator`): all that it reserves counts. The driver's own context, about half a GiB, does not: nobody can plan it.
docs/memory.md says how the pieces add up.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .allocator import Allocator, arena_for
from .dry_run import Change, DryRun
from .engine import to_bytes
from .model.clip import CLIPImageTower
from .model.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from .model.fused_unet import FusedUNet
from .model.fused_vae import FusedDecoder
from .model.unet import SV3DUNet
from .model.vae import SV3DVAE
from .offload import room, tensors_of
from .sizes import gibibytes
from .streaming import SLOTS, slot_size, streamable

RESIDENT, VISITING, STREAMED = "resident", "visiting", "streamed"
PLACEMENTS = {
    RESIDENT: "all networks stay on the GPU",
    VISITING: "the image tower and the autoencoder come to the GPU for their stage",
    STREAMED: "so do they, and the UNet's widest blocks come in every step",
}
LIBRARIES = 96 * 2**20  # workspaces that cuBLAS and cuDNN keep
STAGES = CONDITIONING, DENOISING, DECODING = "conditioning", "denoising", "decoding"


@dataclass(frozen=True)
class Shape:
    """What an orbit's memory depends on.

    side: of a frame, pixels. batch: orbits denoised at once. steps: of the sampler. halves: of guidance, 2 or 1.
    unet, vae, tower: precision of each network.
    """

    side: int
    frames: int
    batch: int = 1
    steps: int = 50
    halves: int = 2
    unet: torch.dtype = torch.float16
    vae: torch.dtype = torch.float32
    tower: torch.dtype = torch.float16


@dataclass(frozen=True)
class Plan:
    """How an orbit is made, and what it will take.

    placement: a name of PLACEMENTS. keeps_graph: whether the captured step and its memory stay for the next orbit.
    decode_chunk: frames decoded at once. arenas: bytes, by stage, of the one piece that its activations are cut from.
    peaks: bytes that the stage will have reserved at most.
    """

    placement: str
    keeps_graph: bool
    decode_chunk: int
    arenas: dict[str, int]
    peaks: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes that the whole will have reserved at most."""
        return max(self.peaks.values())

    @property
    def name(self) -> str:
        """For people."""
        kept = ", graph kept" if self.keeps_graph else ""
        return f"{self.placement}, {self.decode_chunk} decoded at once{kept}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "placement": self.placement, "keeps_graph": self.keeps_graph, "decode_chunk": self.decode_chunk,
            "peak_bytes": dict(self.peaks),
        }  # fmt: skip


class BudgetError(ValueError):
    """A budget that no plan fits; the message names the smallest that would do."""


def plan(config: ModelConfig, shape: Shape, budget: int | None, decode_chunk: int) -> Plan:
    """The fastest plan within `budget` bytes; without a budget, everything stays and `decode_chunk` frames are decoded
    at once, else at most so many.

    Raises BudgetError, naming the least budget that works.
    """
    least = None
    for candidate in candidates(config, shape, decode_chunk):
        if budget is None or candidate.peak <= budget:
            return candidate
        if least is None or candidate.peak < least.peak:
            least = candidate
    assert least is not None
    raise BudgetError(
        f"max_memory: {gibibytes(budget or 0)} is too little for {shape.frames} frames of {shape.side} pixels; "
        f"the least that works is {gibibytes(least.peak)}"
    )


def candidates(config: ModelConfig, shape: Shape, decode_chunk: int) -> Iterator[Plan]:
    """Every plan, the fastest first."""
    for placement, keeps_graph in ((RESIDENT, True), (RESIDENT, False), (VISITING, False), (STREAMED, False)):
        chunk = min(decode_chunk, shape.batch * shape.frames)
        while True:
            yield _plan(config, shape, placement, keeps_graph, chunk)
            if chunk == 1:
                break
            chunk //= 2


def next_smaller(config: ModelConfig, shape: Shape, than: Plan, budget: int) -> Plan | None:
    """After `than` has run out of memory: the fastest of the plans that come after it and fit `budget`, if any does."""
    later = iter(candidates(config, shape, than.decode_chunk))
    for candidate in later:
        if (candidate.placement, candidate.keeps_graph) == (than.placement, than.keeps_graph):
            break
    return next((c for c in later if c.peak < min(than.peak, budget + 1)), None)


def _plan(config: ModelConfig, shape: Shape, placement: str, keeps_graph: bool, chunk: int) -> Plan:
    step = _step(config.unet, shape, shape.side // config.vae.factor)
    tower = _weights(CLIPImageTower, config.clip, shape.tower)
    vae = _weights(SV3DVAE, config.vae, shape.vae)
    encoding = _encoding(config.vae, shape.vae, shape.side, shape.batch)
    decoding = _decoding(config.vae, shape.vae, shape.side, chunk)
    network = step.streamed if placement == STREAMED else step.network
    rest = network + LIBRARIES + (tower + vae if placement == RESIDENT else 0)
    kept = step.scratch.reserved + step.kept if keeps_graph else 0
    visits = [0, 0] if placement == RESIDENT else [vae, tower]
    peaks = {
        CONDITIONING: rest + kept + max(visits[0] + encoding.reserved, visits[1]),
        DENOISING: rest + step.run + step.scratch.reserved,
        DECODING: rest + kept + visits[0] + decoding.reserved,
    }
    arenas = {CONDITIONING: encoding.arena, DENOISING: step.scratch.arena, DECODING: decoding.arena}
    return Plan(placement, keeps_graph, chunk, arenas, peaks)


@dataclass(frozen=True)
class _Scratch:
    """Activations: the arena that holds all large ones, and what is reserved with the small ones."""

    arena: int
    reserved: int

    @classmethod
    def of(cls, changes: list[Change]) -> "_Scratch":
        arena = arena_for(changes)
        return cls(arena, Allocator(arena).run(changes))


@dataclass(frozen=True)
class _Step:
    """Of the fused UNet, bytes: all of it; all but the streamed blocks, with their slots; what a run has at most beside
    its steps, and what of it a graph keeps; a step's activations."""

    network: int
    streamed: int
    run: int
    kept: int
    scratch: _Scratch


@functools.cache
def _step(config: UNetConfig, shape: Shape, side: int) -> _Step:
    with torch.device("meta"):
        unet = SV3DUNet(config).to(shape.unet).requires_grad_(False)
        network = FusedUNet(unet)
        halves = shape.halves * shape.batch
        inputs = (
            torch.empty(halves, 1, config.context_dim),
            torch.empty(halves, shape.frames, config.vector_dim),
            torch.empty(halves, config.in_channels - config.out_channels, side, side),
        )
        noisy = torch.empty(shape.batch, shape.frames, side, side, config.out_channels, dtype=shape.unet)
    weights = sum(map(room, tensors_of(network, unet.conv_in)))
    blocks = streamable(network)
    streamed = sum(room(tensor) for _, tensors in blocks for tensor in tensors)
    dry = DryRun()
    with dry.recording():
        run = network.prepare([0.0] * shape.steps, *inputs)
        own = [run.rows[0].clone(), *(constant.clone() for constant in run.constants())]  # the graph's
        prepared, before = Allocator().run(dry.changes), len(dry.changes)
        network(noisy, own[0], run)
        changes = dry.changes[before:]
    made = {number for number, size in changes if size}
    scratch = _Scratch.of([change for change in changes if change[0] in made])
    slots = SLOTS * slot_size(blocks)
    return _Step(weights, weights - streamed + slots, prepared, sum(map(room, own)), scratch)


@functools.cache
def _weights(kind: Callable[[Any], nn.Module], config: CLIPConfig | VAEConfig, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        return sum(map(room, tensors_of(kind(config).to(dtype))))


@functools.cache
def _encoding(config: VAEConfig, dtype: torch.dtype, side: int, batch: int) -> _Scratch:
    with torch.device("meta"):
        vae = SV3DVAE(config).to(dtype).requires_grad_(False)
        return _activations(vae.encode, torch.empty(batch, 3, side, side, dtype=dtype))


@functools.cache
def _decoding(config: VAEConfig, dtype: torch.dtype, side: int, chunk: int) -> _Scratch:
    with torch.device("meta"):
        vae = SV3DVAE(config).to(dtype).requires_grad_(False)
        latents = torch.empty(chunk, config.latent_channels, *[side // config.factor] * 2, dtype=dtype)
        decode = vae.decode if dtype.itemsize > 2 else FusedDecoder(vae)
        return _activations(lambda z: to_bytes(decode(z)), latents)


def _activations(network: Callable[[Tensor], object], given: Tensor) -> _Scratch:
    dry = DryRun()
    with dry.recording():
        result = network(given)
        del result
    return _Scratch.of(dry.changes)


def table(config: ModelConfig, shape: Shape, budget: int | None) -> str:
    """The plans for an orbit, one line each, by stage in GiB; with a budget, which of them it gets."""
    chosen = None if budget is None else plan(config, shape, budget, shape.frames)
    rows = [f"{'plan':<40}" + "".join(f"{stage:>14}" for stage in STAGES) + f"{'peak, GiB':>14}"]
    for candidate in candidates(config, shape, 1) if chosen is None else [chosen]:
        figures = [*(candidate.peaks[stage] for stage in STAGES), candidate.peak]
        rows.append(f"{candidate.name:<40}" + "".join(f"{figure / 2**30:>14.2f}" for figure in figures))
    rows += ["", *(f"{name:<12}{meaning}" for name, meaning in PLACEMENTS.items())]
    return "\n".join(rows)
