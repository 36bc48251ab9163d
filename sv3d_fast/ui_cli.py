"""The flags of `ui`."""

import argparse
from pathlib import Path
from typing import Any

from .settings import DTYPES, EMBEDDED, Settings


def add_ui(commands, command) -> None:
    """Adds `ui` to the subparsers, run by `command`."""
    default = Settings()
    parser = commands.add_parser("ui", help="a page in the browser that does what run does; needs the extra gradio")
    parser.add_argument("--host", help="address to listen on (default: this machine alone); 0.0.0.0 for every machine")
    parser.add_argument("--port", type=int, help="default: the first that is free from 7860")
    parser.add_argument("--model", default=default.model, help=f"{EMBEDDED}, a checkpoint, a folder or a repository id")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    parser.add_argument("--matting-model", type=Path, help="local ONNX file for background removal")
    parser.add_argument("--device", default=default.device, help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="bfloat16 where float16 overflows")
    parser.set_defaults(command=command)


def ui_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of `ui` say, for `Settings.of`. Raises ValueError."""
    given = {name: getattr(args, name) for name in ("model", "steps", "matting_model", "device", "dtype")}
    Settings.of(**given)
    if args.port is not None and not 1 <= args.port <= 65535:
        raise ValueError(f"port: expected 1 to 65535, got {args.port}")
    return given
