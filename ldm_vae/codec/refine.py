"""A diffusion model of what the quantiser took away, given what it left: an optional last step of decoding.

For quantised latents y of true latents x, the rounding error r = (x - y) / deviation, in deviations of a uniform one,
is drawn by a rectified flow from noise e to r, with y as a condition: r_t = (1 - t) r + t e, and the network predicts
e - r (Liu et al. 2023, equation 1). It is trained on pairs of true and quantised latents (training/train_refiner.py).
From t = 1 one step gives the mean of r for this y, which is the most faithful; more steps give one of those that fit.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from ldm_vae.errors import ConfigError, ModelError, ModelMismatchError
from ldm_vae.files import write_json
from ldm_vae.models.unet import DENOISERS, multiple_of, predict
from ldm_vae.objectives.diffusion import NUM_TIMESTEPS

FOLDER = "refiner"
FACTS = "refiner.json"
LEVELS_AN_OCTAVE = 4
"""Classes of quality that the network tells apart."""
LOWEST, HIGHEST = 0.25, 8.0
NUM_LEVELS = int(LEVELS_AN_OCTAVE * math.log2(HIGHEST / LOWEST)) + 1
MOST = math.sqrt(3)
"""A rounding error in its deviations is within -MOST..MOST: half a step."""
HALO = 16
"""Latents around a tile that its refinement sees. Its normalisation sees the whole tile, so tiles differ a little."""


def make_refiner(preset: str, *, latent_channels: int, side: int) -> UNet2DModel:
    """An untrained network: noisy errors and scaled quantised latents (B, 2c, h, w) -> (B, c, h, w), 0 at first.

    Without attention: it is used on larger pictures than it was trained on.
    """
    unet = UNet2DModel(
        sample_size=side,
        in_channels=2 * latent_channels,
        out_channels=latent_channels,
        num_class_embeds=NUM_LEVELS,
        add_attention=False,
        **DENOISERS[preset],
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


def level_of(quality: Tensor) -> Tensor:
    """The class of each quality (B,), from 0 for LOWEST and finer to NUM_LEVELS - 1 for HIGHEST and coarser."""
    return (LEVELS_AN_OCTAVE * torch.log2(quality / LOWEST)).round().long().clamp(0, NUM_LEVELS - 1)


def velocity(
    network: nn.Module, noisy: Tensor, condition: Tensor, times: Tensor, quality: Tensor, *, multiple: int
) -> Tensor:
    """e - r, predicted, (B, c, h, w).

    Args:
        network: a refiner's, or its wrapper under DDP.
        noisy: r_t; condition: y, scaled to mean 0 and deviation 1 a channel. Both (B, c, h, w).
        times: (B,) in 0..1; quality: (B,).
    """
    given = torch.cat([noisy, condition], dim=1)
    return predict(network, given, times * NUM_TIMESTEPS, level_of(quality), multiple=multiple)


def noise_for(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Normal noise for the latents (c, h, w) of a picture, the same always."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a refiner was trained for: it goes with nothing else."""

    vae: str
    """Fingerprint of the VAE."""
    tables: str
    """Digest of the codec's tables."""
    latents_mean: list[float]
    latents_std: list[float]
    quality_range: tuple[float, float]


class Refiner:
    """A trained network, and what it was trained for."""

    def __init__(self, network: UNet2DModel, facts: Facts) -> None:
        self.network: Any = network.eval()
        self.facts = facts
        self.device = next(network.parameters()).device
        self.mean, self.std = (
            torch.tensor(v, device=self.device)[:, None, None] for v in (facts.latents_mean, facts.latents_std)
        )

    def save(self, folder: Path) -> None:
        """Into an existing folder."""
        self.network.save_pretrained(folder)
        write_json(folder / FACTS, asdict(self.facts))

    @classmethod
    def from_pretrained(cls, path: str, *, device: str | torch.device = "cpu") -> Refiner:
        """Of a run of training/train_refiner.py, or the folder `refiner` in it. Raises ModelError."""
        folder = Path(path) / FOLDER if (Path(path) / FOLDER).is_dir() else Path(path)
        if not (folder / FACTS).is_file():
            raise ModelError(f"{path} holds no refiner: train one with training/train_refiner.py")
        try:
            facts = Facts(**json.loads((folder / FACTS).read_text()))
            network = UNet2DModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            return cls(network.to(device), facts)
        except Exception as error:  # damaged files raise many kinds
            raise ModelError(f"cannot load the refiner {folder}: {type(error).__name__}: {error}") from None

    def check(self, *, vae: str, tables: str) -> None:
        """Raises ModelMismatchError unless it was trained for this VAE and these tables."""
        for name, own, found in (("autoencoder", self.facts.vae, vae), ("tables", self.facts.tables, tables)):
            if own != found:
                raise ModelMismatchError(f"the refiner was trained for the {name} {own[:16]}, this is {found[:16]}")

    @torch.inference_mode()
    def refine(self, latents: Tensor, deviation: Tensor, quality: float, num_steps: int, *, noise: Tensor) -> Tensor:
        """Quantised latents (c, h, w) -> latents whose error was drawn in so many Euler steps.

        Args:
            deviation: (c, 1, 1) of each channel's rounding error: its step / sqrt(12), 0 where nothing is coded.
            noise: normal (c, h, w). A picture depends on it at one step by the network's own error alone. For a tile
                it is cut from that of the whole picture (`noise_for`), so that tiles agree where they meet.

        Raises:
            ConfigError: a quality that it was not trained for.
        """
        low, high = self.facts.quality_range
        if not low / 1.1 <= quality <= high * 1.1:
            raise ConfigError(f"the refiner was trained for qualities {low:g} to {high:g}, the file has {quality:g}")
        condition = ((latents.to(self.device) - self.mean) / self.std)[None]
        coded = (deviation > 0).to(self.device, condition.dtype)
        r = (noise.to(self.device) * coded)[None]
        given = torch.tensor([quality], device=self.device)
        for i in range(num_steps):
            time = torch.tensor([1 - i / num_steps], device=self.device)
            r = (
                r
                - coded
                * velocity(self.network, r, condition, time, given, multiple=multiple_of(self.network))
                / num_steps
            )
        return latents + r[0].clamp(-MOST, MOST).to(latents.device) * deviation
