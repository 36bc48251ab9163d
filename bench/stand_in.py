"""The command line, its orbits replaced by given ones after they were made: python -m bench.stand_in FILE ARGUMENTS...

Random weights take the time of real ones but make noise, of which there is nothing to reconstruct. FILE holds a list of
frames (T, S, S, 3) uint8, which torch wrote; the seed says which of them a picture gets in place of its orbit.
"""

import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

from sv3d_fast import planned
from sv3d_fast.cli import main
from sv3d_fast.events import Progress


def replacing(generating: Callable[..., Any], frames: list[torch.Tensor]) -> Callable[..., Any]:
    """`generating` as it is, but for what it returns."""

    def replaced(model, images, orbits, config, seeds, **options) -> Generator[Progress, None, torch.Tensor]:
        made = yield from generating(model, images, orbits, config, seeds, **options)
        given = torch.stack([frames[seed] for seed in seeds])
        if given.shape != made.shape:
            raise ValueError(f"expected frames {tuple(made.shape)}, got {tuple(given.shape)}")
        return given

    return replaced


if __name__ == "__main__":
    planned.generating = replacing(planned.generating, torch.load(Path(sys.argv[1])))
    sys.exit(main(sys.argv[2:]))
