"""Headless Chromium, driven by selenium: Debian's packages chromium and chromium-driver, which `make test` installs."""

import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    *("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--force-device-scale-factor=1"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",  # nothing but this machine
)
PATIENCE = 120.0  # seconds for whatever a page is to show


@contextlib.contextmanager
def browser(*flags: str, size: tuple[int, int] = (1200, 1000)) -> Iterator[webdriver.Chrome]:
    """A window of a new profile. Fails with what to install where there is no Chromium."""
    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    assert all(programs), "chromium and chromedriver: apt-get install chromium chromium-driver, or make browser"
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        downloads = str(Path(profile) / "downloads")
        options.add_experimental_option("prefs", {"download.default_directory": downloads})
        for flag in (*FLAGS, *flags, f"--user-data-dir={profile}/data", f"--window-size={size[0]},{size[1]}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
        driver.downloads = Path(downloads)
        try:
            yield driver
        finally:
            driver.quit()


def until(driver: webdriver.Chrome, condition: Callable[[], Any]) -> Any:
    """The first true value of a condition, which may stumble over elements that a page has just replaced."""
    ignored = (StaleElementReferenceException,)
    return WebDriverWait(driver, PATIENCE, 0.1, ignored).until(lambda _: condition())


def pixels(element) -> np.ndarray:
    """(H, W, 3) of an element as it is seen, in the middle of the window."""
    element.parent.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    return np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB")).astype(int)


def complaints(driver: webdriver.Chrome) -> list[str]:
    """Errors in the console since the last call."""
    return [line["message"] for line in driver.get_log("browser") if line["level"] == "SEVERE"]
