"""The loss of a step, against its formula written out, from a cache and from the images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_vae.data.conversion import to_images
from ldm_vae.data.images import centre_square
from ldm_vae.data.loader import with_tensors
from ldm_vae.data.order import Stream, generator_at, index_at
from ldm_vae.data.sources import open_source
from ldm_vae.latents.rows import DiffusionRows, Squares, collate_rows
from ldm_vae.latents.scaling import as_stored, put_statistics
from ldm_vae.latents.statistics import Statistics
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.unet import make_denoiser
from ldm_vae.objectives.denoising import (
    VALIDATION_TIMES,
    DenoiserConfig,
    denoising_losses,
    scaled_latents_of,
    validation_batches,
)


def rows_for(photos: Path, **changes: object) -> DiffusionRows:
    keywords = {"seed": 5, "prediction": "flow", "latent_shape": (4, 4, 4), "label_of": (0, 1)}
    keywords |= {"label_dropout": 0.0, "flip": True} | changes
    return DiffusionRows(Squares(open_source(str(photos)), 32), **keywords)


def measured_vae() -> PatchAutoencoderKL:
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(block_out_channels=(8, 8)).eval()
    put_statistics(vae, Statistics(count=1, mean=np.full(4, 0.3), squares=np.full(4, 0.25)))
    return vae


def test_the_loss_is_that_of_rectified_flow_written_out(photos: Path) -> None:
    rows, vae = rows_for(photos), measured_vae()
    unet = make_denoiser("demo", latent_channels=4, sample_size=(4, 4), num_classes=2).eval()
    batch = with_tensors(collate_rows([rows[position] for position in (20, 3)]))
    with torch.no_grad():
        scaled = scaled_latents_of(batch, vae)
        losses = denoising_losses(unet, scaled, batch, DenoiserConfig(seed=5), unet)
    source = open_source(str(photos))
    for i, position in enumerate((20, 3)):
        sample = source[index_at(position, size=12, seed=5)]
        image = to_images(centre_square(sample.pixels, 32))[None]
        if generator_at(5, position, Stream.FLIP).random() < 0.5:
            image = image.flip(-1)
        t = 1 / (1 + np.exp(-generator_at(5, position, Stream.TIME).standard_normal()))
        noise, drawn = (
            torch.from_numpy(generator_at(5, position, s).standard_normal((1, 4, 4, 4), dtype=np.float32))
            for s in (Stream.NOISE, Stream.POSTERIOR)
        )
        with torch.no_grad():
            mean, logvar = as_stored(vae.encode(image).latent_dist.parameters).chunk(2, dim=1)
            latents = (mean + (logvar / 2).exp() * drawn - 0.3) / 0.5
            noisy = (1 - t) * latents + t * noise
            output = unet(noisy.float(), torch.tensor([1000 * t]), class_labels=torch.tensor([sample.label])).sample
            expected = (output - (noise - latents)).square().mean().item()
        assert losses[i].item() == pytest.approx(expected, rel=1e-4)


def test_a_row_does_not_depend_on_its_batch(photos: Path) -> None:
    rows = rows_for(photos, label_dropout=0.3)
    together, alone = collate_rows([rows[p] for p in range(8)]), collate_rows([rows[5]])
    for name in ("inputs", "labels", "timesteps", "noise", "posterior_noise"):
        assert np.array_equal(getattr(together, name)[5], getattr(alone, name)[0])


def test_labels_are_dropped_as_often_as_asked_for(photos: Path) -> None:
    rows = rows_for(photos, label_dropout=0.25)
    labels = [collate_rows([rows[p]]).labels.item() for p in range(400)]
    assert labels.count(2) / 400 == pytest.approx(0.25, abs=0.06)
    assert set(collate_rows([rows_for(photos)[p] for p in range(12)]).labels) == {0, 1}
    flat = Squares(open_source("procedural:dead-leaves", resolution=32), 32)
    unlabelled = DiffusionRows(
        flat, seed=0, prediction="v", latent_shape=(4, 4, 4), label_of=(), label_dropout=1.0, flip=False
    )
    assert set(collate_rows([unlabelled[p] for p in range(4)]).labels) == {0}


def test_validation_has_the_same_images_and_noise_in_batches_of_any_size(photos: Path) -> None:
    rows = rows_for(photos, label_dropout=1.0)
    (whole,), parts = validation_batches(rows, 64), validation_batches(rows, 5)
    assert [len(b) for b in parts] == [5, 5, 2]
    for name in ("inputs", "noise", "posterior_noise", "labels"):
        assert torch.equal(torch.cat([getattr(b, name) for b in parts]), getattr(whole, name))
    assert set(whole.labels.tolist()) == {0, 1}  # none is dropped
    assert VALIDATION_TIMES == (0.0625, 0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375)


def test_min_snr_weighs_each_image(photos: Path) -> None:
    rows, vae = rows_for(photos), measured_vae()
    unet = make_denoiser("demo", latent_channels=4, sample_size=(4, 4), num_classes=2).eval()
    batch = with_tensors(collate_rows([rows[position] for position in range(3)]))
    batch = replace(batch, timesteps=torch.tensor([100.0, 500.0, 900.0]))
    with torch.no_grad():
        scaled = scaled_latents_of(batch, vae)
        plain, weighted = (
            denoising_losses(unet, scaled, batch, DenoiserConfig(min_snr_gamma=g), unet) for g in (None, 5.0)
        )
    t = np.array([0.1, 0.5, 0.9])
    snr = ((1 - t) / t) ** 2
    assert (weighted / plain).tolist() == pytest.approx(np.minimum(np.maximum(snr, 0.05), 5) * t**2, rel=1e-4)
