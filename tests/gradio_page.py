"""The page of `sv3d-fast ui` in miniature, served for tests that call it and for those that look at it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from small_run import SMALL, quick_fit


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Its address, until the block ends. folder: for gradio's files."""
    from sv3d_fast.frontends.gradio import make_page, open_page

    with pytest.MonkeyPatch.context() as patch, quick_fit():
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        page = make_page(**SMALL)
        yield open_page(page, host=None, port=None, wait=False)
        page.close()


def photo(path: Path, *, object_there: bool = True) -> Path:
    """A picture of 96 x 96 pixels with a coloured disc, or with nothing."""
    image = Image.new("RGBA", (96, 96))
    if object_there:
        pen = ImageDraw.Draw(image)
        pen.ellipse((24, 18, 72, 78), fill=(200, 60, 40, 255))
        pen.rectangle((34, 40, 62, 56), fill=(40, 80, 200, 255))
    image.save(path)
    return path
