"""The flags of `serve`."""

import argparse
from pathlib import Path
from typing import Any

from .serve.keys import new_key
from .serve.settings import ServeSettings
from .settings import DTYPES

EXTRA = ("anyio", "fastapi", "multipart", "prometheus_client", "pydantic", "python_multipart", "starlette", "uvicorn")


def add_serve(commands) -> None:
    """Adds `serve` to the subparsers."""
    default = ServeSettings()
    parser = commands.add_parser("serve", help="an HTTP server with a queue: pictures to orbits, meshes and previews")
    parser.add_argument("--host", default=default.host)
    parser.add_argument("--port", type=int, default=default.port)
    parser.add_argument("--data-dir", type=Path, default=default.data_dir, help="jobs and their files")
    parser.add_argument("--model", default=default.model, help="as of run")
    parser.add_argument(
        "--preview-model", help="TripoSR's folder or repository id; without it there is no mode preview"
    )
    parser.add_argument("--matting-model", type=Path, help="local ONNX file for background removal")
    parser.add_argument("--devices", nargs="+", default=list(default.devices), help="a worker for each (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="of SV3D's network, as of run")
    parser.add_argument("--queue-size", type=int, default=default.queue_size, help="jobs that may wait")
    parser.add_argument("--deadline", type=float, default=default.deadline, help="seconds that a job may run")
    parser.add_argument("--drain", type=float, default=default.drain, help="seconds for running jobs at SIGTERM")
    parser.add_argument("--max-attempts", type=int, default=default.max_attempts, help="of a job whose worker dies")
    parser.add_argument("--max-body", type=int, default=default.max_body, help="bytes of a request")
    parser.add_argument("--max-pixels", type=int, default=default.max_pixels, help="of a picture")
    parser.add_argument("--keep-hours", type=float, default=default.keep_hours, help="then finished jobs go")
    parser.add_argument("--api-key-file", type=Path, help="hashes of the keys that may call, one a line")
    parser.add_argument("--cors-origin", dest="cors_origins", action="append", default=[], help="may be repeated")
    parser.add_argument("--instance", default=default.instance, help="what job ids begin with, for a balancer")
    parser.add_argument("--new-key", action="store_true", help="print a key and its hash for --api-key-file, and end")
    parser.set_defaults(command=_serve)


def _serve(args: argparse.Namespace) -> int:
    if args.new_key:
        key, hashed = new_key()
        print(f"key:  {key}\nhash: {hashed}")
        return 0
    given: dict[str, Any] = {k: v for k, v in vars(args).items() if k in ServeSettings.__dataclass_fields__}
    settings = ServeSettings(**given | {k: tuple(given[k]) for k in ("devices", "cors_origins")})
    try:
        from .serve.server import serve
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise ValueError(f'serve needs {error.name}: pip install "sv3d-fast[serve]"') from error
    serve(settings)
    return 0
