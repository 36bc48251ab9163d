"""The pages as a browser shows them, without a network: report.html, a batch's summary, and that of `sv3d-fast ui`."""

import re
import zipfile

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

pytest.importorskip("selenium")

from browser import browser, complaints, pixels, until
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.action_chains import ScrollOrigin
from selenium.webdriver.common.by import By
from small_run import SMALL, blob

from sv3d_fast.batch import PAGE, batching
from sv3d_fast.events import finish
from sv3d_fast.report import write_report
from sv3d_fast.scene.export import save_mesh
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.settings import Settings

RED, GREEN, BLUE, YELLOW, WHITE, BLACK = SIDES = np.array(
    [(200, 40, 30), (30, 160, 60), (40, 60, 200), (220, 200, 40), (250, 250, 250), (5, 5, 5)]
)  # of a box: towards the world's x, y, -x, -y, z, -z
NEAR = 4  # levels of 255


@pytest.fixture(scope="module")
def window():
    with browser() as driver:
        yield driver


def still(window, is_still=True):
    """Asks pages not to move, as a visitor's system may."""
    value = "reduce" if is_still else "no-preference"
    media = {"features": [{"name": "prefers-reduced-motion", "value": value}]}
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def box(kind):
    """A cube whose sides have the colours SIDES, as "texture"; or red all over, as "colors"; or neither."""
    shape = trimesh.creation.box()
    vertices, faces = torch.tensor(shape.vertices).float(), torch.tensor(shape.faces).int()
    if kind == "colors":
        return Mesh(vertices, faces, colors=torch.tensor(RED).to(torch.uint8).expand(len(vertices), 3).contiguous())
    if kind == "shape":
        return Mesh(vertices, faces)
    normals = shape.face_normals
    axis = np.abs(normals).argmax(1)
    side = np.where(axis == 2, 4 + (normals[:, 2] < 0), axis + 2 * (normals[np.arange(len(axis)), axis] < 0))
    uvs = torch.tensor(np.stack([(side + 0.5) / 6, np.full(len(side), 0.5)], -1)).float()
    texture = torch.tensor(np.repeat(SIDES, 10, 0)).to(torch.uint8).expand(60, 60, 3).contiguous()
    return Mesh(vertices, faces, uvs[:, None].expand(-1, 3, 2).contiguous(), texture)


def report(window, folder, kind="texture"):
    """Opens the report of a box; returns its canvas."""
    save_mesh(box(kind), folder / "mesh.glb")
    Image.new("RGB", (200, 60), "orange").save(folder / "preview.png")
    path = write_report(folder, {"input": "a & b.png", "seed": 1}, {"Faces": 12})
    window.get(path.as_uri())
    return window.find_element(By.CSS_SELECTOR, "#viewer canvas")


def centre(canvas):
    image = pixels(canvas)
    return image[image.shape[0] // 2, image.shape[1] // 2]


def shows(window, canvas, color):
    until(window, lambda: np.abs(centre(canvas) - color).max() <= NEAR)


def test_the_report_shows_the_mesh_and_turns_it(window, tmp_path):
    still(window)
    canvas = report(window, tmp_path)
    shows(window, canvas, RED)  # the front
    canvas.click()
    canvas.send_keys(*[Keys.ARROW_RIGHT] * 16)  # 0.1 rad each: the camera goes counter-clockwise, to the world's y
    shows(window, canvas, GREEN)
    ActionChains(window, 20).drag_and_drop_by_offset(canvas, -157, 0).perform()  # 0.01 rad a pixel: to -x
    shows(window, canvas, BLUE)
    canvas.send_keys(*[Keys.ARROW_UP] * 14)
    shows(window, canvas, WHITE)
    canvas.send_keys(*[Keys.ARROW_DOWN] * 14)
    ActionChains(window, 20).drag_and_drop_by_offset(canvas, 157, 0).perform()
    shows(window, canvas, GREEN)
    before = pixels(canvas)
    ActionChains(window).scroll_from_origin(ScrollOrigin.from_element(canvas), 0, 400).perform()
    until(window, lambda: 0 < seen(canvas, GREEN) < 0.6 * (np.abs(before - GREEN).max(-1) <= NEAR).mean())
    shape = window.find_element(By.CSS_SELECTOR, "button[value=shape]")
    shape.click()
    until(window, lambda: np.ptp(centre(canvas)) <= 2)
    assert shape.get_attribute("aria-pressed") == "true"
    assert complaints(window) == []


def seen(canvas, color):
    """Share of the pixels that have a colour."""
    return (np.abs(pixels(canvas) - color).max(-1) <= NEAR).mean()


def test_the_report_alone_is_the_page(window, tmp_path):
    still(window)
    report(window, tmp_path)
    assert window.find_element(By.TAG_NAME, "h1").text == "a & b.png"
    for picture in window.find_elements(By.TAG_NAME, "img"):
        assert int(picture.get_property("naturalWidth")) == 200
    fetched = window.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in fetched if not name.startswith(("data:", "blob:"))] == []
    links = [link.get_attribute("href") for link in window.find_elements(By.CSS_SELECTOR, ".files a")]
    assert links == [(tmp_path / "mesh.glb").as_uri()]
    window.find_element(By.TAG_NAME, "summary").click()
    assert '"seed": 1' in until(window, lambda: window.find_element(By.TAG_NAME, "pre").text)
    narrow = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    wide = window.execute_script("return document.documentElement.scrollWidth")
    window.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide == 390
    assert complaints(window) == []


