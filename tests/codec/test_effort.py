from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ldm_vae.codec import bitstream
from ldm_vae.codec.bitstream import TUNINGS
from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.contexts import nats_of, rate_slopes
from ldm_vae.codec.effort import Refiner, rounded_softly
from ldm_vae.data.images import values_of
from ldm_vae.data.sources import open_source
from ldm_vae.errors import ConfigError
from ldm_vae.metrics import psnr


def symbols_of(codec: LatentCodec, pixels: np.ndarray, step: int) -> np.ndarray:
    return codec.tables.quantise(codec.network.encode(pixels, codec.network.box_of(pixels)), step)


def test_the_length_of_a_code_is_that_of_its_payload(codec: LatentCodec, photo: np.ndarray) -> None:
    contexts = codec.tables.contexts_of(256)
    data = codec.compress(photo, step=1.0)
    part = bitstream.unpack(data).tiles[0]
    nats = nats_of(symbols_of(codec, photo, 256), contexts)
    assert 8 * (part.end - part.begin - 4) == pytest.approx(nats / math.log(2), abs=32)


def test_slopes_of_the_rate_are_what_the_last_symbol_costs_more(codec: LatentCodec, photo: np.ndarray) -> None:
    contexts = codec.tables.contexts_of(256)
    symbols = symbols_of(codec, photo, 256)
    for offset in (-0.5, 0.0, 0.5):
        values = symbols.astype(np.float32)
        values[-1, -1, -1] += np.float32(0.998 * offset)  # no other symbol's context has it
        below, here, above = (nats_of(symbols + change, contexts) for change in last_changed(symbols))
        expected = (here - below) * (0.5 - offset) + (above - here) * (0.5 + offset)
        assert rate_slopes(values, contexts)[-1, -1, -1] == pytest.approx(expected, abs=0.03)


def last_changed(symbols: np.ndarray) -> list[np.ndarray]:
    """Zeros, but for -1, 0 and 1 at the symbol that is coded last."""
    changes = [np.zeros_like(symbols) for _ in range(3)]
    for change, value in zip(changes, (-1, 0, 1), strict=True):
        change[-1, -1, -1] = value
    return changes


def test_soft_rounding_becomes_rounding_and_its_gradient_never_ends() -> None:
    values = torch.tensor([-1.2, -0.5, 0.0, 0.3, 0.7, 2.0], requires_grad=True)
    assert rounded_softly(values, 1e-3).detach() == pytest.approx(values.detach(), abs=1e-4)
    hard = rounded_softly(values, 100.0)
    assert hard.detach() == pytest.approx(torch.tensor([-1.0, -0.5, 0.0, 0.0, 1.0, 2.0]), abs=1e-4)
    hard.sum().backward()
    assert values.grad is not None
    assert values.grad.min() == pytest.approx(0.1)
    assert values.grad.max() == pytest.approx(2.0)


@pytest.mark.parametrize("tuning", ["visual", "psnr"])
def test_effort_lowers_the_sum_of_distortion_and_rate(tuning: str) -> None:
    codec = LatentCodec.from_pretrained("box:codec")
    refiner = Refiner(codec.vae, codec.tables, 128, tuning)
    pixels = open_source("procedural:dead-leaves", channels=3, resolution=128)[0].pixels
    image = values_of(pixels)
    guess = codec.network.encode(pixels, codec.network.box_of(pixels))
    target = torch.from_numpy(image)[None]
    exchange = refiner.rate_of_exchange(refiner.values_of(guess), target)

    @torch.no_grad()
    def cost(latents: np.ndarray) -> float:
        symbols = codec.tables.quantise(latents, 128)
        distortion = float(refiner.distortion(torch.from_numpy(symbols).float(), target))
        return distortion / exchange + nats_of(symbols, refiner.contexts)

    assert cost(refiner.refine(guess, image, effort=1)) < 0.985 * cost(guess)


def test_tiles_are_refined_with_what_lies_around_them() -> None:
    codec = LatentCodec.from_pretrained("box:codec")
    codec.tuning = TUNINGS.index("psnr")
    pixels = open_source("procedural:dead-leaves", channels=3, resolution=144)[0].pixels

    def psnr_at(effort: int) -> float:
        decoded = codec.decompress_picture(codec.compress(pixels, step=0.5, effort=effort)).pixels
        return float(psnr(pixels[None], decoded[None])[0])

    plain, whole = psnr_at(0), psnr_at(1)
    codec.log2_tile = 4
    assert whole > plain + 0.1
    assert psnr_at(1) == pytest.approx(whole, abs=0.05)


def test_files_of_any_effort_are_read_as_any_other_and_an_unknown_effort_is_refused(
    codec: LatentCodec, photo: np.ndarray
) -> None:
    plain, better = (codec.compress(photo, step=1.0, effort=effort) for effort in (0, 1))
    assert better != plain
    assert bitstream.unpack(better).header == bitstream.unpack(plain).header
    assert codec.decompress_picture(better).pixels.shape == photo.shape
    tiny = codec.compress(photo[:1, :1], effort=1)
    assert codec.decompress_picture(tiny).pixels.shape == (1, 1, 3)
    with pytest.raises(ConfigError, match="effort 4 cannot be: it goes from 0 to 3"):
        codec.compress(photo, effort=4)
