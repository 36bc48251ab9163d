"""The command line and its subcommands. Every user error is one line and exit status 2."""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .formats import MESH_FORMATS, SPLAT_FORMATS, TEXTURE_FORMATS
from .preview_cli import add_convert, add_preview, preview_settings
from .serve_cli import add_serve
from .settings import DTYPES, EMBEDDED, PURPOSES, Settings
from .ui_cli import add_ui, ui_settings

SOME_FAILED = 1
USER_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT
NOBODY_READS = 128 + 13  # what shells give a process that SIGPIPE ended
# RuntimeErrors whose message is for users, by name: their modules import torch, which may not be needed until then.
REPORTED = {"NonFiniteError", "NativeLibraryError"}
OUT_OF_MEMORY = "OutOfMemoryError"  # torch's on a GPU; on a CPU it is a RuntimeError that says "can't allocate memory"
LONGEST = 1000  # characters of an error's line


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, this process's own if `arguments` is None; returns the exit status."""
    try:
        try:
            return _main(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # the reader went away, as `head` does; Python's own flush at exit must find nothing to complain of
        for stream in (sys.stdout, sys.stderr):
            _discard(stream)
        return NOBODY_READS


def _main(arguments: Sequence[str] | None) -> int:
    args = _parser().parse_args(arguments)
    args.interrupts = []
    if arguments is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:

        def interrupt(number, frame):
            args.interrupts.append(number)  # some libraries swallow KeyboardInterrupt while they are imported
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, interrupt)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return args.command(args)
        except KeyboardInterrupt:
            again = "the same command without --overwrite" if getattr(args, "overwrite", False) else "the same command"
            _complain(f"interrupted; finished stages are kept, {again} goes on from them")
            if arguments is None:  # the process is ours to end; taking torch down in order takes over a second
                sys.stdout.flush()
                os._exit(INTERRUPTED)
            return INTERRUPTED
        except BrokenPipeError:
            raise
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            reason = _reason(error)
            if reason is None:
                raise
            _complain(f"error: {reason}")
            return USER_ERROR


