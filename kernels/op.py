"""The record that describes one op, and the registry of all of them.

A record holds what an op's tests, benches and `sv3d-fast info` need: the reference, the implementations in order
of preference, the reasons why one can't run here, example inputs and the tolerance. An explicit choice of
implementation works or raises; the automatic choice takes the first that can run, and `choose` tells which.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

BACKEND_VARIABLE = "SV3D_FAST_BACKEND"  # "op=implementation,op=implementation": forces a choice, or raises


class UnsupportedError(ValueError):
    """No implementation, or not the one that was asked for, can run on these inputs."""


def _always(*args, **kwargs) -> list[str]:
    return []


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. `why_not(*inputs)` lists the reasons it can't run on them; empty if it can."""

    name: str
    run: Callable
    why_not: Callable[..., list[str]] = _always


@dataclass(frozen=True)
class Op:
    """An op: `reference` in plain torch defines it; `implementations` run it, the best first.

    `examples(device)` yields argument tuples on that device, among them an odd shape and a size-1 shape.
    `tolerance` is the largest relative L2 error against the reference in float32.
    """

    name: str
    reference: Callable
    implementations: Sequence[Implementation]
    examples: Callable[[str], Iterable[tuple]]
    tolerance: float = 1e-5
    source: str = ""
    _all: tuple = field(init=False, repr=False, default=())

    def __post_init__(self):
        object.__setattr__(self, "_all", (*self.implementations, Implementation("reference", self.reference)))
        if self.name in registry:
            raise ValueError(f"an op named {self.name!r} exists already")
        registry[self.name] = self

    def choose(self, *args, implementation: str | None = None, **kwargs) -> Implementation:
        """The implementation that a call with these inputs would run.

        Raises UnsupportedError, with every reason, if `implementation` (or the environment's choice) can't run.
        """
        wanted = implementation or _from_environment(self.name)
        reasons = []
        for candidate in self._all:
            if wanted not in (None, candidate.name):
                continue
            why = candidate.why_not(*args, **kwargs)
            if not why:
                return candidate
            reasons.append(f"{candidate.name}: {'; '.join(why)}")
        if not reasons:
            names = ", ".join(i.name for i in self._all)
            raise UnsupportedError(f"{self.name} has no implementation named {wanted!r}; it has {names}")
        raise UnsupportedError(f"{self.name} can't run: " + " | ".join(reasons))

    def __call__(self, *args, implementation: str | None = None, **kwargs):
        # a compiler can't read context variables, and compiles what runs
        if not torch.compiler.is_compiling() and (stand_in := _stand_in.get()) is not None:
            return stand_in(self, args, kwargs)
        return self.choose(*args, implementation=implementation, **kwargs).run(*args, **kwargs)


registry: dict[str, Op] = {}
_stand_in: ContextVar[Callable[[Op, tuple, dict[str, Any]], Any] | None] = ContextVar("stand_in", default=None)


@contextmanager
def in_place_of_ops(stand_in: Callable[[Op, tuple, dict[str, Any]], Any]) -> Iterator[None]:
    """Inside, every call of an op is `stand_in(op, args, kwargs)`: for runs that only ask what would happen."""
    token = _stand_in.set(stand_in)
    try:
        yield
    finally:
        _stand_in.reset(token)


def _from_environment(name: str) -> str | None:
    for pair in os.environ.get(BACKEND_VARIABLE, "").split(","):
        op, _, implementation = pair.partition("=")
        if op.strip() == name:
            return implementation.strip()
    return None
