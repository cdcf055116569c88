"""Time the entropy coder on one core and whole commands from their start, and count what the contexts save.

python benchmarks/studies/codec_speed.py --codec RUN_OR_MODEL --fit-data PATH --data PATH --output DIR

For each image of --data: milliseconds to code and to decode its symbols, and to compress and decompress it in a process
that has started, network included, medians of five; and bytes with the model's contexts and with one static table per
channel, fitted to --fit-data. `ldm-vae compress` and `decompress` of one photo of 256 x 256 are timed as processes of
their own, imports included, also medians of five. For one core, set OMP_NUM_THREADS=1 and bind the command to it
(taskset).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image

from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.contexts import decode_symbols, encode_symbols
from ldm_vae.codec.fit_contexts import fit_contexts
from ldm_vae.codec.picture import as_picture
from ldm_vae.codec.quality import USUAL_QUALITY
from ldm_vae.data.images import Pixels
from ldm_vae.data.order import index_at
from ldm_vae.data.sources import check_finite, open_source
from ldm_vae.errors import RunError, one_line_errors
from ldm_vae.files import check_writable
from ldm_vae.report import provenance, write_report
from ldm_vae.runs.config import Range, check_ranges, parse_flags
from ldm_vae.timing import last_line

ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Config:
    codec: str
    fit_data: str
    data: str
    output: Path
    quality: Annotated[float, Range(at_least=1, at_most=100)] = USUAL_QUALITY
    num_fit: Annotated[int, Range(at_least=1)] = 400
    num_images: Annotated[int | None, Range(at_least=1)] = None
    workers: Annotated[int, Range(at_least=1)] = 1
    """Threads for one picture, as `compress --workers`."""


def median_seconds(call: Callable[[], Any]) -> float:
    """Over ROUNDS calls, after one that is not counted."""
    call()
    return statistics.median(timeit.repeat(call, number=1, repeat=ROUNDS))


def command_seconds(model: str) -> dict[str, float]:
    """Seconds from start to end of compressing and decompressing one small photo."""
    with tempfile.TemporaryDirectory() as work:
        image, compressed, back = (f"{work}/{name}" for name in ("image.png", "image.ldi", "back.png"))
        Image.fromarray(open_source("procedural:dead-leaves", resolution=256)[0].pixels).save(image)

        def run(*words: str) -> None:
            command = [sys.executable, "-m", "ldm_vae.cli", *words, "--model", model, "--overwrite"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RunError(last_line(done.stderr).removeprefix("error: "))

        compress, decompress = partial(run, "compress", image, compressed), partial(run, "decompress", compressed, back)
        return {"compress_seconds": median_seconds(compress), "decompress_seconds": median_seconds(decompress)}


def symbols_of(codec: LatentCodec, pixels: Pixels, step: int) -> np.ndarray:
    """int32 (C, h, w) of a whole image, as one tile."""
    whole = as_picture(pixels, channels=codec.network.channels).pixels
    return codec.tables.quantise(codec.network.encode(whole, codec.network.box_of(whole)), step)


def main(config: Config) -> None:
    check_ranges(config)
    check_writable(config.output)
    torch.set_num_threads(1)
    codec = LatentCodec.from_pretrained(config.codec, workers=config.workers)
    fit_source, source = open_source(config.fit_data), open_source(config.data)
    check_finite(source, config.data, config.num_images)
    notes: list[str] = []
    step = codec.tables.fixed_step(codec.tables.step_at(config.quality, notes))
    contexts = codec.tables.contexts_of(step)
    indices = [index_at(i, size=len(fit_source), seed=0) for i in range(min(config.num_fit, len(fit_source)))]
    static = fit_contexts([symbols_of(codec, fit_source[i].pixels, step) for i in indices], taps=False)
    rows: list[dict[str, Any]] = []
    for i in range(min(len(source), config.num_images or len(source))):
        symbols = symbols_of(codec, source[i].pixels, step)
        payload = encode_symbols(symbols, contexts)
        encode = partial(encode_symbols, symbols, contexts)
        decode = partial(decode_symbols, payload, symbols.shape, contexts)
        row = {"image": source.name(i), "symbols": symbols.size, "bytes": len(payload)}
        row |= {"static_bytes": len(encode_symbols(symbols, static))}
        compress = partial(codec.compress, source[i].pixels, quality=config.quality)
        decompress = partial(codec.decompress_picture, compress())
        calls: dict[str, Callable[[], Any]]
        calls = {"encode": encode, "decode": decode, "compress": compress, "decompress": decompress}
        rows.append(row | {f"{name}_ms": 1e3 * median_seconds(call) for name, call in calls.items()})
    names = ("symbols", "encode_ms", "decode_ms", "compress_ms", "decompress_ms")
    figures = {name: float(np.median([row[name] for row in rows])) for name in names}
    figures["saved_by_contexts"] = 1 - sum(row["bytes"] for row in rows) / sum(row["static_bytes"] for row in rows)
    figures |= command_seconds(config.codec)
    for name, figure in figures.items():
        print(f"{name}: {figure:.4g}")
    write_report(config.output, provenance(config), {**figures, "rows": rows})


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Time the entropy coder, and whole commands from their start."))