def _reason(error: Exception) -> str | None:
    """What to tell the user of an error; None for one that is our own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    is_runtime, kind = isinstance(error, RuntimeError), type(error).__name__
    if isinstance(error, MemoryError) or (is_runtime and (kind == OUT_OF_MEMORY or "can't allocate" in str(error))):
        more = "--decode-chunk-size, --frame-size, --mc-resolution or --texture-resolution"
        return f"out of memory; smaller values of {more} need less ({str(error)[:200] or 'no details'})"
    if is_runtime and kind not in REPORTED:
        return None
    return str(error) or type(error).__name__


def _complain(text: str) -> None:
    text = " ".join(text.split())
    if len(text) > LONGEST:
        text = text[: LONGEST - 4] + " ..."
    print(f"sv3d-fast: {text}", file=sys.stderr)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    _complain(f"warning: {message}")


def _discard(stream) -> None:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):  # no file behind it, as in a notebook
        return


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sv3d-fast", description="One photo to an orbit, splats and a textured mesh.")
    parser.add_argument("--version", action="version", version=f"sv3d-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="a photo to an orbit, splats, a textured mesh and a report")
    run.add_argument("photo", type=Path, help="any picture; transparency is respected")
    _output(run)
    _generation(run)
    _latency(run)
    _reconstruction(run)
    run.set_defaults(command=_run)

    orbit = commands.add_parser("orbit", help="a photo to its orbit alone: mp4, gif, frames, transforms.json, COLMAP")
    orbit.add_argument("photo", type=Path, help="any picture; transparency is respected")
    _output(orbit)
    _generation(orbit)
    _latency(orbit)
    orbit.set_defaults(command=_orbit)

    reconstruct = commands.add_parser("reconstruct", help="an orbit to splats, a textured mesh and a report")
    reconstruct.add_argument(
        "source", metavar="ORBIT", type=Path, help="mp4, gif, folder of frames, transforms.json, or COLMAP text"
    )
    reconstruct.add_argument("--elevation", type=float, help="of a static orbit, degrees; estimated without it")
    _output(reconstruct)
    _reconstruction(reconstruct)
    reconstruct.set_defaults(command=_reconstruct)

    batch = commands.add_parser("batch", help="a folder of photos, or a CSV list of them, each as run does it")
    batch.add_argument(
        "source", metavar="FOLDER|LIST.csv", type=Path, help="a list has a column picture; more: settings"
    )
    batch.add_argument("-o", "--output-dir", type=Path, required=True, help="a folder in it for every photo")
    batch.add_argument("--retry-failed", action="store_true", help="try again what failed earlier")
    batch.add_argument(
        "--workers", type=int, help="processes that reconstruct, for each GPU (default: 2 on one of 24 GB, else 1)"
    )
    batch.add_argument(
        "--ray", nargs="?", const="local", metavar="ADDRESS", help="on all GPUs of a Ray cluster; of this machine alone"
    )
    _shared(batch)
    _generation(batch)
    _reconstruction(batch)
    batch.set_defaults(command=_batch)

    add_preview(commands, _preview)
    add_convert(commands, _convert)
    add_ui(commands, _ui)
    add_serve(commands)

    bench = commands.add_parser("bench", help="how fast this machine is; or two results side by side")
    bench.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="results of earlier benches")
    bench.add_argument("--quick", action="store_true", help="one run in place of the median of three")
    bench.add_argument("--device", default=Settings().device, help="auto, cpu, cuda or cuda:N")
    bench.add_argument("-o", "--output", type=Path, help="where to write the result, JSON")
    bench.add_argument("--quiet", action="store_true", help="no progress bars")
    bench.set_defaults(command=_bench)

    info = commands.add_parser("info", help="versions, devices, and which implementation of each op can run and why")
    info.add_argument("--plan", action="store_true", help="the memory that an orbit of SV3D takes, by stage and plan")
    _budget(info)
    info.set_defaults(command=_info)
    return parser


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output-dir", type=Path, required=True, help="folder of everything that is written")
    parser.add_argument("--overwrite", action="store_true", help="start anew where the folder holds an earlier run")
    _shared(parser)


def _shared(parser: argparse.ArgumentParser) -> None:
    default = Settings()
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
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="bfloat16 where float16 overflows")
    parser.add_argument("--decode-chunk-size", type=int, help="frames decoded at once; no effect on pixels")
    _budget(parser)


def _budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-memory", metavar="SIZE", help="of the GPU, for making an orbit, such as 6GiB")


def _latency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg-parallel", action="store_true", help="two GPUs share each step: the same orbit sooner")


def _reconstruction(parser: argparse.ArgumentParser) -> None:
    def add(flag: str, **options: Any) -> None:
        parser.add_argument(flag, default=argparse.SUPPRESS, **options)  # what isn't given is left to --for

    add("--for", dest="purpose", choices=PURPOSES, help="settings that suit a purpose; those given here win over them")
    add("--texture-resolution", type=int, help="pixels")
    add("--mc-resolution", type=int, help="voxels along a side")
    add("--target-faces", type=int, help="of the mesh, at most")
    add("--mesh-format", dest="mesh_formats", nargs="+", choices=MESH_FORMATS, help="besides mesh.glb (default: obj)")
    add("--splat-format", dest="splat_formats", nargs="+", choices=SPLAT_FORMATS, help="besides splats.ply")
    add("--texture-format", choices=TEXTURE_FORMATS, help="in GLB and USDZ (default: png)")
    add("--unlit", action="store_true", help="the GLB asks viewers to leave out their lights")
    add("--height-mm", type=float, help="height of the mesh in STL and 3MF (default: 100)")
    add("--watertight", action=argparse.BooleanOptionalAction, help="whether a mesh with open edges is an error")


def _settings(args: argparse.Namespace) -> Settings:
    given: dict[str, Any] = {k: v for k, v in vars(args).items() if k in Settings.__dataclass_fields__}
    if given.get("elevation") is None:  # of `reconstruct`: to be estimated
        given.pop("elevation", None)
    if getattr(args, "no_remove_bg", False):
        given["remove_background"] = False
    return Settings.of(**given)


def _run(args: argparse.Namespace) -> int:
    settings = _settings(args)
    from .pipeline import running
    from .progress import watch

    result = watch(
        running(args.photo, args.output_dir, settings, overwrite=args.overwrite),
        quiet=args.quiet,
        interrupts=args.interrupts,
    )
    _say(args, f"{result.folder / 'mesh.glb'}: {len(result.mesh.faces)} faces; open {result.folder / 'report.html'}")
    return 0


def _orbit(args: argparse.Namespace) -> int:
    settings = _settings(args)
    from .orbit_stage import orbiting
    from .progress import watch

    watch(
        orbiting(args.photo, args.output_dir, settings, overwrite=args.overwrite),
        quiet=args.quiet,
        interrupts=args.interrupts,
    )
    _say(args, f"{args.output_dir / 'orbit.mp4'}")
    return 0


def _reconstruct(args: argparse.Namespace) -> int:
    settings = _settings(args)
    from .pipeline import reconstructing
    from .progress import watch

    running = reconstructing(args.source, args.output_dir, settings, elevation=args.elevation, overwrite=args.overwrite)
    result = watch(running, quiet=args.quiet, interrupts=args.interrupts)
    _say(args, f"{result.folder / 'mesh.glb'}: {len(result.mesh.faces)} faces; open {result.folder / 'report.html'}")
    return 0


def _batch(args: argparse.Namespace) -> int:
    settings = _settings(args)
    from .batch import batching
    from .progress import watch

    running = batching(
        args.source, args.output_dir, settings, retry_failed=args.retry_failed, workers=args.workers, ray=args.ray
    )
    summary = watch(running, quiet=args.quiet, interrupts=args.interrupts)
    done = len(summary.rows) - summary.failed
    _say(args, f"{done} of {len(summary.rows)} pictures; open {summary.folder / 'index.html'}")
    return SOME_FAILED if summary.failed else 0


def _preview(args: argparse.Namespace) -> int:
    settings = preview_settings(args)
    from .progress import watch
    from .triposr_pipeline import previewing

    running = previewing(args.photos, args.output_dir, settings, overwrite=args.overwrite)
    summary = watch(running, quiet=args.quiet, interrupts=args.interrupts)
    total = len(summary.done) + len(summary.failed)
    _say(args, f"{len(summary.done)} of {total} pictures; {summary.folder}/NAME/report.html shows each")
    return SOME_FAILED if summary.failed else 0


def _convert(args: argparse.Namespace) -> int:
    from .triposr.convert import convert

    for path in convert(args.checkpoint, args.output_dir, config=args.config, overwrite=args.overwrite):
        _say(args, str(path))
    return 0


def _ui(args: argparse.Namespace) -> int:
    given = ui_settings(args)
    from .frontends.gradio import make_page, open_page

    open_page(make_page(**given), host=args.host, port=args.port)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from .benchmark import measuring, read_result, table, write_result
    from .progress import watch

    if args.compare:
        print(table(*map(read_result, args.compare)))
        return 0
    result = watch(measuring(args.device, quick=args.quick), quiet=args.quiet, interrupts=args.interrupts)
    print(table(result))
    if args.output:
        write_result(result, args.output)
    return 0


def _info(args: argparse.Namespace) -> int:
    from .info import describe, describe_plans

    print(describe_plans(args.max_memory) if args.plan or args.max_memory else describe())
    return 0


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))


if __name__ == "__main__":
    sys.exit(main())
