"""Trains the embedded model: `torchrun --nproc-per-node gpu -m sv3d_fast.mini.train --data objects.pack --output out`.

Without torchrun it runs in one process. Two stages, the VAE and then the UNet with the image tower, leave in `out`:

    vae/       the VAE
    raw/       UNet and image tower as the last step left them, in bfloat16: to go on from
    weights/   the finished model: averaged weights in float16, as `load_model` reads them and the package ships them
    *.csv      step, seconds, learning rate and figures of each stage; the scores of every held-out object
    *.jpg      held-out objects, truth above and generated below

A later run with the same folder goes on from vae/ and raw/; only the optimiser's moments and the average start anew.
--weights fills both from a finished model, such as the one that ships: sv3d_fast/mini/weights.
The UNet was trained on the VAE's latents, so --minutes-vae then trains the decoder alone. To train for a few hours in
pieces, give all but the last piece --no-cooldown. `--minutes-unet 0` only scores weights/. Where files must be small
on their way from one machine to the next, --shard-size cuts all weights into numbered parts; every reader takes
either form.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sv3d_fast.camera import Orbit
from sv3d_fast.files import atomic_file, atomic_folder
from sv3d_fast.model.checkpoint import Part, TensorStore, check, write_tensors
from sv3d_fast.model.clip import CLIPImageTower
from sv3d_fast.model.unet import SV3DUNet
from sv3d_fast.model.vae import SV3DVAE
from sv3d_fast.model.weights import SV3DModel, load_model, save_model

from .autoencoder import normalise_latents, train_autoencoder
from .config import MINI
from .denoiser import CHUNK, PEAK_RATE, PEAK_RATE_ON, Denoiser, initialise, train_denoiser
from .evaluate import ELEVATION, contact_sheet, evaluate, means, reconstruction_psnr, write_scores
from .pack import load_objects
from .parallel import Workers, start_workers
from .scenes import Stage

VAE_MINUTES = 4.0
NORMALISED_ON = 64  # random orbits whose latents get mean 0, variance 1
SHEET_ROWS = 10


def _store(module: torch.nn.Module, folder: Path, dtype: torch.dtype, shard_size: str) -> None:
    with atomic_folder(folder) as partial:
        write_tensors(copy.deepcopy(module).to("cpu", dtype), partial, "model", shard_size)


def _fetch(module: torch.nn.Module, folder: Path) -> None:
    """Fills a module from what `_store` wrote. Raises CheckpointError for files that aren't whole or don't fit."""
    store = TensorStore(sorted(folder.glob("*.safetensors")))
    check(folder, [Part(folder.name, module, store, {})], lambda name: False)
    module.load_state_dict({name: store.get(name).float() for name in store.shapes})


def begin_from(weights: Path, output: Path, shard_size: str) -> None:
    """Makes vae/ and raw/ in `output` from a finished model."""
    model = load_model(weights)
    _store(model.vae, output / "vae", torch.float16, shard_size)
    _store(Denoiser(model.unet, model.image_encoder), output / "raw", torch.bfloat16, shard_size)


def autoencoder(args: argparse.Namespace, workers: Workers, train: Stage, held_out: Stage) -> SV3DVAE:
    """Trains the VAE, or loads the one that is there; its latents are normalised."""
    torch.manual_seed(0)
    vae = SV3DVAE(MINI.vae).to(workers.device)
    folder = args.output / "vae"
    if folder.exists():
        _fetch(vae, folder)
    if args.minutes_vae > 0:
        workers.same(vae)
        decoder_only = (args.output / "raw").exists()
        vae = train_autoencoder(
            vae, train, workers, minutes=args.minutes_vae, batch=args.batch_vae, log=args.output / "vae.csv",
            seed=args.seed, decoder_only=decoder_only,
        )  # fmt: skip
        if not decoder_only:
            normalise_latents(vae, train.random(NORMALISED_ON, np.random.default_rng(args.seed)))
        workers.same(vae)
        if workers.first:
            views = held_out.standard(range(len(held_out.objects)), Orbit.static(ELEVATION))
            print("vae: held-out psnr", round(reconstruction_psnr(vae, views), 2), flush=True)
            _store(vae, folder, torch.float16, args.shard_size)
    return vae.eval().requires_grad_(False)


def denoiser(args: argparse.Namespace, workers: Workers, vae: SV3DVAE, train: Stage) -> None:
    """Trains UNet and image tower, from the weights that are there if any; writes raw/ and weights/."""
    torch.manual_seed(0)
    network = Denoiser(SV3DUNet(MINI.unet), CLIPImageTower(MINI.clip)).to(workers.device)
    initialise(network.unet)
    raw, peak = args.output / "raw", PEAK_RATE
    if raw.exists():
        _fetch(network, raw)
        peak = PEAK_RATE_ON
    workers.same(network)

    def save(averaged: Denoiser) -> None:
        if not workers.first:
            return
        _store(network, raw, torch.bfloat16, args.shard_size)
        unet, decoder, tower = copy.deepcopy((averaged.unet, vae, averaged.tower))
        model = SV3DModel(MINI, unet.half().cpu(), decoder.half().cpu(), tower.half().cpu())
        save_model(model, args.output / "weights", max_shard_size=args.shard_size)

    averaged = train_denoiser(
        network, vae, train, workers, minutes=args.minutes_unet, peak=peak, batch=args.batch, capacity=args.capacity,
        log=args.output / "unet.csv", seed=args.seed, cooldown=not args.no_cooldown, save=save,
    )  # fmt: skip
    save(averaged)


def judge(args: argparse.Namespace, model: SV3DModel, held_out: Stage) -> None:
    """Scores the held-out objects with each step count and guidance scale asked for; writes scores and pictures."""
    for steps, guidance in args.evaluate:
        config = replace(model.config.sampler, steps=steps, max_guidance=guidance)
        scores, rows = [], []
        for score, views, made in evaluate(model, held_out, config):
            scores.append(score)
            rows.append((f"{score.name} {score.psnr:.1f} dB", views.frames[0], made))
        figures = {"steps": steps, "guidance": guidance, **{k: round(v, 4) for k, v in means(scores).items()}}
        print(json.dumps(figures), flush=True)
        tag = f"{steps}_{guidance:g}"
        write_scores(scores, args.output / f"scores_{tag}.csv")
        with atomic_file(args.output / f"sheet_{tag}.jpg") as partial:
            contact_sheet(rows[:: max(1, len(rows) // SHEET_ROWS)][:SHEET_ROWS]).save(partial, quality=88)


def _evaluation(text: str) -> tuple[int, float]:
    steps, _, guidance = text.partition(":")
    try:
        asked = int(steps), float(guidance)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected STEPS:GUIDANCE, such as 4:1.0, got {text!r}") from None
    if asked[0] < 1 or not asked[1] >= 1:
        raise argparse.ArgumentTypeError(f"expected at least one step and a guidance of at least 1, got {text!r}")
    return asked


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked before anything is read or computed; leaves with a message where it can't be run."""
    parser = argparse.ArgumentParser(
        prog="python -m sv3d_fast.mini.train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="pack written by sv3d_fast.mini.data")
    parser.add_argument("--output", type=Path, required=True, help="folder of weights, logs and pictures")
    parser.add_argument(
        "--weights", type=Path, help="finished weights to go on from, in a folder without vae/ and raw/"
    )
    parser.add_argument("--minutes-vae", type=float, help=f"{VAE_MINUTES:g} without a VAE in the folder, else 0")
    parser.add_argument("--minutes-unet", type=float, default=20, help="0: only evaluate the weights in the folder")
    parser.add_argument("--batch-vae", type=int, default=32, help="pictures a step and process")
    parser.add_argument("--batch", type=int, default=32, help="orbits a step and process")
    parser.add_argument("--capacity", type=int, default=8192, help=f"orbits cached, a multiple of {CHUNK}")
    parser.add_argument("--procedural", type=int, default=1600, help="generated objects of each process")
    parser.add_argument("--seed", type=int, help="of the training data; the clock without it")
    parser.add_argument("--no-cooldown", action="store_true", help="training will go on from these weights")
    parser.add_argument("--shard-size", default="5GB", help="largest weight file, such as 10MB")
    parser.add_argument(
        "--evaluate", nargs="*", default=[(MINI.sampler.steps, MINI.sampler.max_guidance)], metavar="STEPS:GUIDANCE",
        type=_evaluation, help="score held-out objects so, as the model is configured by default; no value: don't",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    has_vae = (args.output / "vae").exists() or args.weights is not None
    if args.minutes_vae is None:
        args.minutes_vae = 0.0 if has_vae else VAE_MINUTES
    for name in ("minutes_vae", "minutes_unet"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')}: expected minutes, 0 or more, got {getattr(args, name)}")
    for name in ("batch_vae", "batch", "capacity"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if args.capacity % CHUNK:
        parser.error(f"--capacity: expected a multiple of {CHUNK}, got {args.capacity}")
    if not args.data.is_file():
        parser.error(
            f"--data: no such file: {args.data}; `python -m sv3d_fast.mini.data --output {args.data}` makes it"
        )
    if args.weights is not None and not args.weights.is_dir():
        parser.error(f"--weights: no such folder: {args.weights}")
    if args.weights is not None and any((args.output / name).exists() for name in ("vae", "raw")):
        parser.error(f"--weights: expected a folder without vae/ and raw/, got {args.output}")
    if args.minutes_vae > 0 and (args.output / "raw").exists() and not has_vae:
        parser.error(f"--minutes-vae: expected 0, since the vae that {args.output / 'raw'} was trained on is not there")
    if args.minutes_vae == 0 and args.minutes_unet > 0 and not has_vae:
        parser.error(f"--minutes-vae: expected more than 0, since there is no {args.output / 'vae'} yet")
    if args.minutes_vae == args.minutes_unet == 0 and not (args.output / "weights").exists():
        parser.error(f"--minutes-unet: expected more than 0, since there is no {args.output / 'weights'} to evaluate")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    args = read_arguments(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    workers = start_workers()
    args.seed = int(workers.agree(time.time())) if args.seed is None else args.seed
    # each process has generated objects and paints of its own, beside the modelled objects that all share
    objects = load_objects(args.data, split="train", procedural=args.procedural, seed=workers.rank)
    train = Stage(objects, MINI.image_size, workers.device)
    held_out = Stage(load_objects(args.data, split="held_out"), MINI.image_size, workers.device)
    if workers.first:
        print(f"{len(train.objects)} training objects, {len(held_out.objects)} held out", flush=True)
    if args.weights is not None:
        if workers.first:
            begin_from(args.weights, args.output, args.shard_size)
        workers.agree(0.0)  # the files are there
    if args.minutes_vae > 0 or args.minutes_unet > 0:
        vae = autoencoder(args, workers, train, held_out)
    if args.minutes_unet > 0:
        denoiser(args, workers, vae, train)
    weights = args.output / "weights"
    if workers.first and args.evaluate and weights.exists():
        judge(args, load_model(weights, device=workers.device), held_out)
    if workers.count > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
