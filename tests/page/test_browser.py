"""The page in a real browser, Chromium: once, from the first photo to a file that is none."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm_vae.data.sources import open_source
from ldm_vae.page.command import serving
from ldm_vae.page.flags import Page
from tests.command_line import run
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
    """What one sees and does in the tab *Compress*."""

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

    def download(self, folder: Path, name: str) -> bytes:
        self.read("#compress-download", until=f"Download {name}")
        (folder / name).unlink(missing_ok=True)
        self.find("#compress-download").click()
        self.wait((folder / name).exists)  # under another name until it is whole
        return (folder / name).read_bytes()

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
