"""The page in a real browser, Chromium: from the first photo to a file that is none, and with a brush."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image, ImageColor

from ldm_vae.data.sources import open_source
from ldm_vae.page.command import serving
from ldm_vae.page.flags import Page
from tests.command_line import run
from tests.pipelines.test_generate import save_pipeline
from tests.processes import free_port

pytest.importorskip("gradio", reason="Gradio is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")

BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
FLAGS = (
    *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
    *("disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1200,900"),
)
SECONDS = 120
"""A busy machine is slow."""

pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="there is no Chromium: apt-get install chromium chromium-driver"
)


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Any]:
    """With its downloads in tmp_path/downloads, and a log of what it asks the network for."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.add_argument("about:blank")  # a new tab's page would load long
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


class Visitor:
    """What one sees and does."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def find(self, selector: str) -> Any:
        return self.wait(lambda: self.browser.find_elements("css selector", selector))[0]

    def wait(self, condition: Callable[[], Any]) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.browser, SECONDS, 0.05, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(lambda _: condition())

    def read(self, selector: str, *, until: str) -> str:
        """The text of an element, once `until` is in it."""
        return str(self.wait(lambda: until in self.find(selector).text and self.find(selector).text))

    def drop(self, file: Path) -> None:
        if self.browser.find_elements("css selector", "#compress-drop button[aria-label='Clear']"):
            self.find("#compress-drop button[aria-label='Clear']").click()
        self.find("#compress-drop input[type=file]").send_keys(str(file))

    def press(self, selector: str, text: str) -> None:
        """The element that says so."""
        self.wait(lambda: [e for e in self.browser.find_elements("css selector", selector) if text in e.text])[
            0
        ].click()

    def download(self, folder: Path, name: str) -> bytes:
        self.read("#compress-download", until=f"Download {name}")
        (folder / name).unlink(missing_ok=True)
        self.find("#compress-download").click()
        self.wait((folder / name).exists)  # under another name until it is whole
        return (folder / name).read_bytes()

    def painted(self) -> bool:
        """Paints from the left to the middle of the image that is to be painted on; whether its paint is to be seen."""
        from ldm_vae.page.generate import PAINT

        canvas = self.find("#generate-editor canvas")
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        actions = webdriver.ActionChains(self.browser).move_to_element_with_offset(canvas, -150, 0)
        actions.click_and_hold().move_by_offset(60, 0).move_by_offset(30, 10).release().perform()
        seen = np.asarray(Image.open(io.BytesIO(self.find("#generate-editor").screenshot_as_png)).convert("RGB"))
        return int((seen == ImageColor.getrgb(PAINT)).all(axis=2).sum()) > 1000

    def shown(self, selector: str) -> list[str]:
        """The addresses of a gallery's images."""
        images = self.browser.find_elements("css selector", f"{selector} .grid-container img")
        return [str(image.get_attribute("src")) for image in images]

    def divider(self) -> float:
        """How far to the right it is, in pixels."""
        return float(self.find("#compress-slider [data-testid=slider]").rect["x"])

    def drag_divider(self, pixels: int) -> None:
        actions = webdriver.ActionChains(self.browser, duration=0)
        actions.drag_and_drop_by_offset(self.find("#compress-slider [data-testid=slider]"), pixels, 0).perform()

    def slide_quality(self) -> int:
        """To about a third of the slider; what it then says."""
        bar = self.find("#compress-quality input[type=range]")
        actions = webdriver.ActionChains(self.browser, duration=0)
        actions.move_to_element_with_offset(bar, -bar.size["width"] // 6, 0).click().perform()
        return int(self.find("#compress-quality input[type=number]").get_attribute("value"))

    def asked_for(self) -> set[str]:
        """Addresses that the browser has asked the network for."""
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        urls = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
        return {url for url in urls if url.startswith(("http", "ws"))}


def test_a_visitor_drops_a_photo_drags_downloads_and_opens_the_file_again(
    chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    downloads, photo, text = tmp_path / "downloads", tmp_path / "photo.png", tmp_path / "text.png"
    Image.fromarray(open_source("procedural:dead-leaves", resolution=64)[0].pixels[:48]).save(photo)
    text.write_text("a letter, not an image\n")
    with serving(Page(port=free_port())) as address:
        temporary = Path(tempfile.gettempdir())
        visitor = Visitor(chromium)
        chromium.get(address)
        visitor.drop(photo)

        visitor.read("#compress-rivals", until="AVIF: ")  # all is done
        data = visitor.download(downloads, "photo.ldi")
        run("compress", photo, tmp_path / "own.ldi")
        assert data == (tmp_path / "own.ldi").read_bytes()
        visitor.read("#compress-facts", until=f"{len(data):,} bytes")

        before = visitor.divider()
        visitor.drag_divider(-100)
        assert visitor.divider() == pytest.approx(before - 100, abs=3)

        quality = visitor.slide_quality()
        assert 20 < quality < 50
        visitor.wait(lambda: f"{len(data):,} bytes" not in visitor.find("#compress-facts").text)
        run("compress", photo, tmp_path / "own.ldi", "--quality", quality, "--overwrite")
        smaller = visitor.download(downloads, "photo.ldi")
        assert smaller == (tmp_path / "own.ldi").read_bytes()
        assert len(smaller) < len(data)

        visitor.drop(tmp_path / "own.ldi")
        visitor.read("#compress-facts", until=f"quality {quality}")
        png = visitor.download(downloads, "own.png")
        run("decompress", tmp_path / "own.ldi", tmp_path / "again.png")
        assert png == (tmp_path / "again.png").read_bytes()

        visitor.drop(text)
        visitor.read(".toast-body", until="Cannot be decoded: cannot identify image file.")
        assert all(url.startswith(address) for url in visitor.asked_for())
        assert any(temporary.iterdir())
    assert not temporary.exists()
    assert {"downloads", "photo.png", "text.png", "profile"} >= set(os.listdir()) - {"own.ldi", "again.png"}


def test_a_visitor_paints_over_a_part_of_a_photo_and_only_this_part_is_made_anew(
    chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photo = tmp_path / "photo.png"
    Image.fromarray(open_source("procedural:dead-leaves", resolution=64)[0].pixels[:48]).save(photo)
    model = save_pipeline(tmp_path / "model", classes=("daisies", "roses"))
    with serving(Page(port=free_port(), generate=model)) as address:
        visitor = Visitor(chromium)
        chromium.get(address)
        visitor.press("button[role=tab]", "Generate")
        visitor.press("button", "Start from an image instead of noise")
        visitor.find("#generate-drop input[type=file]").send_keys(str(photo))
        visitor.wait(visitor.painted)
        visitor.find("#generate-go").click()
        visitor.wait(lambda: len(visitor.shown("#generate-out")) == 4)
        images = [np.asarray(Image.open(io.BytesIO(urlopen(url).read()))) for url in visitor.shown("#generate-out")]
    differing = np.any([image != images[0] for image in images], axis=(0, 3))
    rows, columns = np.nonzero(differing)
    height, width = differing.shape
    assert len(rows) > 3
    assert columns.max() < 0.55 * width, "the stroke ends left of the middle"
    assert rows.min() > 0.25 * height
    assert rows.max() < 0.75 * height
