"""The command line: run, orbit, reconstruct, info. Every user error is one line and exit status 2."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .settings import EMBEDDED, Settings

INTERRUPTED = 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        return args.command(args)
    except KeyboardInterrupt:
        print("sv3d-fast: interrupted; finished stages are kept, the same command goes on from them", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)
        print(f"sv3d-fast: error: {' '.join(reason.split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sv3d-fast", description="One photo to an orbit, splats and a textured mesh.")
    parser.add_argument("--version", action="version", version=f"sv3d-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="a photo to an orbit, splats, a textured mesh and a report")
    run.add_argument("photo", type=Path, help="any picture; transparency is respected")
    _output(run)
    _generation(run)
    _reconstruction(run)
    run.set_defaults(command=_run)

    orbit = commands.add_parser("orbit", help="a photo to its orbit alone: mp4, gif, frames, transforms.json")
    orbit.add_argument("photo", type=Path, help="any picture; transparency is respected")
    _output(orbit)
    _generation(orbit)
    orbit.set_defaults(command=_orbit)

    reconstruct = commands.add_parser("reconstruct", help="an orbit to splats, a textured mesh and a report")
    reconstruct.add_argument("orbit", type=Path, help="mp4, gif, folder of frames, or transforms.json")
    reconstruct.add_argument("--elevation", type=float, help="of a static orbit, degrees; estimated without it")
    _output(reconstruct)
    _reconstruction(reconstruct)
    reconstruct.set_defaults(command=_reconstruct)

    info = commands.add_parser("info", help="versions, devices, and which implementation of each op can run and why")
    info.set_defaults(command=_info)
    return parser


def _output(parser: argparse.ArgumentParser) -> None:
    default = Settings()
    parser.add_argument("-o", "--output-dir", type=Path, required=True, help="folder of everything that is written")
    parser.add_argument("--overwrite", action="store_true", help="start anew where the folder holds an earlier run")
    parser.add_argument("--device", default=default.device, help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _generation(parser: argparse.ArgumentParser) -> None:
    default = Settings()
    parser.add_argument("--model", default=default.model, help=f"{EMBEDDED}, a checkpoint, a folder or a repository id")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    parser.add_argument("--elevation", type=float, default=default.elevation, help="of the photo's camera, degrees")
    parser.add_argument("--orbit", default=default.orbit, metavar="static|sine|FILE", help="or a JSON file of poses")
    parser.add_argument("--frame-size", type=int, help="pixels along a side (default: the model's own)")
    parser.add_argument("--foreground-ratio", type=float, help="longest side of the object over the picture's")
    parser.add_argument("--no-remove-bg", action="store_true", help="take the picture as it is")
    parser.add_argument("--matting-model", type=Path, help="local ONNX file for background removal")
    parser.add_argument("--decode-chunk-size", type=int, default=default.decode_chunk_size, help="no effect on pixels")


def _reconstruction(parser: argparse.ArgumentParser) -> None:
    default = Settings()
    parser.add_argument("--texture-resolution", type=int, default=default.texture_resolution, help="pixels")
    parser.add_argument("--mc-resolution", type=int, default=default.mc_resolution, help="voxels along a side")
    parser.add_argument("--target-faces", type=int, default=default.target_faces)


def _settings(args: argparse.Namespace) -> Settings:
    given: dict[str, Any] = {k: v for k, v in vars(args).items() if k in Settings.__dataclass_fields__}
    if isinstance(given.get("orbit"), Path):  # of `reconstruct`: the source, not a setting
        del given["orbit"]
    if given.get("elevation") is None:
        given.pop("elevation", None)
    if getattr(args, "no_remove_bg", False):
        given["remove_background"] = False
    return Settings(**given)


def _run(args: argparse.Namespace) -> int:
    settings = _settings(args)
    from .pipeline import running

    result = _watch(lambda: running(args.photo, args.output_dir, settings, overwrite=args.overwrite), args.quiet)
    _say(args, f"{result.folder / 'mesh.glb'}: {len(result.mesh.faces)} faces; open {result.folder / 'report.html'}")
    return 0


def _orbit(args: argparse.Namespace) -> int:
    settings = _settings(args)
    from .pipeline import orbiting

    _watch(lambda: orbiting(args.photo, args.output_dir, settings, overwrite=args.overwrite), args.quiet)
    _say(args, f"{args.output_dir / 'orbit.mp4'}")
    return 0


def _reconstruct(args: argparse.Namespace) -> int:
    settings = _settings(args)
    from .pipeline import reconstructing

    result = _watch(
        lambda: reconstructing(
            args.orbit, args.output_dir, settings, elevation=args.elevation, overwrite=args.overwrite
        ),
        args.quiet,
    )
    _say(args, f"{result.folder / 'mesh.glb'}: {len(result.mesh.faces)} faces; open {result.folder / 'report.html'}")
    return 0


def _info(args: argparse.Namespace) -> int:
    from .info import describe

    print(describe())
    return 0


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text)


def _watch(start: Callable[[], Generator], quiet: bool):
    """Runs a generator of events behind progress bars; returns its value. Warnings go to stderr."""
    from .progress import watch

    # one line per user error: native libraries' chatter about missing optional parts is not for users
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return watch(start(), quiet=quiet)


if __name__ == "__main__":
    sys.exit(main())
