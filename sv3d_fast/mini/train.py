"""Trains the embedded model: `torchrun --nproc-per-node gpu -m sv3d_fast.mini.train --data objects.pack --output out`.

Stages: the VAE, then the UNet with the image tower. Each writes safetensors into the output folder, and starts from
the ones it finds there; so training goes on from the weights that a shorter run brought back.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sv3d_fast.camera import Orbit
from sv3d_fast.model.clip import CLIPImageTower
from sv3d_fast.model.unet import SV3DUNet
from sv3d_fast.model.vae import SV3DVAE
from sv3d_fast.model.weights import SV3DModel

from .autoencoder import normalise_latents, reconstruction_psnr, train_autoencoder
from .config import MINI
from .pack import load_objects
from .denoiser import Denoiser, initialise, train_denoiser
from .evaluate import contact_sheet, evaluate, means, write_scores
from .optimise import Average
from .parallel import Workers, start_workers
from .scenes import Stage

SHEET_ROWS = 10


def _store(module: torch.nn.Module, path: Path, dtype: torch.dtype) -> None:
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in module.state_dict().items()}
    save_file(tensors, path)


def _fetch(module: torch.nn.Module, path: Path) -> bool:
    if path.exists():
        module.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return path.exists()


def autoencoder(args: argparse.Namespace, workers: Workers, train: Stage, held_out: Stage) -> SV3DVAE:
    """Trains or loads the VAE; the one that returns has normalised latents."""
    torch.manual_seed(0)
    vae = SV3DVAE(MINI.vae).to(workers.device)
    path = args.output / "vae.safetensors"
    if not _fetch(vae, path) or args.minutes_vae > 0:
        workers.same(vae)
        log = args.output / "vae.csv"
        vae = train_autoencoder(vae, train, workers, args.minutes_vae, args.batch_vae, log)
        views = held_out.standard(range(len(held_out.objects)), Orbit.static(10))
        normalise_latents(vae, views)
        workers.same(vae)
        if workers.first:
            print("vae: held-out psnr", round(reconstruction_psnr(vae, views), 2), flush=True)
            _store(vae, path, torch.float16)
    return vae.eval().requires_grad_(False)


def denoiser(args: argparse.Namespace, workers: Workers, vae: SV3DVAE, train: Stage) -> Denoiser:
    """Trains or loads UNet and image tower; returns the average of the weights."""
    torch.manual_seed(0)
    network = Denoiser(SV3DUNet(MINI.unet), CLIPImageTower(MINI.clip)).to(workers.device)
    initialise(network.unet)
    raw, averaged = args.output / "raw.safetensors", args.output / "average.safetensors"
    _fetch(network, raw)
    average = Average(network, 0.9995)
    if _fetch(average.module, averaged):
        average.updates = 10_000
    if args.minutes_unet > 0:
        workers.same(network)
        train_denoiser(
            network, vae, train, workers, minutes=args.minutes_unet, batch=args.batch, capacity=args.capacity,
            log=args.output / "unet.csv", seed=int(time.time()) if args.seed is None else args.seed,
            cooldown=not args.no_cooldown, average=average,
        )  # fmt: skip
        if workers.first:
            _store(network, raw, torch.bfloat16)
            _store(average.module, averaged, torch.float16)
    return average.module.eval()


def judge(args: argparse.Namespace, model: SV3DModel, held_out: Stage) -> None:
    """Scores the held-out objects with each guidance scale and step count asked for; keeps the last one's pictures."""
    for steps, guidance in args.evaluate:
        config = replace(MINI.sampler, steps=int(steps), max_guidance=guidance)
        scores, rows = [], []
        for score, views, made in evaluate(model, held_out, config):
            scores.append(score)
            rows.append((f"{score.name} {score.psnr:.1f} dB", views.frames[0], made))
        figures = {"steps": int(steps), "guidance": guidance, **{k: round(v, 4) for k, v in means(scores).items()}}
        print(json.dumps(figures), flush=True)
        tag = f"{int(steps)}_{guidance:g}"
        write_scores(scores, args.output / f"scores_{tag}.csv")
        step = max(1, len(rows) // SHEET_ROWS)
        contact_sheet(rows[::step][:SHEET_ROWS]).save(args.output / f"sheet_{tag}.jpg", quality=88)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="pack written by sv3d_fast.mini.data")
    parser.add_argument("--output", type=Path, required=True, help="folder of weights, logs and pictures")
    parser.add_argument("--minutes-vae", type=float, default=4)
    parser.add_argument("--minutes-unet", type=float, default=20)
    parser.add_argument("--batch-vae", type=int, default=32, help="pictures a step and GPU")
    parser.add_argument("--batch", type=int, default=32, help="orbits a step and GPU")
    parser.add_argument("--capacity", type=int, default=32768, help="orbits cached on each GPU")
    parser.add_argument("--procedural", type=int, default=1600, help="generated objects of each process")
    parser.add_argument("--seed", type=int, help="of the training data; the clock without it")
    parser.add_argument("--no-cooldown", action="store_true", help="training will go on from these weights")
    parser.add_argument(
        "--evaluate", nargs="*", default=[(20, 1.0)], metavar="STEPS:GUIDANCE",
        type=lambda text: tuple(float(v) for v in text.split(":")),
    )  # fmt: skip
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    workers = start_workers()
    # each process has generated objects of its own, beside the modelled ones that all share
    objects = load_objects(args.data, split="train", procedural=args.procedural, seed=workers.rank)
    train = Stage(objects, MINI.image_size, workers.device)
    held_out = Stage(load_objects(args.data, split="held_out"), MINI.image_size, workers.device)
    if workers.first:
        print(f"{len(train.objects)} training objects, {len(held_out.objects)} held out", flush=True)
    vae = autoencoder(args, workers, train, held_out)
    network = denoiser(args, workers, vae, train)
    if workers.first and args.evaluate:
        judge(args, SV3DModel(MINI, network.unet, vae, network.tower), held_out)
    if workers.count > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
