"""Deterministic tensors for the golden cases: any tool can rebuild the same weights from names and shapes alone.

A tensor is drawn from numpy's PCG64 seeded with crc32("<seed>:<name>"), as float32 standard normals, then scaled:
  - names ending in `mix_factor`                        : as drawn
  - 1-D tensors whose name holds `norm` or that are the scale of a normalisation (given as kind "scale"): 1 + 0.1 * draw
  - every other 1-D tensor (biases)                     : 0.05 * draw
  - tensors of two or more dimensions (weights)         : draw / sqrt(product of all dimensions but the first)
  - weights that feed a chain of SiLU layers ("wide")   : 1.7 times that, so that the signal survives the chain
The kinds are written next to the shapes in each case's JSON, so no name has to be parsed.
"""

import json
import zlib

import numpy as np


def draw(name: str, shape, seed: int) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"{seed}:{name}".encode())))
    return rng.standard_normal(tuple(shape), dtype=np.float32)


def fill(name: str, shape, kind: str, seed: int) -> np.ndarray:
    """One weight tensor, float32. `kind` is 'as_drawn', 'scale', 'bias', 'weight' or 'wide'."""
    t = draw(name, shape, seed)
    if kind == "as_drawn":
        return t
    if kind == "scale":
        return 1 + np.float32(0.1) * t
    if kind == "bias":
        return np.float32(0.05) * t
    if kind == "weight":
        return t / np.float32(np.sqrt(np.prod(shape[1:])))
    if kind == "wide":
        return np.float32(1.7) * t / np.float32(np.sqrt(np.prod(shape[1:])))
    raise ValueError(kind)


def state_dict(case: str) -> dict[str, np.ndarray]:
    """All weights of a case: `case` is the path of its JSON file."""
    with open(case) as f:
        spec = json.load(f)
    return {n: fill(n, s, k, spec["seed"]) for n, (s, k) in spec["tensors"].items()}
