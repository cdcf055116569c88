"""The tab *Generate*: images from noise, from an image, or into the painted part of an image."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from diffusers.utils import logging
from PIL import Image

from ldm_vae.commands.jobs import GenerateConfig, jobs_of
from ldm_vae.commands.seeds import batches_of, images_of_jobs, open_pipeline, open_starts
from ldm_vae.data.images import Pixels, resize
from ldm_vae.models.interface import channels_of, stride_of
from ldm_vae.models.reconstruction import exact_float32
from ldm_vae.page.events import BUTTONS, DROP_HEIGHT, QUEUED, in_a_folder, size_of_area, viewed

ALL_CLASSES = "all in turn"
EDITED_SIDE = 512
"""About so many pixels each way are painted on; the model's own size may be too small for a brush."""
MOST_IMAGES, MOST_STEPS, MOST_GUIDANCE = 8, 100, 8
PAINT = "#ff2bd6"


def training_side(pipeline: Any) -> int:
    """In pixels: the root of the area that the denoiser was trained on."""
    height, width = pipeline.latent_size(None, None, None)
    return round((height * width) ** 0.5 * stride_of(pipeline.vae))


def painted(layers: list[Pixels]) -> np.ndarray | None:
    """What was painted, bool (H, W), of an editor's RGBA layers; None for nothing."""
    mask = np.any([layer[:, :, 3] > 0 for layer in layers], axis=0) if layers else np.zeros(1)
    return mask if mask.any() else None


def write_start(edited: dict[str, Any] | None, folder: Path, side: int) -> tuple[str | None, Path | None]:
    """An editor's image, and the mask where something is painted, as files of the size that the model works at."""
    if edited is None or edited["background"] is None:
        return None, None
    background = np.ascontiguousarray(edited["background"][:, :, :3])
    height, width = size_of_area(background, side**2)
    file, mask_file = folder / "start.png", folder / "mask.png"
    Image.fromarray(resize(background, (height, width))).save(file)
    mask = painted(edited["layers"])
    if mask is None:
        return str(file), None
    Image.fromarray(mask).resize((width, height)).save(mask_file)
    return str(file), mask_file


def generate(pipeline: Any, config: GenerateConfig) -> list[Pixels]:
    """The images, uint8 (H, W, C), that `ldm-vae generate` makes."""
    config.check()
    starts = open_starts(config, channels_of(pipeline.vae))
    mask = None if config.mask is None else Image.open(config.mask)
    jobs = list(jobs_of(config, pipeline, starts, {}).values())
    [(batch, images)] = batches_of(jobs, starts, len(jobs), {})
    return list(images_of_jobs(pipeline, batch, images, mask, config))


def show(
    pipeline: Any,
    model: str,
    folder: Path,
    label: str | None,
    seed: float,
    count: int,
    steps: int,
    guidance: float,
    edited: dict[str, Any] | None,
    strength: float,
) -> Iterator[Any]:
    """The event: a gallery."""
    image, mask = write_start(edited, folder, training_side(pipeline))
    config = GenerateConfig(
        model=model,
        output=folder,
        num_images=int(count),
        class_label=() if label in (None, ALL_CLASSES) else (str(label),),
        guidance_scale=guidance,
        steps=int(steps),
        seed=int(seed or 0),
        image=image,
        mask=mask,
        strength=strength,
    )
    found = generate(pipeline, config)
    yield [
        (pixels[:, :, 0] if pixels.shape[2] == 1 else pixels, f"seed {config.seed + i}")
        for i, pixels in enumerate(found)
    ]


def start_from(max_pixels: int, folder: Path, dropped: str | None) -> Iterator[Any]:
    """The event: the dropped image, to be painted on."""
    if dropped is None:
        return
    pixels = viewed(Path(dropped), max_pixels)
    pixels = resize(pixels, size_of_area(pixels, EDITED_SIDE**2))
    yield gr.update(value={"background": pixels, "layers": [], "composite": None}, visible=True)


def class_choices(pipeline: Any) -> list[str]:
    """Names of classes, or their numbers; none for an unconditional model."""
    return list(pipeline.config.class_names or map(str, range(pipeline.num_classes)))


def generate_tab(model: str, max_pixels: int) -> None:
    """Its components and events. Raises ModelError where the pipeline cannot be loaded."""
    exact_float32()
    logging.disable_progress_bar()
    pipeline = open_pipeline(GenerateConfig(model=model, output=Path(), num_images=1))
    choices = class_choices(pipeline)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            label = gr.Dropdown([ALL_CLASSES, *choices], label="Class", visible=bool(choices), elem_id="generate-class")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            count = gr.Slider(1, MOST_IMAGES, value=4, step=1, label="Images")
            steps = gr.Slider(1, MOST_STEPS, value=20, step=1, label="Steps", info="More take longer.")
            guidance = gr.Slider(
                1, MOST_GUIDANCE, value=2, step=0.5, label="Guidance", info="More: truer to the class, and less varied."
            )
            go = gr.Button("Generate", variant="primary", elem_id="generate-go")
        with gr.Column(scale=3):
            gallery = gr.Gallery(
                label="Images",
                **{"columns": 4, "format": "png", "interactive": False, "buttons": BUTTONS, "height": "auto"},
                elem_id="generate-out",
            )
    with gr.Accordion("Start from an image instead of noise", open=False), gr.Row():
        with gr.Column(scale=1, min_width=300):
            dropped = gr.File(label="Drop an image", height=DROP_HEIGHT, elem_id="generate-drop")
            strength = gr.Slider(0, 1, value=0.6, step=0.05, label="Change", info="0 keeps the image, 1 ignores it.")
            gr.Markdown("Paint over a part, and only this part is made anew. Then press *Generate*.")
        with gr.Column(scale=3):
            editor = gr.ImageEditor(
                label="Paint over what is to be made anew",
                **{"sources": (), "transforms": (), "layers": False, "format": "png", "buttons": ["fullscreen"]},
                visible=False,
                brush=gr.Brush(colors=[PAINT], color_mode="fixed", default_size=40),
                elem_id="generate-editor",
            )
    dropped.upload(in_a_folder(partial(start_from, max_pixels)), inputs=[dropped], outputs=[editor], **QUEUED)
    dropped.clear(lambda: gr.update(value=None, visible=False), outputs=[editor], api_visibility="private")
    go.click(
        in_a_folder(partial(show, pipeline, model)),
        inputs=[label, seed, count, steps, guidance, editor, strength],
        outputs=[gallery],
        **QUEUED,
    )
