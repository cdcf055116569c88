"""What a codec knows beside its VAE: deviations, channels, and the contexts of each step. Saved with the model.

`codec/config.json` and `codec/tables.safetensors`. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ldm_vae.codec.contexts import INT32, Contexts
from ldm_vae.codec.loops import Integers
from ldm_vae.codec.quality import quality_of_step, step_of_quality
from ldm_vae.errors import ConfigError, ModelError
from ldm_vae.files import write_json

STEP_ONE = 256
"""Step 1 in a file: steps are fixed-point numbers with 8 bits behind the point."""
FORMAT_VERSION = 2
TYPES = {"taps": np.int8, "weights": np.int16, "roots": np.int32, "nodes": np.int32, "frequencies": np.uint16}
"""The fields of `Contexts`."""
FARTHEST = 8
"""A step by so much finer or coarser than any that tables were fitted at is a mistake."""
Floats = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The codec's own parameters.

    Attributes:
        vae: fingerprint of the VAE that they were fitted for.
        sigma: (c,) for every latent channel, the root-mean-square posterior deviation over a data set.
        means: (c,) what stands for the symbol 0 of each channel; a channel that is not coded is that everywhere.
        channels: (C,) the latent channels that are coded, in the order of coding.
        steps: ascending fixed-point steps that contexts were fitted at.
        contexts: those, one each.
    """

    vae: str
    sigma: Floats
    means: Floats
    channels: tuple[int, ...]
    steps: tuple[int, ...]
    contexts: tuple[Contexts, ...]

    def channel_steps(self, step: int) -> Floats:
        """The quantiser's step of each coded channel (C,) in float64: step * sqrt(12) * sigma.

        Uniform noise of that width has step^2 times the variance that the decoder met in training.
        """
        steps: Floats = step / STEP_ONE * math.sqrt(12) * self.sigma[list(self.channels)]
        return steps

    def quantise(self, latents: Floats, step: int) -> Integers:
        """float (c, h, w) -> int32 symbols (C, h, w) of the coded channels: the nearest multiple of each one's step.

        Raises:
            ModelError: latents that are not finite.
        """
        steps = self.channel_steps(step)
        symbols = np.empty((len(steps), *latents.shape[1:]), np.int32)
        for i, c in enumerate(self.channels):
            exact = np.rint((latents[c].astype(np.float64) - self.means[c]) / steps[i])
            if not np.isfinite(exact).all():
                raise ModelError("the autoencoder's latents are not finite")
            symbols[i] = np.clip(exact, *INT32)
        return symbols

    def dequantise(self, symbols: Integers, step: int) -> Floats:
        """Back to float32 latents (c, h, w); a channel that is not coded is its mean everywhere."""
        steps = self.channel_steps(step)
        latents = np.empty((len(self.means), *symbols.shape[1:]), np.float32)
        latents[:] = self.means[:, None, None]
        for i, c in enumerate(self.channels):
            latents[c] = self.means[c] + symbols[i] * steps[i]
        return latents

    def fixed_step(self, step: float) -> int:
        """As files hold it. Raises ConfigError for one far from those that the tables were fitted at."""
        fixed = fixed_point(step)
        low, high = self.steps[0], self.steps[-1]
        if not low / FARTHEST <= fixed <= high * FARTHEST:
            raise ConfigError(
                f"step {step:g} is far from those that this model's tables were fitted at, {low / STEP_ONE:g} to "
                f"{high / STEP_ONE:g}: more is coarser"
            )
        return fixed

    def step_at(self, quality: float, notes: list[str]) -> float:
        """The step of a quality, 1 to 100, or with a note the nearest that the tables were fitted at.

        Raises:
            ConfigError: another quality.
        """
        wanted, finest, coarsest = step_of_quality(quality), self.steps[0] / STEP_ONE, self.steps[-1] / STEP_ONE
        nearest = min(max(wanted, finest), coarsest)
        if nearest != wanted:
            which = "finest" if nearest == finest else "coarsest"
            notes.append(
                f"quality {quality:g} is out of this model's reach: its {which}, step {nearest:.3g} "
                f"(quality {quality_of_step(nearest):.0f}), is used"
            )
        return nearest

    def contexts_of(self, step: int) -> Contexts:
        """Those fitted at the nearest step by ratio; of two equally near, the lower."""
        distance = [max(step, fitted) * STEP_ONE // min(step, fitted) for fitted in self.steps]
        return self.contexts[distance.index(min(distance))]

    @cached_property
    def digest(self) -> bytes:
        """The sha256 of all of them, as docs/file-format.md has it: that of the model."""
        sha = hashlib.sha256(bytes.fromhex(self.vae))
        sha.update(np.array(self.channels, "<i4").tobytes())
        for values in (self.sigma, self.means):
            sha.update(values.astype("<f8").tobytes())
        arrays = self.arrays()
        for step in self.steps:
            sha.update(np.array([step], "<i4").tobytes())
            for name in TYPES:
                array = arrays[f"{step}.{name}"]
                sha.update(np.array(array.shape, "<i4").tobytes())
                sha.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return sha.digest()

    def arrays(self) -> dict[str, Integers]:
        return {
            f"{step}.{name}": np.ascontiguousarray(getattr(contexts, name))
            for step, contexts in zip(self.steps, self.contexts, strict=True)
            for name in TYPES
        }

    def save(self, folder: Path) -> None:
        """Writes config.json and tables.safetensors into an existing folder."""
        config = {
            "format_version": FORMAT_VERSION,
            "vae": self.vae,
            "sigma": self.sigma.tolist(),
            "means": self.means.tolist(),
            "channels": list(self.channels),
            "qualities": list(self.steps),  # the name that steps had when the format began
            "digest": self.digest.hex(),
        }
        save_file(self.arrays(), folder / "tables.safetensors")
        write_json(folder / "config.json", config)


def load_tables(folder: Path) -> Tables:
    """What `save` wrote. Raises ModelError for a folder without it, a damaged one, or one of a later version."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no tables: make them with `ldm-vae fit-codec`")
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["format_version"] != FORMAT_VERSION:
            raise ModelError(
                f"{folder} has tables of version {config['format_version']}, and this ldm-vae reads version "
                f"{FORMAT_VERSION}: make them anew with `ldm-vae fit-codec`"
            )
        arrays = load_file(folder / "tables.safetensors")
        tables = Tables(
            vae=config["vae"],
            sigma=np.array(config["sigma"], np.float64),
            means=np.array(config["means"], np.float64),
            channels=tuple(config["channels"]),
            steps=tuple(config["qualities"]),
            contexts=tuple(contexts_from(arrays, step) for step in config["qualities"]),
        )
        check_tables(tables)
        if tables.digest.hex() != config["digest"]:
            raise ModelError(f"{folder} is damaged: its digest differs")
        return tables
    except ModelError:
        raise
    except Exception as error:  # damaged files raise many kinds
        raise ModelError(f"{folder} is damaged: {type(error).__name__}: {error}") from None


def contexts_from(arrays: dict[str, Integers], step: int) -> Contexts:
    """Those of a step. Raises KeyError or ValueError for arrays that are missing or cannot be."""
    found = {name: arrays[f"{step}.{name}"] for name in TYPES}
    for name, array in found.items():
        if array.dtype != TYPES[name]:
            raise ValueError(f"{step}.{name} is of type {array.dtype}")
    return Contexts(**found)


def check_tables(tables: Tables) -> None:
    """Raises ValueError for channels, deviations or steps that contradict each other or cannot be."""
    latents = len(tables.sigma)
    if tables.sigma.shape != (latents,) or tables.means.shape != (latents,):
        raise ValueError(f"{tables.means.shape} means for {tables.sigma.shape} channels")
    if not (np.isfinite(tables.means).all() and np.isfinite(tables.sigma).all() and (tables.sigma > 0).all()):
        raise ValueError("means and deviations must be finite, and deviations above 0")
    if len(set(tables.channels) & set(range(latents))) != len(tables.channels):
        raise ValueError(f"channels {tables.channels} of {latents}")
    if list(tables.steps) != sorted(set(tables.steps) & set(range(1, 1 << 16))) or not tables.steps:
        raise ValueError(f"steps {tables.steps}")
    if any(contexts.num_channels != len(tables.channels) for contexts in tables.contexts):
        raise ValueError(f"contexts for another number of channels than {len(tables.channels)}")


def fixed_point(step: float) -> int:
    """A step as files hold it, 1/256 to 255. Raises ConfigError."""
    fixed = round(step * STEP_ONE) if 0 < step < 256 else 0
    if not 0 < fixed < 1 << 16:
        raise ConfigError(f"step {step} cannot be: it goes from 1/256 to 255, and 1 is the training's own")
    return fixed
