"""What a fresh process does until its first denoising step is done, with the imports of `sv3d-fast orbit` and no more.

`bench.memory` writes the checkpoint and times `python -m bench.start FOLDER`.
"""

import os
import sys

import torch

from sv3d_fast.camera import Orbit
from sv3d_fast.generation import generating
from sv3d_fast.orbit_stage import load_model

DTYPES = {"unet": torch.float16, "vae": torch.float32, "image_encoder": torch.float16}
STARTED = "first step done"


def start(folder: str) -> None:
    """Loads by the ordinary loader, and makes one step of an orbit. Needs a GPU."""
    model = load_model(folder, dtype=DTYPES, device="cuda")
    side = model.config.image_size
    picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    next(generating(model, picture, [Orbit.static(10.0, model.config.frames)], model.config.sampler, [0]))
    torch.cuda.synchronize()
    print(STARTED, flush=True)
    os._exit(0)


if __name__ == "__main__":
    start(sys.argv[1])