def test_a_browser_without_webgl_shows_a_line_in_place_of_the_viewer(tmp_path):
    save_mesh(box("texture"), tmp_path / "mesh.glb")
    path = write_report(tmp_path, {"input": "a.png", "seed": 1}, {})
    with browser("--disable-3d-apis") as driver:
        driver.get(path.as_uri())
        viewer = driver.find_element(By.ID, "viewer")
        assert "no WebGL 2" in until(driver, lambda: viewer.text)
        assert viewer.find_elements(By.TAG_NAME, "button") == []


@pytest.mark.parametrize(("kind", "color"), [("colors", RED), ("shape", None)])
def test_the_report_without_a_texture(window, tmp_path, kind, color):
    still(window)
    canvas = report(window, tmp_path, kind)
    if color is not None:
        shows(window, canvas, color)
    else:
        until(window, lambda: np.ptp(centre(canvas)) <= 2 and centre(canvas)[0] < 220)
        assert window.find_elements(By.CSS_SELECTOR, "#viewer button") == []
    assert complaints(window) == []


def test_the_report_spins_until_it_is_touched(window, tmp_path):
    still(window, False)
    canvas = report(window, tmp_path)
    until(window, lambda: seen(canvas, GREEN) > seen(canvas, RED) > 0 or seen(canvas, GREEN) > 0.1)
    canvas.send_keys(Keys.ARROW_LEFT)
    until(window, lambda: np.array_equal(pixels(canvas), pixels(canvas)))


@pytest.mark.usefixtures("quick_batch")
def test_the_page_of_a_batch(window, tmp_path):
    photos, output = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    blob(photos / "teapot.png")
    (photos / "broken.png").write_bytes(b"no picture")
    finish(batching(photos, output, Settings(**SMALL)))
    still(window)
    window.get((output / PAGE).as_uri())
    text = window.find_element(By.TAG_NAME, "body").text
    assert "teapot" in text
    assert re.search(r"broken[^\n]*\n?[^\n]*failed", text)
    (picture,) = [i for i in window.find_elements(By.TAG_NAME, "img") if "teapot" in i.get_attribute("src")]
    until(window, lambda: picture.get_property("naturalWidth") > 32)
    window.find_element(By.CSS_SELECTOR, "a[href$='teapot/report.html']").click()
    until(window, lambda: window.find_element(By.TAG_NAME, "h1").text == "teapot.png")
    canvas = window.find_element(By.CSS_SELECTOR, "#viewer canvas")
    until(window, lambda: pixels(canvas).std() > 10)
    assert complaints(window) == []


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    pytest.importorskip("gradio", reason="the extra gradio is not installed")
    from gradio_page import serving

    with serving(tmp_path_factory.mktemp("gradio")) as address:
        yield address


def button(window, text):
    return until(window, lambda: next((b for b in window.find_elements(By.TAG_NAME, "button") if b.text == text), None))


def upload(window, path):
    button(window, "Make it turn")
    window.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(path))
    until(window, lambda: loaded(window, path.stem))


def loaded(window, name):
    """Pictures on the page whose address has a name, once they are there."""
    pictures = [i for i in window.find_elements(By.TAG_NAME, "img") if name in (i.get_attribute("src") or "")]
    return [i for i in pictures if i.get_property("naturalWidth") > 0]


@pytest.mark.slow
def test_a_picture_through_the_page(window, page, tmp_path):
    from gradio_page import photo

    window.get(page)
    upload(window, photo(tmp_path / "cup.png"))
    assert not button(window, "Download everything").is_enabled()
    window.execute_script(
        "window.bars = []; new MutationObserver(() => { for (const bar of document.querySelectorAll('progress'))"
        "window.bars.push(bar.parentElement.textContent.trim() + ' ' + bar.value + '/' + bar.max) })"
        ".observe(document.body, {subtree: true, childList: true, attributes: true, characterData: true})"
    )
    button(window, "Make it turn").click()
    until(window, lambda: loaded(window, "orbit"))
    until(window, lambda: re.search(r"^Done$", window.find_element(By.TAG_NAME, "body").text, re.MULTILINE))
    bars = window.execute_script("return window.bars")
    assert {bar.split()[0] for bar in bars} >= {"fit", "texture"}, bars
    canvas = until(window, lambda: next(iter(window.find_elements(By.TAG_NAME, "canvas")), None))
    until(window, lambda: (np.ptp(pixels(canvas), axis=-1) > 60).mean() > 0.05)  # the mesh is red and blue
    button(window, "Download everything").click()
    archive = until(window, lambda: next(window.downloads.glob("*.zip"), None))
    with zipfile.ZipFile(archive) as files:
        assert files.testzip() is None
        assert {"mesh.glb", "report.html", "images/0000.png"} <= set(files.namelist())
    assert [c for c in complaints(window) if "WebGPU" not in c] == []  # the viewer tries that first


def test_an_empty_picture_on_the_page(window, page, tmp_path):
    from gradio_page import photo

    window.get(page)
    upload(window, photo(tmp_path / "empty.png", object_there=False))
    button(window, "Make it turn").click()
    until(window, lambda: "no object" in window.find_element(By.TAG_NAME, "body").text)
    assert not button(window, "Download everything").is_enabled()
