"""One orbit on one GPU and on two that share each step: `python -m bench.cfg_parallel`.

SV3D's shapes, random weights. Checks first that both give the same latents up to rounding, and two GPUs the same bits
twice. A latency is that of the whole orbit, from the picture to frames in main memory: conditioning, 50 guided steps,
decoding. Needs two GPUs.
"""

import argparse
import itertools
import statistics
import time

import torch

from sv3d_fast.camera import Orbit
from sv3d_fast.cfg_parallel import Twin, twin_of
from sv3d_fast.conditioning import condition
from sv3d_fast.devices import second_device
from sv3d_fast.engine import denoising
from sv3d_fast.events import finish
from sv3d_fast.generation import draw, generating
from sv3d_fast.model.config import SamplerConfig
from sv3d_fast.model.weights import SV3DModel

from .engine import error
from .random_sv3d import random_sv3d
from .results import record

ISSUE = "production"
SEED, CHUNK = 0, 7
ROUNDING = 1e-2  # of three float16 steps, whose products sum in other orders; one step differs from float32 by 2e-3


def picture(size: int) -> torch.Tensor:
    """(1, 3, size, size) in [-1, 1]: a ball before white."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    ball = (x * x + y * y < 0.4).float()
    return (1 - ball * torch.stack([x * 0.5 + 0.5, y * 0.5 + 0.5, torch.full_like(x, 0.7)]))[None] * 2 - 1


def check(model: SV3DModel, twin: Twin) -> None:
    """Raises SystemExit where two devices disagree with one, or with themselves."""
    config, sampling = model.config, SamplerConfig(steps=3)
    side = config.image_size // config.vae.factor
    shape = (config.frames, config.vae.latent_channels, side, side)
    image_noise, noise = draw(SEED, (3, config.image_size, config.image_size), shape)
    orbit, image = Orbit.static(10.0, config.frames), picture(config.image_size)
    given = condition(model, image, [orbit], image_noise[None], sampling.cond_aug)
    alone = finish(denoising(model.unet, given, noise[None], sampling))
    first, second = (finish(denoising(model.unet, given, noise[None], sampling, twin=twin.unet)) for _ in range(2))
    found = error(first, alone)
    print(
        f"three steps on two devices against one: relative error {found:.2e}, bits twice {torch.equal(first, second)}"
    )
    if not found <= ROUNDING or not torch.equal(first, second):
        raise SystemExit("two devices do not make the orbit of one")


def orbit_seconds(model: SV3DModel, twin: Twin | None, steps: int) -> tuple[float, float, float]:
    """Seconds of a whole orbit, the median of a step's milliseconds, and seconds from the last step to the end."""
    config = SamplerConfig(steps=steps)
    image, orbit = picture(model.config.image_size), Orbit.static(10.0, model.config.frames)
    times = [time.perf_counter()]
    for _ in generating(model, image, [orbit], config, [SEED], chunk=CHUNK, twin=twin):
        times.append(time.perf_counter())
    end = time.perf_counter()
    between = [b - a for a, b in itertools.pairwise(times[2:steps])]
    return end - times[0], 1e3 * statistics.median(between), end - times[steps]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cfg_parallel", description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args().steps
    first = torch.device("cuda", 0)
    second = second_device(first)
    peers = torch.cuda.can_device_access_peer(first.index, second.index)
    print(torch.cuda.get_device_name(), torch.__version__, "peer copies" if peers else "copies through the host")
    began = time.perf_counter()
    model = random_sv3d(first)
    twin = twin_of(model, second)
    check(model, twin)
    torch.cuda.synchronize()
    print(f"set up and checked in {time.perf_counter() - began:.1f} s")
    times = {}
    for name, beside in (("one GPU", None), ("two GPUs", twin)):
        orbit_seconds(model, beside, 5)  # captures
        times[name] = orbit_seconds(model, beside, steps)
    one, two = times["one GPU"], times["two GPUs"]
    times["ratio"] = (two[0] / one[0], two[1] / one[1], two[2] / one[2])
    print(f"{'':<9}{'orbit, s':>12}{'step, ms':>12}{'the rest, s':>13}")
    for name, (whole, step, rest) in times.items():
        print(f"{name:<9}{whole:>12.3f}{step:>12.3f}{rest:>13.3f}")
    record(ISSUE, "CFG over 2 GPUs, latency of one orbit, of one GPU", two[0] / one[0], "", "<= 0.56")


if __name__ == "__main__":
    main()
