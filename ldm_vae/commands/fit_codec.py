"""`ldm-vae fit-codec`: a codec's tables for a VAE, from images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ldm_vae.data.reader import USUAL
from ldm_vae.errors import ConfigError
from ldm_vae.files import check_writable
from ldm_vae.hub import is_hub_id
from ldm_vae.runs.config import Range, Reading, check_ranges


@dataclass(frozen=True, kw_only=True)
class FitCodec:
    """Measure a VAE's posterior over images, fit the codec's tables, and write them beside the VAE (codec/)."""

    vae: str
    """Run directory, model folder or hub id."""
    data: str
    """Image folder, .zip, tar shards, Hugging Face dataset, or procedural:NAME."""
    output: Path | None = None
    """Folder for a copy of the VAE with its tables; beside --vae unless given."""
    num_images: Annotated[int, Range(at_least=1)] = 400
    steps: tuple[float, ...] | None = None
    """Steps of the quantiser at which tables are fitted; seven, from quality 100 to 1, unless given."""
    overwrite: bool = False
    """Replace tables that are there: files that were written with them cannot be read any more."""
    device: str = "cpu"
    reading: Reading = USUAL


def fit_codec(command: FitCodec) -> None:
    from ldm_vae.codec.fit_tables import STEPS, fit_tables
    from ldm_vae.data.sources import check_finite, open_source
    from ldm_vae.files import staged_directory
    from ldm_vae.models.interface import channels_of
    from ldm_vae.models.loading import check_device, load_autoencoder

    check_ranges(command)
    if command.output is None and is_hub_id(command.vae) and not Path(command.vae).is_dir():
        raise ConfigError(f"{command.vae} is on the hub: add --output, a folder for a copy of it with its tables")
    target = command.output or Path(command.vae)
    for folder in (target / "codec", *([target / "vae"] if command.output is not None else [])):
        if folder.exists() and not command.overwrite:
            raise ConfigError(
                f"{folder} is there: files that were compressed with it need it. Add --overwrite to replace it, or "
                "choose another --output"
            )
    check_device(command.device)
    vae = load_autoencoder(command.vae).to(command.device)
    check_writable(target)
    source = open_source(command.data, channels=channels_of(vae), options=command.reading)
    check_finite(source, command.data, command.num_images)
    tables = fit_tables(vae, source, num_images=command.num_images, steps=command.steps or STEPS, show=True)
    if command.output is not None:
        with staged_directory(target / "vae") as staging:
            vae.cpu().save_pretrained(staging)
    with staged_directory(target / "codec") as staging:
        tables.save(staging)
    print(f"{len(tables.channels)} of {len(tables.sigma)} channels are coded; tables are in {target / 'codec'}")
