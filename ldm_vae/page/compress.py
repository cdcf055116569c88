"""The tab *Compress*: an image, its compressed file, and JPEG and AVIF of as many bytes; or what a file holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from ldm_vae.codec.bitstream import EXTENSION
from ldm_vae.codec.others import best_within, pillow_codec
from ldm_vae.codec.quality import USUAL_QUALITY
from ldm_vae.commands.codec import Compress, Decompress, compress_file, decompress_file, is_compressed
from ldm_vae.commands.info import facts_in
from ldm_vae.commands.transfer import load_codec
from ldm_vae.data.images import Pixels
from ldm_vae.page.events import BUTTONS, DROP_HEIGHT, QUEUED, SLIDER, WORKERS, in_a_folder, reduced, viewed
from ldm_vae.page.flags import Page

RIVALS = {label: codec for label, name in (("JPEG", "jpeg-420"), ("AVIF", "avif-420")) if (codec := pillow_codec(name))}
COMPARED_SIDE = 768
"""Of larger images, so many pixels each way in the middle are compared: that takes seconds."""
ABOUT_SCORES = (
    "SSIMULACRA2 says how much each looks like the original: at 90 hardly anybody can tell them apart, 70 is good, "
    "50 is fair, and below 30 is poor."
)


@dataclass(frozen=True, kw_only=True)
class Rival:
    """What an encoder makes of the image, uint8 (H, W, 3), in so many bytes, and its SSIMULACRA2."""

    name: str
    pixels: Pixels
    size: int
    score: float

    @property
    def label(self) -> str:
        score = f", SSIMULACRA2 {self.score:.1f}" if np.isfinite(self.score) else ""
        return f"{self.name}: {self.size:,} bytes{score}"


def flags_of(page: Page) -> dict[str, Any]:
    """The commands' flags that the page's decide."""
    return {"model": page.model, "workers": WORKERS, "max_pixels": page.max_pixels}


def compress_upload(command: Compress) -> list[str]:
    """Writes what `ldm-vae compress` does; what is to be said of it."""
    codec, notes = command.loaded(command.workers), list[str]()
    step = codec.tables.step_at(command.quality, notes)
    note = compress_file(replace(command, quality=None, step=step))
    return [*notes, *([note] if note else [])]


def compare(codec: Any, pixels: Pixels, quality: float) -> Iterator[Rival]:
    """Ours at a quality, then the others in as many bytes; of a large image (H, W, 3), its middle."""
    from ldm_vae.metrics import ssimulacra2

    top, left = (max((n - COMPARED_SIDE) // 2, 0) for n in pixels.shape[:2])
    pixels = pixels[top : top + COMPARED_SIDE, left : left + COMPARED_SIDE]
    data = codec.compress(pixels, step=codec.tables.step_at(quality, []))
    ours = codec.decompress_picture(data).pixels
    yield Rival(name="ldm-vae", pixels=ours, size=len(data), score=ssimulacra2(pixels, ours))
    for label, rival in RIVALS.items():
        file = best_within(rival, pixels, len(data))
        theirs = rival.decode(file)
        yield Rival(name=label, pixels=theirs, size=len(file), score=ssimulacra2(pixels, theirs))


def said_of(upload: Path, file: Path, shape: tuple[int, ...], notes: list[str]) -> str:
    before, after = upload.stat().st_size, file.stat().st_size
    height, width = shape[:2]
    lines = [
        f"**{after:,} bytes**, {8 * after / (height * width):.2f} bits per pixel",
        f"{before / after:.1f} times smaller than the file you dropped, of {before:,} bytes",
        f"{width} x {height} pixels",
        *notes,
    ]
    return "\n".join(f"- {line}" for line in lines)


def facts_of(file: Path) -> str:
    facts = facts_in(str(file))
    lines = [
        f"**{facts['bytes']:,} bytes**, {facts['bits_per_pixel']:.2f} bits per pixel, quality {facts['quality']:g}",
        f"{facts['width']} x {facts['height']} pixels, {facts['channels']} channels of {facts['bits']} bits",
        f"beside the pixels: {', '.join(facts['metadata']) or 'nothing'}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def opened_file(page: Page, upload: Path, folder: Path) -> Iterator[list[Any]]:
    """Shows what a compressed file holds."""
    target = folder / f"{upload.stem}.png"
    decompress_file(Decompress(paths=(str(upload),), output=str(target), **flags_of(page)))
    yield [
        gr.update(visible=False),
        gr.update(value=reduced(viewed(target, page.max_pixels)), visible=True),
        gr.update(value=facts_of(upload)),
        gr.update(label=f"Download {target.name}", value=str(target), visible=True),
        gr.update(visible=False),
        *(gr.update(value=None) for _ in range(1 + len(RIVALS))),
    ]


def show(page: Page, folder: Path, dropped: str | None, quality: float) -> Iterator[list[Any]]:
    """The event: values of the tab's outputs, first the file's, then of the comparison."""
    if dropped is None:
        return
    upload = Path(dropped)
    if is_compressed(upload.name):
        yield from opened_file(page, upload, folder)
        return
    target, back = folder / f"{upload.stem}{EXTENSION}", folder / "back.png"
    notes = compress_upload(Compress(paths=(str(upload),), output=str(target), quality=quality, **flags_of(page)))
    decompress_file(Decompress(paths=(str(target),), output=str(back), **flags_of(page)))
    pixels, ours = (viewed(file, page.max_pixels) for file in (upload, back))
    first = [
        gr.update(value=(reduced(pixels), reduced(ours)), visible=True),
        gr.update(visible=False),
        gr.update(value=said_of(upload, target, pixels.shape, notes)),
        gr.update(label=f"Download {target.name}", value=str(target), visible=True),
        gr.update(visible=True),
    ]
    rivals = [gr.update() for _ in range(1 + len(RIVALS))]
    yield [*first, *rivals]
    for i, rival in enumerate(compare(load_codec(page.model, "cpu", WORKERS), pixels, quality)):
        rivals[i] = gr.update(value=rival.pixels, label=rival.label)
        yield [*(gr.update() for _ in first), *rivals]


def compress_tab(page: Page) -> None:
    """Its components and events. Raises ModelError, ConfigError where the codec cannot be loaded."""
    load_codec(page.model, "cpu", WORKERS)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            dropped = gr.File(label=f"Drop a photo, or a {EXTENSION} file", height=DROP_HEIGHT, elem_id="compress-drop")
            quality = gr.Slider(1, 100, value=USUAL_QUALITY, step=1, label="Quality", elem_id="compress-quality")
            facts = gr.Markdown(elem_id="compress-facts")
            download = gr.DownloadButton("Download", visible=False, variant="primary", elem_id="compress-download")
        with gr.Column(scale=3):
            slider = gr.ImageSlider(
                label="Original on the left, compressed on the right: drag the line",
                **{**SLIDER, "elem_id": "compress-slider"},
            )
            opened = gr.Image(
                label="What the file holds",
                **{"format": "png", "visible": False, "buttons": BUTTONS, "elem_id": "compress-opened"},
            )
    with gr.Column(visible=False, elem_id="compress-rivals") as comparison:
        gr.Markdown(
            f"### The same number of bytes\n{ABOUT_SCORES} Of a large photo, the middle "
            f"{COMPARED_SIDE} x {COMPARED_SIDE} pixels are compared.",
            elem_classes="quiet",
        )
        with gr.Row():
            rivals = [
                gr.Image(label=name, format="png", interactive=False, buttons=BUTTONS) for name in ("ldm-vae", *RIVALS)
            ]
    event = in_a_folder(partial(show, page))
    outputs = [slider, opened, facts, download, comparison, *rivals]
    gr.on(
        [dropped.upload, quality.release],
        event,
        inputs=[dropped, quality],
        outputs=outputs,
        trigger_mode="always_last",
        **QUEUED,
    )
    dropped.clear(
        lambda: [gr.update(value=None), gr.update(visible=False), "", *(gr.update(visible=False) for _ in range(2))],
        outputs=outputs[:5],
        api_visibility="private",
    )
