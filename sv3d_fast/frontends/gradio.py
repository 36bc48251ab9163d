"""A page in the browser: drop a picture, watch its orbit appear, turn the mesh, download every file.

Gradio is an optional extra: `pip install "sv3d-fast[gradio]"`.
"""

import html
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from sv3d_fast.events import Event, FileWritten, Progress, StageFinished, Warned
from sv3d_fast.orbit_stage import open_model
from sv3d_fast.pipeline import running
from sv3d_fast.settings import PURPOSES, Settings

try:
    import gradio as gr
except ImportError as error:
    raise ValueError("ui: gradio is not installed: pip install 'sv3d-fast[gradio]'") from error

WAITING = 16  # pictures in the queue; who comes later is told to come again
LARGEST = "64mb"  # of an upload
KEPT = 24 * 3600  # seconds that gradio keeps uploads and results
SIDE = 360  # pixels, of the pictures and the mesh
FONT = "system-ui"  # gradio's own fonts come from the network
CSS = """
.whole img { width: 100%; height: 100%; object-fit: contain; }
progress { appearance: none; width: 100%; height: 8px; border: 0; border-radius: 4px; overflow: hidden; }
progress, progress::-webkit-progress-bar { background: var(--border-color-primary); }
progress::-webkit-progress-value { background: var(--color-accent); }
progress::-moz-progress-bar { background: var(--color-accent); }
"""


def make_page(**given: Any) -> gr.Blocks:
    """The page, its model open already. given: settings as `Settings.of` takes them; visitors choose elevation, seed
    and purpose. One picture is worked on at a time. Raises ValueError for settings or weights that can't be used."""
    default = Settings.of(**given)
    model = open_model(default)

    def make(photo: str | None, elevation: float, seed: float, purpose: str | None) -> Generator[dict, None, None]:
        if photo is None:
            raise gr.Error("picture: expected one, got none")
        with tempfile.TemporaryDirectory(prefix="sv3d-fast-") as place:
            folder = Path(place) / "result"
            try:
                settings = Settings.of(
                    **given | {"elevation": elevation, "seed": int(seed), "purpose": purpose or default.purpose}
                )
                yield {status: "", orbit: None, mesh: None, **offer(None, None)}
                for event in running(photo, folder, settings, model=model):
                    yield from show(event)
            except ValueError as error:
                raise gr.Error(str(error)) from error
            written = sorted(str(path) for path in folder.iterdir() if path.is_file())
            yield {status: "Done", **offer(written, shutil.make_archive(str(folder), "zip", folder))}

    def offer(written: list[str] | None, archive: str | None) -> dict:
        """The files to download; None takes them off the page."""
        there = written is not None
        return {files: gr.File(written, visible=there), everything: gr.DownloadButton(value=archive, interactive=there)}

    def show(event: Event) -> Generator[dict, None, None]:
        """What an event changes on the page."""
        if isinstance(event, Progress):
            yield {status: bar(event)}
        elif isinstance(event, StageFinished):
            yield {status: f"{html.escape(event.stage)} done in {event.seconds:.1f} s"}
        elif isinstance(event, Warned):
            gr.Warning(event.message)
        elif isinstance(event, FileWritten) and event.path.name == "orbit.gif":
            yield {orbit: str(event.path)}
        elif isinstance(event, FileWritten) and event.path.name == "mesh.glb":
            yield {mesh: str(event.path)}

    with gr.Blocks(title="sv3d-fast", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.Markdown("# One photo to an orbit, splats and a textured mesh")
        with gr.Row():
            with gr.Column():
                photo = gr.Image(
                    label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"],
                    height=SIDE, elem_classes="whole",
                )  # fmt: skip
                elevation = gr.Slider(-89, 89, default.elevation, label="Elevation of its camera, degrees")
                seed = gr.Number(default.seed, label="Seed", precision=0, minimum=0)
                purpose = gr.Radio([("any", ""), *PURPOSES], value=default.purpose or "", label="For")
                with gr.Row():
                    start = gr.Button("Make it turn", variant="primary")
                    stop = gr.Button("Stop")
                status = gr.HTML(label="Progress")
            with gr.Column():
                orbit = gr.Image(
                    label="Orbit", type="filepath", interactive=False, buttons=["download"], height=SIDE,
                    elem_classes="whole",
                )  # fmt: skip
                mesh = gr.Model3D(label="Mesh", interactive=False, height=SIDE)
                everything = gr.DownloadButton("Download everything", interactive=False)
                files = gr.File(label="Files", file_count="multiple", interactive=False, visible=False)
        made = start.click(
            make,
            [photo, elevation, seed, purpose],
            [status, orbit, mesh, files, everything],
            api_name="make",
            show_progress="hidden",
            concurrency_limit=1,
        )
        stop.click(None, cancels=[made])
    return page.queue(max_size=WAITING)


def bar(event: Progress) -> str:
    """A stage's progress as HTML."""
    stage = html.escape(event.stage)
    return f'<label>{stage} <progress value="{event.done}" max="{event.total}"></progress></label>'


def open_page(page: gr.Blocks, *, host: str | None, port: int | None, wait: bool = True) -> str:
    """Serves the page and returns its address, at once or, with `wait`, when the server ends.

    host: where to listen, this machine alone by default. port: the first that is free from 7860 by default.
    Raises OSError for a port that can't be had.
    """
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not wait,
        max_file_size=LARGEST,
        theme=gr.themes.Default(font=FONT, font_mono="monospace"),
        css=CSS,
        footer_links=[],
        quiet=not wait,
    )
    return address
