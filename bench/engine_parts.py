"""Where a guided step's time goes: by op and shape, and by what each part of the engine gives."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.overrides import TorchFunctionMode

from sv3d_fast.ceilings import Ceilings
from sv3d_fast.kernels.op import BACKEND_VARIABLE, Op

LIBRARY = ("conv2d",)  # what the network calls besides ops
NORMS = ("group_norm", "residual_group_norm", "layer_norm", "positioned_layer_norm", "blended_layer_norm")
PRODUCTS = ("linear", "geglu", "temporal_conv")
STOCK = dict.fromkeys((*NORMS, *PRODUCTS, "upsample_conv"), "reference") | {
    "temporal_attention": "sdpa", "spatial_attention": "library",
}  # fmt: skip
PARTS = (  # in the order in which they are switched on
    ("own norms", NORMS),
    ("own temporal attention", ("temporal_attention",)),
    ("own spatial attention", ("spatial_attention",)),
    ("upsampling within its convolution", ("upsample_conv",)),
    ("own matrix products", PRODUCTS),
)


@dataclass
class Call:
    """What a step calls `count` times with operands of these shapes: `run` repeats it."""

    name: str
    how: str
    shapes: str
    run: Callable[[], object]
    flops: float
    bytes: int
    count: int = 0


class _Recording(TorchFunctionMode):
    """Collects the calls of ops and library functions; one that an op makes is part of the op's."""

    def __init__(self):
        super().__init__()
        self.calls: dict[tuple, Call] = {}
        self.inside = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not self.inside and function.__name__ in LIBRARY:
            self.note(function.__name__, "library", lambda: function(*args, **kwargs), args, kwargs, result)
        return result

    def op(self, op: Op, *args, **kwargs):
        """In place of `Op.__call__`."""
        chosen = op.choose(*args, **kwargs)
        self.inside = True
        result = chosen.run(*args, **kwargs)
        self.inside = False
        self.note(op.name, chosen.name, lambda: chosen.run(*args, **kwargs), args, kwargs, result)
        return result

    def note(self, name: str, how: str, run: Callable[[], object], args: tuple, kwargs: dict, result: Any) -> None:
        given = [*args, *kwargs.values()]
        key = (name, how, *(tuple(a.shape) if isinstance(a, Tensor) else a for a in given if _tells(a)))
        if key not in self.calls:
            tensors = [a for a in given if isinstance(a, Tensor)]
            made = result if isinstance(result, tuple) else (result,)
            moved = sum(t.numel() * t.element_size() for t in (*tensors, *made))
            shapes = " ".join("x".join(map(str, t.shape)) for t in tensors[:2])
            self.calls[key] = Call(name, how, shapes, run, flops(name, tensors, made[0]), moved)
        self.calls[key].count += 1


def _tells(argument: Any) -> bool:
    return isinstance(argument, Tensor | int | bool) or argument is None


def flops(name: str, tensors: list[Tensor], made: Tensor) -> float:
    """Two for each product and its sum; 0 for what is limited by memory alone."""
    if name in ("linear", "geglu"):
        return 2 * tensors[0].numel() * len(tensors[1])
    if name == "temporal_conv":
        return 6 * tensors[0].numel() * len(tensors[1])
    if name == "upsample_conv":  # every weight meets every pixel once
        return 2 * tensors[1].numel() * tensors[0].numel() / tensors[0].shape[-1]
    if name == "conv2d":
        return 2 * made.numel() * tensors[1][0].numel()
    if name in ("spatial_attention", "temporal_attention"):
        return 4 * made.numel() * made.shape[1]
    return 0


def recorded(step: Callable[[], object]) -> list[Call]:
    """What an eager step calls; the operands of the first call of each kind stay alive."""
    recording = _Recording()
    with recording, patch.object(Op, "__call__", lambda op, *args, **kwargs: recording.op(op, *args, **kwargs)):
        step()
    return list(recording.calls.values())


def op_table(step: Callable[[], object], step_ms: float, timed: Callable[..., float], ceilings: Ceilings) -> str:
    """Of each call: milliseconds alone and in a step, rates, and the share of the nearer ceiling, copying or products.

    step: runs one step without a graph. timed: a call and a number of runs to milliseconds.
    """
    rows = [(call, timed(call.run, 5)) for call in recorded(step)]
    rows.sort(key=lambda row: -row[1] * row[0].count)
    head = f"{'op':<29}{'by':<11}{'operands':<40}{'calls':>6}{'ms':>8}{'in a step':>10}"
    lines = [head + f"{'TFLOPS':>8}{'GB/s':>7}{'share':>7}"]
    for call, ms in rows:
        seconds = ms / 1e3
        share = max(call.flops / seconds / ceilings.product, call.bytes / seconds / ceilings.copy)
        lines.append(
            f"{call.name:<29}{call.how:<11}{call.shapes[:39]:<40}{call.count:>6}{ms:>8.3f}{ms * call.count:>10.2f}"
            f"{call.flops / seconds / 1e12:>8.0f}{call.bytes / seconds / 1e9:>7.0f}{share:>7.0%}"
        )
    together = sum(ms * call.count for call, ms in rows)
    lines.append(f"together {together:.1f} ms of a step of {step_ms:.1f} ms; the rest is sums and copies")
    return "\n".join(lines)


def waterfall(plain_ms: float, step: Callable[[], object], graph_ms: float, timed: Callable[..., float]) -> str:
    """What each part of the engine gives, switched on in turn: the plain network, the fused one on stock ops, then our
    ops, then the CUDA graph. step: one step of the fused network without a graph."""
    stock = dict(STOCK)
    rows = [("plain network, eager", plain_ms)]

    def eager() -> float:
        chosen = ",".join(f"{op}={how}" for op, how in stock.items())
        with patch.dict(os.environ, {BACKEND_VARIABLE: chosen}):
            return timed(step, 3)

    rows.append(("exact algebra, channels last, stock ops", eager()))
    for name, ops in PARTS:
        for op in ops:
            del stock[op]
        rows.append((name, eager()))
    rows.append(("CUDA graph", graph_ms))
    lines = [f"{'switched on in turn':<42}{'ms':>8}{'gives':>8}"]
    for index, (name, ms) in enumerate(rows):
        gives = f"{rows[index - 1][1] - ms:>8.1f}" if index else ""
        lines.append(f"{name:<42}{ms:>8.1f}{gives}")
    return "\n".join(lines)
