"""Photos compressed by a codec, beside JPEG, WebP and AVIF of as many bytes: crops to look at, and a table.

python benchmarks/equal_bytes.py --output DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from skimage import data as installed_photos

from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.others import best_within, installed
from ldm_vae.data.conversion import as_uint8
from ldm_vae.data.images import Pixels
from ldm_vae.data.reader import USUAL
from ldm_vae.data.sources import BadImages, open_source, shuffled, usable
from ldm_vae.errors import nothing_usable, one_line_errors
from ldm_vae.files import check_writable
from ldm_vae.grids import labelled_rows, middle
from ldm_vae.metrics import ssimulacra2
from ldm_vae.report import markdown_table, provenance, write_report
from ldm_vae.runs.config import Range, Reading, check_ranges, parse_flags

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
"""That scikit-image installs."""
CROP = 256
"""Side of what is shown of a photo."""
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Config:
    codec: str = "box:codec"
    """Run directory, model folder or hub id with fitted tables."""
    data: str | None = None
    """The photos that scikit-image installs unless given."""
    output: Path
    num_images: Annotated[int, Range(at_least=1)] = len(PHOTOS)
    """Of --data, in a shuffled order."""
    quality: Annotated[float, Range(at_least=1, at_most=100)] = 40
    """Of our codec."""
    others: tuple[str, ...] = ("avif-420", "webp", "jpeg-420")
    """As in rate_distortion.py."""
    side: Annotated[int, Range(at_least=CROP)] = 768
    """Of larger images, so many pixels each way are compressed."""
    reading: Reading = USUAL


def load_photos(config: Config) -> dict[str, Pixels]:
    """uint8 (H, W, 3) by name. Raises DataError."""
    if config.data is None:
        return {name: getattr(installed_photos, name)() for name in PHOTOS}
    source, bad_images = open_source(config.data, options=config.reading), BadImages()
    found = islice(usable(source, bad_images, indices=shuffled(source, 0)), config.num_images)
    photos = {source.name(i): within(as_uint8(sample.pixels), config.side) for i, sample in found}
    if not photos:
        raise nothing_usable(bad_images)
    return photos


def within(pixels: Pixels, side: int) -> Pixels:
    """Of pixels (H, W, C), at most this side each way: the middle, and of a high image nearer to its top."""
    top, left = (max(n - side, 0) for n in pixels.shape[:2])
    top, left = top // 4, left // 2
    return pixels[top : top + side, left : left + side]


def main(config: Config) -> None:
    check_ranges(config)
    photos, others = load_photos(config), installed(config.others)
    check_writable(config.output)
    codec = LatentCodec.from_pretrained(config.codec)
    step = codec.tables.step_at(config.quality, [])
    rows: list[Row] = []
    tiles = {name: list[Pixels]() for name in ("original", config.codec, *(other.name for other in others))}
    for name, pixels in photos.items():
        ours = codec.compress(pixels, step=step)
        decoded = {config.codec: (ours, codec.decompress_picture(ours).pixels)}
        for other in others:
            file = best_within(other, pixels, len(ours))
            decoded[other.name] = file, other.decode(file)
        tiles["original"].append(middle(within(pixels, CROP), CROP))
        for by, (file, result) in decoded.items():
            tiles[by].append(middle(within(result, CROP), CROP))
            rows.append({"image": name, "codec": by, "bytes": len(file), "ssimulacra2": ssimulacra2(pixels, result)})
    write_report(config.output, provenance(config), {"files": rows}, table(rows))
    shown = config.output / "compressed.png"
    grid_of(tiles, rows).save(shown)
    print(f"crops at 100 %: {shown}")


def table(rows: list[Row]) -> str:
    """A line a photo: what each codec made of it."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(row["image"], {"bytes: SSIMULACRA2": row["image"]})
        line[row["codec"]] = f"{row['bytes']:,}: {row['ssimulacra2']:.1f}"
    return markdown_table(list(lines.values()))


def grid_of(tiles: dict[str, list[Pixels]], rows: list[Row]) -> Image.Image:
    """A column a photo: a part of the original, then each codec's of it."""
    lines = []
    for name, crops in tiles.items():
        own = [row for row in rows if row["codec"] == name]
        sizes, scores = ", ".join(f"{r['bytes']:,}" for r in own), ", ".join(f"{r['ssimulacra2']:.0f}" for r in own)
        lines.append((f"{name}: {sizes} bytes; SSIMULACRA2 {scores}" if own else name, np.stack(crops)))
    return labelled_rows(lines)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Photos compressed by a codec, beside others of as many bytes."))
