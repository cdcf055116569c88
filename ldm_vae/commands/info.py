"""`ldm-vae info`: what compressed files say of themselves, for people or as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from ldm_vae.codec import bitstream
from ldm_vae.codec.bitstream import Limits
from ldm_vae.codec.quality import quality_of_step
from ldm_vae.codec.tables import STEP_ONE
from ldm_vae.commands.folders import run_jobs
from ldm_vae.commands.transfer import read
from ldm_vae.errors import CompressedFileError, ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Info:
    """Say what .ldi files hold, and whether they are whole. Needs no model."""

    files: Annotated[Positional[tuple[str, ...]], arg(metavar="FILE ...")]
    """- is standard input."""
    json: bool = False
    """As JSON: an object for one file, a list of them for several."""


def facts_in(file: str) -> dict[str, Any]:
    """What a file says of itself, in JSON's types. Raises CompressedFileError unless it is whole."""
    from ldm_vae.codec.picture import named
    from ldm_vae.codec.sections import unpack_metadata

    data = read(file)
    contents = bitstream.unpack(data, limits=Limits(max_pixels=1 << 64, max_side=1 << 32))
    for part in (*contents.sections.values(), *contents.tiles):
        try:
            contents.read(part)
        except CompressedFileError as error:
            bitstream.report(error, part.name, None)
    header, metadata = contents.header, contents.sections.get(bitstream.METADATA)
    return {
        "file": file,
        "bytes": len(data),
        "bits_per_pixel": round(8 * len(data) / (header.width * header.height), 4),
        "width": header.width,
        "height": header.height,
        "channels": header.colours,
        "bits": header.depth,
        "quality": round(quality_of_step(header.step / STEP_ONE), 1),
        "step": header.step / STEP_ONE,
        "tuning": bitstream.TUNINGS[header.tuning],
        "latent_channels": header.channels,
        "stride": 1 << header.log2_stride,
        "tiles": len(contents.tiles),
        "tile_side": 1 << header.log2_tile,
        "sections": {part.name: part.end - part.begin for part in contents.sections.values()},
        "metadata": named(unpack_metadata(contents.read(metadata))) if metadata else [],
        "model": header.model.hex(),
    }


def as_lines(facts: dict[str, Any]) -> str:
    """For people, with a name at the beginning of each line."""
    f = facts
    lines = {
        "file": f["file"],
        "size": f"{f['width']} x {f['height']} pixels, {f['channels']} channels of {f['bits']} bits",
        "bits per pixel": f"{f['bits_per_pixel']:.4f} ({f['bytes']} bytes)",
        "quality": f"{f['quality']:g} (step {f['step']:g})",
        "tuning": f["tuning"],
        "latents": f"{f['latent_channels']} channels, stride {f['stride']}",
        "tiles": f"{f['tiles']} of up to {f['tile_side']} latents a side",
        "beside": ", ".join(f"{name} ({size} bytes)" for name, size in f["sections"].items()) or "nothing",
        "metadata": ", ".join(f["metadata"]) or "none",
        "model": f["model"],
    }
    return "\n".join(f"{name:15} {line}" for name, line in lines.items())


def info(command: Info) -> None:
    if not command.files:
        raise ConfigError("name a file")
    several = len(command.files) > 1
    found: list[dict[str, Any]] = []
    failures: dict[str, str] = {}

    def look(file: str) -> None:
        found.append(facts_in(file))

    if several:
        failures = run_jobs(look, {file: file for file in command.files}, show=False)
    else:
        look(command.files[0])
    if command.json:
        print(json.dumps(found if several else found[0], indent=2))
    else:
        print("\n\n".join(map(as_lines, found)))
    if failures:
        raise DataError(f"{len(failures)} of {len(command.files)} files are not whole, or not there: see above")
