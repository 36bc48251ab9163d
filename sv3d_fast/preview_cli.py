"""The flags of `preview` and `convert`, those of TripoSR's own script among them."""

import argparse
from pathlib import Path

from .preview_settings import AXES, MESH_FORMATS, REPOSITORY, PreviewSettings

CHECKPOINT = "a folder with config.yaml and model.ckpt or model.safetensors"


def add_preview(commands, command) -> None:
    """Adds `preview` to the subparsers, run by `command`."""
    parser = commands.add_parser("preview", help="photos to meshes in a single pass, by TripoSR, without an orbit")
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="any pictures, or folders of them")
    parser.add_argument(
        "-o", "--output-dir", type=Path, required=True, help="a folder in it for every photo, of its name"
    )
    parser.add_argument(
        "--model", "--pretrained-model-name-or-path", help=f"{CHECKPOINT}, or {REPOSITORY} to download it"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--mc-resolution", type=int, default=256, help="grid points along a side")
    parser.add_argument("--chunk-size", type=int, help="points decoded at a time, 0 for all; no effect on the mesh")
    parser.add_argument("--batch-size", type=int, help="pictures in a pass (default: 8 on a GPU, 1 on a CPU)")
    parser.add_argument("--foreground-ratio", type=float, default=0.85, help="side of the object over the picture's")
    parser.add_argument("--no-remove-bg", action="store_true", help="take the picture as it is, transparency on grey")
    parser.add_argument("--matting-model", type=Path, help="local ONNX file for background removal")
    parser.add_argument(
        "--model-save-format", nargs="+", choices=MESH_FORMATS, default=["glb"], help="one or several (default: glb)"
    )
    parser.add_argument(
        "--axes", choices=AXES, default="gltf", help="of GLB and OBJ: y up, front +z; or as upstream: z up, front +x"
    )
    parser.add_argument("--bake-texture", action="store_true", help="a texture in place of colours at the vertices")
    parser.add_argument("--texture-resolution", type=int, default=2048, help="texels along a side, with --bake-texture")
    parser.add_argument("--render", action="store_true", help="also a turntable, render.mp4, from the field itself")
    parser.add_argument("--overwrite", action="store_true", help="start anew where a folder holds an earlier result")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(command=command)


def preview_settings(args: argparse.Namespace) -> PreviewSettings:
    """What the flags of `preview` say. Raises ValueError."""
    return PreviewSettings(
        model=args.model,
        foreground_ratio=args.foreground_ratio,
        remove_background=not args.no_remove_bg,
        matting_model=args.matting_model,
        mc_resolution=args.mc_resolution,
        chunk_size=args.chunk_size,
        batch_size=args.batch_size,
        mesh_formats=tuple(dict.fromkeys(args.model_save_format)),
        axes=args.axes,
        texture_resolution=args.texture_resolution if args.bake_texture else None,
        turntable=args.render,
        device=args.device,
    )


def add_convert(commands, command) -> None:
    """Adds `convert` to the subparsers, run by `command`."""
    parser = commands.add_parser("convert", help="TripoSR's model.ckpt to safetensors, read without running its code")
    parser.add_argument("checkpoint", type=Path, help="the official pickle; only its tensors are read")
    parser.add_argument("-o", "--output-dir", type=Path, required=True, help="gets config.yaml and model.safetensors")
    parser.add_argument("--config", type=Path, help="its config.yaml (default: the one beside it)")
    parser.add_argument("--overwrite", action="store_true", help="replace what stands in the folder")
    parser.add_argument("--quiet", action="store_true", help="say nothing")
    parser.set_defaults(command=command)
