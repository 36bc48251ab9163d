"""report.html: one page that needs nothing else, holds what lies in the folder, and can't be injected into."""

import base64
import html.parser
import re

import pytest
import torch
import trimesh
from PIL import Image

from sv3d_fast.files import OutputError
from sv3d_fast.report import format_figure, write_report
from sv3d_fast.scene.export import save_mesh
from sv3d_fast.scene.mesh import Mesh

EVIL = "</script><script>alert(1)</script>{{cards}}"


class Page(html.parser.HTMLParser):
    """Tags with their attributes, the text of every script, and the text that is not in a script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += data


@pytest.fixture
def folder(tmp_path):
    box = trimesh.creation.box()
    mesh = Mesh(torch.tensor(box.vertices, dtype=torch.float32), torch.tensor(box.faces, dtype=torch.int32))
    save_mesh(mesh, tmp_path / "mesh.glb")
    Image.new("RGB", (20, 10), "red").save(tmp_path / "preview.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "orbit.gif")
    return tmp_path


def test_holds_what_lies_in_the_folder(folder):
    figures = {"PSNR (dB)": 31.23456, "watertight": True, "faces": 20480, "texture": [1024, 1024]}
    path = write_report(folder, {"input": "a/b/teapot.png", "seed": 23}, figures)
    page = Page(path.read_text())
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert [s.split(",")[0] for s in sources] == ["data:image/png;base64", "data:image/gif;base64"]
    assert base64.b64decode(sources[0].split(",")[1]) == (folder / "preview.png").read_bytes()
    assert base64.b64decode(page.scripts[0]) == (folder / "mesh.glb").read_bytes()
    for text in ("teapot.png", "31.23", "yes", "20,480", "1,024 · 1,024", '"seed": 23'):
        assert text in page.text
    assert [a["href"] for tag, a in page.tags if tag == "a"] == ["mesh.glb", "orbit.gif"]
    assert "{{" not in path.read_text()


def test_needs_no_network(folder):
    text = write_report(folder, {}, {}).read_text()
    assert not re.findall(r"https?:|//[a-z]+\.[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", text))
    for _, attributes in Page(text).tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith(("data:", "mesh.glb", "orbit.gif"))
    assert "default-src 'none'" in text


def test_text_can_not_break_out(folder):
    manifest = {"input": EVIL, EVIL: EVIL}
    page = Page(write_report(folder, manifest, {EVIL: EVIL}, title=EVIL).read_text())
    assert len(page.scripts) == 2  # the mesh and the viewer
    assert not any("alert" in script for script in page.scripts)
    assert page.text.count("alert(1)") >= 6
    assert page.text.count("{{cards}}") >= 6


def test_parts_that_are_missing_are_left_out(tmp_path):
    page = Page(write_report(tmp_path, {}, {}).read_text())
    assert not [tag for tag, _ in page.tags if tag in ("img", "section", "canvas")]
    assert tmp_path.name in page.text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (False, "no"), (0.000123456, "0.0001235"), (12345.6, "12,346"), (float("inf"), "inf"), ("a", "a")],
)
def test_figures(value, text):
    assert format_figure(value) == text


def test_unwritable(tmp_path):
    with pytest.raises(OutputError, match=r"can't write .*report\.html"):
        write_report(tmp_path / "none", {}, {})
