"""A denoiser of quantised latents: what the rounding took away, as far as the rest of the picture tells.

Trained on pairs of true latents x and of what the quantiser made of them, y, on the straight line between them
(Delbracio & Milanfar 2023, "Inversion by direct iteration", equations 2 and 6; a rectified flow, Liu et al. 2023,
equation 1, from y to x). No noise is added, neither in training nor here: a file and N give one picture.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ldm_vae.errors import ModelError, ModelMismatchError
from ldm_vae.models.tiling import TILE, spans
from ldm_vae.models.unet import multiple_of, predict
from ldm_vae.objectives.diffusion import NUM_TIMESTEPS

FOLDER = "refiner"
LEVELS_AN_OCTAVE = 4
"""Classes of quality that the denoiser tells apart."""
LOWEST, HIGHEST = 0.25, 8.0
NUM_LEVELS = int(LEVELS_AN_OCTAVE * math.log2(HIGHEST / LOWEST)) + 1
HALO = 16
"""Latents around a tile that its denoising sees."""


def level_of(quality: Tensor) -> Tensor:
    """The class of each quality (B,), from 0 for LOWEST and finer to NUM_LEVELS - 1 for HIGHEST and coarser."""
    return (LEVELS_AN_OCTAVE * torch.log2(quality / LOWEST)).round().long().clamp(0, NUM_LEVELS - 1)


def rounding_error(
    denoiser: Any, between: Tensor, times: Tensor, levels: Tensor, scale: tuple[Tensor, Tensor]
) -> Tensor:
    """What is to be added to y to get x, in deviations of a uniform error: (B, c, h, w), from points between the two.

    Args:
        between: (1 - t) * x + t * y.
        times: (B,) t, 1 at y.
        levels: (B,) classes of quality.
        scale: mean and deviation of each channel, (c, 1, 1): what the network sees has mean 0 and deviation 1.
    """
    scaled = (between - scale[0]) / scale[1]
    return predict(denoiser, scaled, times * NUM_TIMESTEPS, levels, multiple=multiple_of(denoiser))


class Refiner:
    """A trained denoiser of one VAE's quantised latents.

    Args:
        denoiser: its config has `vae` (fingerprint), `latents_mean` and `latents_std`.
    """

    def __init__(self, denoiser: UNet2DModel) -> None:
        self.denoiser: Any = denoiser.eval()
        config, device = denoiser.config, next(denoiser.parameters()).device
        mean, std = (torch.tensor(config[k], device=device)[:, None, None] for k in ("latents_mean", "latents_std"))
        self.scale = mean, std

    @classmethod
    def from_pretrained(cls, path: str, *, device: str | torch.device = "cpu") -> Refiner:
        """Of a run of training/train_refiner.py, or the folder `refiner` in it. Raises ModelError."""
        folder = Path(path) / FOLDER if (Path(path) / FOLDER).is_dir() else Path(path)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{path} holds no refiner: train one with training/train_refiner.py")
        try:
            return cls(UNet2DModel.from_pretrained(folder, local_files_only=True).to(device))
        except Exception as error:  # damaged files raise many kinds
            raise ModelError(f"cannot load the refiner {folder}: {type(error).__name__}: {error}") from None

    def check(self, vae: str) -> None:
        """Raises ModelMismatchError unless it was trained for the VAE with this fingerprint."""
        own = self.denoiser.config.vae
        if own != vae:
            raise ModelMismatchError(f"the refiner is for the autoencoder {own[:16]}, this one is {vae[:16]}")

    @torch.inference_mode()
    def refine(self, latents: Tensor, deviation: Tensor, quality: float, num_steps: int) -> Tensor:
        """Quantised latents (c, h, w) -> latents after so many steps towards the true ones, in tiles.

        Args:
            deviation: (c, 1, 1) of each channel's rounding error: its step / sqrt(12), 0 where nothing is coded.
        """
        refined = torch.empty_like(latents)
        device = self.scale[0].device
        deviation, levels = deviation.to(device), level_of(torch.tensor([quality], device=device))
        for top, bottom, above, below in spans(latents.shape[1], TILE, HALO):
            for left, right, before, behind in spans(latents.shape[2], TILE, HALO):
                x = latents[None, :, above:below, before:behind].to(device)
                for i in range(num_steps):
                    time = torch.tensor([1 - i / num_steps], device=device)
                    error = rounding_error(self.denoiser, x, time, levels, self.scale)
                    x = x + error * deviation / num_steps
                refined[:, top:bottom, left:right] = x[
                    0, :, top - above : bottom - above, left - before : right - before
                ]
        return refined
