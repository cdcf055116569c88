"""Pictures that are hard on a codec: what comes back is what the encoder itself reconstructs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm_vae.codec.codec import LatentCodec
from ldm_vae.errors import LimitExceededError

Y, X = np.mgrid[:64, :72]
PICTURES = {
    "checkerboard": 255 * ((X + Y) % 2),
    "columns": 255 * (X % 2),
    "noise": np.random.default_rng(0).integers(256, size=(64, 72)),
    "black and white": 255 * np.random.default_rng(1).integers(2, size=(64, 72)),
}


def own_reconstruction(codec: LatentCodec, pixels: np.ndarray, step: float) -> np.ndarray:
    """Quantised and decoded without a file, uint8 (H, W, 3)."""
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        mean = codec.vae.encode(images).latent_dist.mean[0].double().numpy()
        centres = codec.tables.means[:, None, None]
        steps = step * np.sqrt(12) * codec.tables.sigma[:, None, None]
        latents = np.rint((mean - centres) / steps) * steps + centres
        images = codec.vae.decode(torch.from_numpy(latents)[None].float()).sample[0]
    return images.clamp(-1, 1).add(1).mul(127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)


@pytest.mark.parametrize("step", [0.25, 2.0])
@pytest.mark.parametrize("name", PICTURES)
def test_checkerboards_and_noise_come_back_as_the_encoder_reconstructs_them(
    name: str, step: float, codec: LatentCodec
) -> None:
    pixels = np.repeat(PICTURES[name][:, :, None], 3, axis=2).astype(np.uint8)
    decoded = np.asarray(codec.decompress(codec.compress(pixels, step=step)))
    difference = np.abs(decoded.astype(int) - own_reconstruction(codec, pixels, step))
    assert (difference > 1).mean() < 0.01  # a mean between two steps goes either way in float32


def test_a_line_of_32768_pixels_is_a_picture_and_one_more_is_a_line_of_error(codec: LatentCodec) -> None:
    line = np.zeros((1, 2**15, 3), np.uint8)
    assert codec.decompress(codec.compress(line, step=8)).size == (2**15, 1)
    with pytest.raises(LimitExceededError, match="32769") as refused:
        codec.compress(np.zeros((1, 2**15 + 1, 3), np.uint8))
    assert "\n" not in str(refused.value)
