"""`ldm-vae embed`: one vector an image, from an autoencoder's latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ldm_vae.errors import ConfigError
from ldm_vae.files import atomic, check_writable, write_csv

Pooling = Literal["mean", "flatten"]


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Write one vector an image, from the autoencoder's latents."""

    vae: str
    """Run directory, model folder or hub id."""
    data: str
    """Image folder, .zip, tar shards, Hugging Face dataset, or procedural:NAME."""
    output: Path
    """vectors.npy, with the names and labels in vectors.csv beside it; or vectors.parquet with all three."""
    resolution: int | None = None
    """Side of the squares that images are resized to; their own size unless given."""
    pooling: Pooling = "mean"
    """Of a map of latents: their mean over the places, or all of them."""
    num_images: int | None = None
    overwrite: bool = False
    device: str = "cpu"


def embed_images(command: Embed) -> None:
    import numpy as np
    from tqdm import tqdm

    from ldm_vae.analysis.embedding import embed_source
    from ldm_vae.data.sources import HeadSource, check_finite, check_outside, open_source
    from ldm_vae.models.interface import channels_of
    from ldm_vae.models.loading import check_device, load_autoencoder

    kind = command.output.suffix.lower()
    if kind not in (".npy", ".parquet"):
        raise ConfigError(f"--output {command.output}: name a .npy or a .parquet file")
    for value, name in ((command.resolution, "--resolution"), (command.num_images, "--num-images")):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}: it must be at least 1")
    if kind == ".parquet":
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise ConfigError("parquet files need pyarrow: pip install 'ldm-vae[datasets]', or write .npy") from None
    else:
        check_outside(command.output, command.data, flag="--data")  # .npy are images, too
    names_file = command.output.with_suffix(".csv")
    for file in (command.output, *([names_file] if kind == ".npy" else [])):
        if file.exists() and not command.overwrite:
            raise ConfigError(f"{file} is there already: add --overwrite to replace it")
    check_device(command.device)
    vae = in_tiles(load_autoencoder(command.vae).to(command.device))
    check_writable(command.output.parent)
    source = open_source(command.data, channels=channels_of(vae), resolution=command.resolution or 256)
    check_finite(source, command.data, command.num_images)
    if command.num_images is not None:
        source = HeadSource(source, command.num_images)
    vectors, names, labels, bad = embed_source(
        vae, source, resolution=command.resolution, pooling=command.pooling, progress=tqdm
    )
    classes = ["" if label is None else source.classes[label] for label in labels]
    if kind == ".npy":
        with atomic(command.output) as out:
            np.save(out, vectors)
        rows = [{"name": n, "class": c} for n, c in zip(names, classes, strict=True)]
        write_csv(names_file, rows)
    else:
        texts = [[t.encode(errors="backslashreplace").decode() for t in given] for given in (names, classes)]
        table = pyarrow.table({"name": texts[0], "class": texts[1], "vector": list(vectors)})
        with atomic(command.output) as out:
            parquet.write_table(table, out)
    say_bad(bad)
    print(f"{len(vectors)} vectors of {vectors.shape[1]} numbers are in {command.output}")


def in_tiles(vae: Any) -> Any:
    """Large images in little memory, where that changes nothing."""
    from ldm_vae.models.reconstruction import exact_float32

    exact_float32()
    if hasattr(vae, "decoder_halo"):
        vae.enable_tiling()
    return vae


def say_bad(bad: dict[str, str]) -> None:
    for name, reason in bad.items():
        print(f"left out: {name}: {reason}")
