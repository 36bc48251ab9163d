"""report.html: one page that shows a result without a network: pictures, a viewer for the mesh, figures."""

import base64
import html
import importlib.resources
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import __version__
from .files import OutputError, write_text

FILES = (
    *("mesh.glb", "mesh.obj", "mesh.usdz", "mesh.stl", "mesh.3mf", "mesh.ply", "mesh.off"),
    *("splats.ply", "splats.splat", "splats.spz"),
    *("orbit.mp4", "orbit.gif", "render.mp4", "transforms.json", "manifest.json"),
)


def write_report(
    folder: str | os.PathLike, manifest: Mapping[str, Any], figures: Mapping[str, Any], *, title: str | None = None
) -> Path:
    """Writes report.html into a result's folder, from what lies there; returns its path.

    Embeds preview.png, orbit.gif and mesh.glb (as `save_mesh` writes it) where they exist, so the page works alone;
    the other files are linked. figures: name -> number, text, bool or None, shown in their order. manifest: anything
    JSON can hold, shown in full. title: the picture's name in manifest["input"] if None.
    Raises OutputError where the page can't be written or a file that stands there can't be read.
    """
    folder = Path(folder)
    title = title or Path(str(manifest.get("input") or folder.resolve().name)).name
    has_orbit = (folder / "orbit.gif").is_file()
    made = "An orbit and a textured mesh" if has_orbit else "A mesh"
    columns = [
        [_viewer(folder), _links(folder)],
        [_picture(folder, "orbit.gif", "Orbit"), _card("Figures", _table(figures)) if figures else ""],
    ]
    cards = [
        _picture(folder, "preview.png", "Input, orbit and mesh" if has_orbit else "Input and mesh", "wide"),
        *(f'<div class="column">{"".join(column)}</div>' for column in columns if any(column)),
        _settings(manifest),
    ]
    parts = {
        "title": html.escape(title),
        "subtitle": f"{made} from one picture, by sv3d-fast {__version__}",
        "cards": "\n".join(card for card in cards if card),
    }
    template = importlib.resources.files(__package__).joinpath("scene/report.html").read_text(encoding="utf-8")
    return write_text(folder / "report.html", re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template))


def format_figure(value: Any) -> str:
    """A figure as a person reads it: 4 significant digits, thousands apart, yes and no."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " · ".join(format_figure(v) for v in value)
    return str(value)


def _base64(folder: Path, name: str) -> str | None:
    path = folder / name
    if not path.is_file():
        return None
    try:
        return base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise OutputError(f"can't read {path} for the report: {error.strerror or error}") from error


def _card(heading: str, body: str, kind: str = "") -> str:
    return f'<section class="card {kind}"><h2>{heading}</h2>{body}</section>'


def _picture(folder: Path, name: str, heading: str, kind: str = "") -> str:
    data = _base64(folder, name)
    if data is None:
        return ""
    mime = "image/gif" if name.endswith(".gif") else "image/png"
    return _card(heading, f'<img alt="{heading}" src="data:{mime};base64,{data}">', kind)


def _viewer(folder: Path) -> str:
    data = _base64(folder, "mesh.glb")
    if data is None:
        return ""
    body = (
        '<div id="viewer"><canvas tabindex="0" aria-label="The mesh; drag or use the arrow keys to turn it"></canvas>'
        '<div class="bar"><button value="color" aria-pressed="true">Colour</button>'
        '<button value="shape" aria-pressed="false">Shape</button></div></div>'
    )
    return _card("Mesh", f'{body}<script type="text/plain" id="glb">{data}</script>')


def _table(values: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(format_figure(v))}</td></tr>"
        for name, v in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _links(folder: Path) -> str:
    names = [name for name in FILES if (folder / name).is_file()]
    if not names:
        return ""
    return _card("Files", f'<div class="files">{" ".join(f"<a href={name!r}>{name}</a>" for name in names)}</div>')


def _settings(manifest: Mapping[str, Any]) -> str:
    if not manifest:
        return ""
    text = html.escape(json.dumps(dict(manifest), indent=2, default=str, ensure_ascii=False))
    return f'<section class="card wide"><details><summary>All settings</summary><pre>{text}</pre></details></section>'
