"""The tabs *Autoencode* and *Denoise*: an image through an autoencoder and back, or without its noise."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ldm_vae.commands.denoise import Denoise, denoise_file
from ldm_vae.commands.reconstruct import Reconstruct, load_vae, reconstruct_file
from ldm_vae.data.images import Pixels
from ldm_vae.errors import ConfigError
from ldm_vae.hub import is_hub_id
from ldm_vae.page.events import DROP_HEIGHT, QUEUED, SLIDER, in_a_folder, reduced, viewed
from ldm_vae.page.flags import Page

THROUGH_PIXELS = 1 << 20
"""Larger images are reduced to so many before they go through an autoencoder: some take a kilobyte for each."""
EXAMPLE = "stabilityai/sd-vae-ft-mse"


def check_name(name: str, *, local: bool) -> None:
    """Raises ConfigError for no name, or for a folder of this machine that not just its own users would reach."""
    if not name:
        raise ConfigError(f"name an autoencoder, such as {EXAMPLE}")
    if not (local or is_hub_id(name) or name.startswith("box:")):
        raise ConfigError(f"{name} is no name on the Hugging Face hub, such as {EXAMPLE}")


def through(command: Reconstruct, max_pixels: int) -> tuple[Pixels, Pixels]:
    """An autoencoder's input and output, uint8 (H, W, 3): the command is `ldm-vae reconstruct`."""
    reconstruct_file(command)
    before, after = (viewed(Path(file), max_pixels) for file in (command.input, command.output))
    return before, after


def said_of(name: str, before: Pixels, after: Pixels) -> str:
    """How large its latents are, and how near it comes."""
    from ldm_vae.metrics import psnr, ssimulacra2
    from ldm_vae.models.interface import latent_channels_of, stride_of

    vae = load_vae(name, "cpu", False)
    height, width = (-(-n // stride_of(vae)) for n in before.shape[:2])
    numbers = latent_channels_of(vae) * height * width
    return (
        f"**{name}**: {latent_channels_of(vae)} x {height} x {width} latents, {before.size / numbers:.0f} values of "
        f"the image for each; PSNR {psnr(before[None], after[None])[0]:.2f} dB, SSIMULACRA2 "
        f"{ssimulacra2(before, after):.1f}"
    )


def autoencode(page: Page, folder: Path, dropped: str | None, name: str) -> Iterator[list[Any]]:
    """The event: a slider and a line for ours, where there is one, and for the named autoencoder."""
    if dropped is None:
        raise ConfigError("drop an image first")
    name = name.strip()
    check_name(name, local=page.is_local)
    source = folder / "image.png"
    Image.fromarray(reduced(viewed(Path(dropped), page.max_pixels), THROUGH_PIXELS)).save(source)
    shown: list[Any] = []
    for i, model in enumerate(dict.fromkeys([*ours(page), name])):
        command = Reconstruct(paths=(str(source),), output=str(folder / f"{i}.png"), model=model, workers=1)
        before, after = through(command, page.max_pixels)
        shown += [gr.update(value=(before, after), label=slider_label(model)), said_of(model, before, after)]
        yield shown + [gr.update(value=None)] * (2 * len([*ours(page), name]) - len(shown))


def ours(page: Page) -> list[str]:
    return [page.autoencode] if page.autoencode else []


def slider_label(model: str) -> str:
    return f"Image on the left, {model} on the right: drag the line"


def autoencode_tab(page: Page) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            dropped = gr.File(label="Drop an image", height=DROP_HEIGHT, elem_id="autoencode-drop")
        with gr.Column(scale=3):
            name = gr.Textbox(
                label="Autoencoder",
                value=EXAMPLE,
                info="Of diffusers: a name on the Hugging Face hub, which is downloaded when you press the button"
                + (", or a folder of this machine." if page.is_local else "."),
                elem_id="autoencode-name",
            )
            go = gr.Button("Encode and decode", variant="primary", elem_id="autoencode-go")
    with gr.Row():
        outputs: list[Any] = []
        for model in (*ours(page), "the autoencoder that you name"):
            with gr.Column():
                outputs.append(gr.ImageSlider(label=slider_label(model), **SLIDER))
                outputs.append(gr.Markdown())
    go.click(in_a_folder(partial(autoencode, page)), inputs=[dropped, name], outputs=outputs, **QUEUED)


def denoise(model: str, max_pixels: int, folder: Path, dropped: str | None, sigma: float | None) -> Iterator[list[Any]]:
    """The event: `ldm-vae denoise`."""
    if dropped is None:
        return
    upload = Path(dropped)
    target = folder / f"{upload.stem}.denoised.png"
    command = Denoise(paths=(dropped,), output=str(target), model=model, sigma=sigma, workers=1, max_pixels=max_pixels)
    command = command.for_model(command.loaded(1))
    note = denoise_file(command)
    before, after = (reduced(viewed(file, max_pixels)) for file in (upload, target))
    yield [
        gr.update(value=(before, after)),
        gr.update(label=f"Download {target.name}", value=str(target), visible=True),
        note or "",
    ]


def denoise_tab(model: str, max_pixels: int) -> None:
    """Its components and events. Raises ModelError where the denoiser cannot be loaded."""
    most = load_vae(model, "cpu", False).config.get("noise_level")
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            dropped = gr.File(label="Drop a noisy photo", height=DROP_HEIGHT, elem_id="denoise-drop")
            sigma = gr.Number(
                label="Noise",
                info=f"Its standard deviation, 0 to {most or 0:g} of 255; empty: the network goes by what it sees.",
                value=None,
                visible=most is not None,
            )
            note = gr.Markdown()
            download = gr.DownloadButton("Download", visible=False, variant="primary", elem_id="denoise-download")
        with gr.Column(scale=3):
            slider = gr.ImageSlider(
                label="Your photo on the left, without noise on the right: drag the line",
                **{**SLIDER, "elem_id": "denoise-slider"},
            )
    gr.on(
        [dropped.upload, sigma.submit],
        in_a_folder(partial(denoise, model, max_pixels)),
        inputs=[dropped, sigma],
        outputs=[slider, download, note],
        **QUEUED,
    )
