"""50 steps in float16 against float32, with trained weights: `python -m bench.precision --data PACK [--record]`.

The embedded model turns four models of the reconstruction pack in 50 guided steps: in float32, in float16 by the fused
network, and in float16 by the plain network without any kernel of ours beneath it, the rounding that any eager float16
run has. Every step's result feeds the next, so errors add up as they do for a user.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from sv3d_fast import engine
from sv3d_fast.mini.config import WEIGHTS
from sv3d_fast.mini.evaluate import PSNR_CEILING, generate
from sv3d_fast.model.weights import load_model
from sv3d_fast.prediction import PlainPrediction
from sv3d_fast.scene.metrics import psnr

from .engine import ISSUE
from .ground_truth import read_models
from .reconstruction import ORBIT, PACK
from .results import record

MODELS = ("crate", "chair2", "bread", "couch2")
STEPS, SIGMA_MIN, GUIDANCE = 50, 0.002, 2.5


def worst(frames: torch.Tensor, reference: torch.Tensor) -> float:
    """The least PSNR of a generated frame, dB; the input view, the last of each orbit, is left out."""
    pairs = zip(frames[:, :-1].flatten(0, 1), reference[:, :-1].flatten(0, 1), strict=True)
    return min(min(psnr(a.float() / 255, b.float() / 255), PSNR_CEILING) for a, b in pairs)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__)
    parser.add_argument("--data", type=Path, default=PACK)
    parser.add_argument("--record", action="store_true", help="write the bars to results")
    args = parser.parse_args()
    device = torch.device("cuda")
    exact, half = (load_model(WEIGHTS, device=device, dtype=t) for t in (torch.float32, torch.float16))
    exact.vae.float(), half.vae.float()  # the decoder is the same: what differs is the denoising
    sampler = replace(exact.config.sampler, steps=STEPS, sigma_min=SIGMA_MIN, max_guidance=GUIDANCE)
    side = exact.config.image_size
    pictures = torch.stack([m.orbit(ORBIT, side).frames[-1].cpu() for m in read_models(args.data, MODELS, device)])
    orbits = [ORBIT] * len(pictures)
    expected = generate(exact, pictures, orbits, sampler, 0)
    fused = worst(generate(half, pictures, orbits, sampler, 0), expected)
    with patch.object(engine, "prediction", PlainPrediction):
        plain = worst(generate(half, pictures, orbits, sampler, 0), expected)
    print(f"worst frame of {len(pictures)} orbits: fused {fused:.2f} dB, plain float16 {plain:.2f} dB")
    if args.record:
        record(ISSUE, "50 steps, embedded model, float16 against float32, worst frame", fused, "dB", ">= 40")
        record(ISSUE, "the same, over plain float16 eager", fused - plain, "dB", ">= -0.5")


if __name__ == "__main__":
    main()
