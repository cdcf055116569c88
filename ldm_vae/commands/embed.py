"""`ldm-vae embed`: one vector an image, from an autoencoder's latents."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ldm_vae.data.reader import USUAL
from ldm_vae.errors import ConfigError
from ldm_vae.files import atomic, check_writable, write_csv
from ldm_vae.runs.config import Range, Reading, check_ranges

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
    resolution: Annotated[int | None, Range(at_least=1)] = None
    """Side of the squares that images are resized to; their own size unless given."""
    pooling: Pooling = "mean"
    """Of a map of latents: their mean over the places, or all of them."""
    num_images: Annotated[int | None, Range(at_least=1)] = None
    overwrite: bool = False
    device: str = "cpu"
    reading: Reading = USUAL


def embed_images(command: Embed) -> None:
    from ldm_vae.analysis.embedding import embed_source
    from ldm_vae.data.sources import check_finite, check_outside, open_source
    from ldm_vae.models.interface import channels_of
    from ldm_vae.models.loading import load_autoencoder

    check_ranges(command)
    kind = command.output.suffix.lower()
    if kind not in (".npy", ".parquet"):
        raise ConfigError(f"--output {command.output}: name a .npy or a .parquet file")
    if kind == ".parquet":
        check_parquet()
    else:
        check_outside(command.output, command.data, flag="--data")  # .npy are images, too
    for file in (command.output, *([command.output.with_suffix(".csv")] if kind == ".npy" else [])):
        if file.exists() and not command.overwrite:
            raise ConfigError(f"{file} is there already: add --overwrite to replace it")
    vae = ready(load_autoencoder, command.vae, command.device)
    check_writable(command.output.parent)
    source = open_source(
        command.data, channels=channels_of(vae), resolution=command.resolution or 256, options=command.reading
    )
    check_finite(source, command.data, command.num_images)
    bad_images: dict[str, str] = {}
    embedding = embed_source(
        vae,
        source,
        bad_images,
        resolution=command.resolution,
        pooling=command.pooling,
        num_images=command.num_images,
    )
    classes = ["" if label is None else source.classes[label] for label in embedding.labels]
    write = write_parquet if kind == ".parquet" else write_npy
    write(command.output, embedding, classes)
    print_bad(bad_images)
    count, size = embedding.vectors.shape
    print(f"{count} vectors of {size} numbers are in {command.output}")


def check_parquet() -> None:
    """Raises ConfigError where what writes parquet is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("parquet files need pyarrow: pip install 'ldm-vae[datasets]', or write .npy")


def write_npy(file: Path, embedding: Any, classes: list[str]) -> None:
    """The vectors, and beside them a CSV of their names and classes."""
    import numpy as np

    with atomic(file) as out:
        np.save(out, embedding.vectors)
    rows = [{"name": n, "class": c} for n, c in zip(embedding.names, classes, strict=True)]
    write_csv(file.with_suffix(".csv"), rows)


def write_parquet(file: Path, embedding: Any, classes: list[str]) -> None:
    import pyarrow
    from pyarrow import parquet

    names, classes = (  # names of files can be no text
        [text.encode(errors="backslashreplace").decode() for text in column] for column in (embedding.names, classes)
    )
    table = pyarrow.table({"name": names, "class": classes, "vector": list(embedding.vectors)})
    with atomic(file) as out:
        parquet.write_table(table, out)


def ready(load: Callable[[str], Any], name: str, device: str) -> Any:
    """A network on its device, in tiles where that changes nothing: large images in little memory."""
    from ldm_vae.models.loading import check_device
    from ldm_vae.models.reconstruction import exact_float32

    check_device(device)
    exact_float32()
    vae = load(name).to(device)
    if hasattr(vae, "decoder_halo"):
        vae.enable_tiling()
    return vae


def print_bad(bad_images: Mapping[str, str]) -> None:
    for name, reason in bad_images.items():
        print(f"left out: {name}: {reason}")
