"""What a codec knows beside its VAE: steps, channels, and the contexts of each quality. Saved with the model.

`codec/config.json` and `codec/tables.safetensors`. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ldm_vae.codec.contexts import Contexts
from ldm_vae.codec.rans import Frequencies
from ldm_vae.errors import ModelError
from ldm_vae.files import write_json

QUALITY_ONE = 256
"""Quality 1 in a file: qualities are fixed-point numbers with 8 bits behind the point."""
ARRAYS = ("taps", "mean_weights", "activity_weights", "thresholds", "frequencies")
DIGEST_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The codec's own parameters.

    Attributes:
        vae: fingerprint of the VAE that they were fitted for.
        sigma: (c,) for every latent channel, the root-mean-square posterior deviation over a data set.
        means: (c,) what stands for the symbol 0 of each channel; a channel that is not coded is that everywhere.
        channels: (C,) the latent channels that are coded, in the order of coding.
        qualities: ascending fixed-point qualities that contexts were fitted at.
        contexts: those, one each.
    """

    vae: str
    sigma: np.ndarray[Any, Any]
    means: np.ndarray[Any, Any]
    channels: tuple[int, ...]
    qualities: tuple[int, ...]
    contexts: tuple[Contexts, ...]

    def steps(self, quality: int) -> np.ndarray[Any, Any]:
        """The quantiser's step of each coded channel (C,) in float64: quality * sqrt(12) * sigma.

        Uniform noise of that width has quality^2 times the variance that the decoder met in training.
        """
        steps: np.ndarray[Any, Any] = quality / QUALITY_ONE * math.sqrt(12) * self.sigma[list(self.channels)]
        return steps

    def contexts_of(self, quality: int) -> Contexts:
        """Those fitted at the nearest quality by ratio; of two equally near, the lower."""
        distance = [max(quality, q) * QUALITY_ONE // min(quality, q) for q in self.qualities]
        return self.contexts[distance.index(min(distance))]

    @cached_property
    def digest(self) -> bytes:
        """The first 8 bytes of the sha256 of all of them, as docs/file-format.md has it."""
        sha = hashlib.sha256(np.array(self.channels, "<i4").tobytes())
        for values in (self.sigma, self.means):
            sha.update(values.astype("<f8").tobytes())
        arrays = self.arrays()
        for quality in self.qualities:
            sha.update(np.array([quality], "<i4").tobytes())
            for name in ARRAYS:
                array = arrays[f"{quality}.{name}"]
                sha.update(np.array(array.shape, "<i4").tobytes())
                sha.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return sha.digest()[:DIGEST_BYTES]

    def config(self) -> dict[str, Any]:
        return {
            "format_version": 1,
            "vae": self.vae,
            "sigma": self.sigma.tolist(),
            "means": self.means.tolist(),
            "channels": list(self.channels),
            "qualities": list(self.qualities),
        }

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        types = {"taps": np.int8, "mean_weights": np.int16, "activity_weights": np.int16, "frequencies": np.uint16}
        found = {}
        for quality, contexts in zip(self.qualities, self.contexts, strict=True):
            for name in ARRAYS:
                array = contexts.frequencies.frequency if name == "frequencies" else getattr(contexts, name)
                found[f"{quality}.{name}"] = np.ascontiguousarray(array.astype(types.get(name, np.int64)))
        return found

    def save(self, folder: Path) -> None:
        """Writes config.json and tables.safetensors into an existing folder."""
        save_file(self.arrays(), folder / "tables.safetensors")
        write_json(folder / "config.json", self.config() | {"digest": self.digest.hex()})


def load_tables(folder: Path) -> Tables:
    """What `save` wrote. Raises ModelError for a folder without it, a damaged one, or one of a later version."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no tables: make them with `ldm-vae fit-codec`")
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["format_version"] != 1:
            raise ModelError(f"{folder} has tables of version {config['format_version']}: a later ldm-vae made them")
        tables = tables_from(config, load_file(folder / "tables.safetensors"))
        if tables.digest.hex() != config["digest"]:
            raise ModelError(f"{folder} is damaged: its digest differs")
        return tables
    except ModelError:
        raise
    except Exception as error:  # damaged files raise many kinds
        raise ModelError(f"{folder} is damaged: {type(error).__name__}: {error}") from None


def tables_from(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> Tables:
    contexts = []
    for quality in config["qualities"]:
        given = {name: arrays[f"{quality}.{name}"].astype(np.int64) for name in ARRAYS}
        frequencies = Frequencies(given.pop("frequencies"))
        contexts.append(Contexts(**given, frequencies=frequencies))
    return Tables(
        vae=config["vae"],
        sigma=np.array(config["sigma"]),
        means=np.array(config["means"]),
        channels=tuple(config["channels"]),
        qualities=tuple(config["qualities"]),
        contexts=tuple(contexts),
    )
