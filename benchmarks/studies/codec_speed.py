"""Time the entropy coder on one core, and count what its contexts save.

python benchmarks/studies/codec_speed.py --codec RUN_OR_MODEL --fit-data PATH --data PATH [--output FILE]

For each image of --data: milliseconds to code and to decode its symbols (not the network), medians of five, and bytes
with the model's contexts and with one static table a channel, fitted to --fit-data.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_vae.codec.codec import LatentCodec, log2_lanes
from ldm_vae.codec.contexts import decode_symbols, encode_symbols
from ldm_vae.codec.fit_contexts import fit_contexts
from ldm_vae.codec.picture import as_picture
from ldm_vae.data.order import index_at
from ldm_vae.data.sources import check_finite, open_source
from ldm_vae.errors import one_line_errors
from ldm_vae.files import write_json
from ldm_vae.runs.config import as_json, parse_flags
from ldm_vae.timing import describe_machine

ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the entropy coder's benchmark."""

    codec: str
    fit_data: str
    data: str
    quality: float = 1.0
    num_fit: int = 400
    num_images: int | None = None
    output: Path | None = None


def median_ms(call: Callable[[], Any]) -> float:
    """After one call that is not counted."""
    call()
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    codec = LatentCodec.from_pretrained(config.codec)
    fit_source, source = open_source(config.fit_data), open_source(config.data)
    check_finite(source, config.data, config.num_images)
    quality = codec.fixed_quality(config.quality)
    contexts = codec.tables.contexts_of(quality)
    fitted = [
        codec.quantise(
            codec.latents_of(as_picture(fit_source[index_at(i, size=len(fit_source), seed=0)].pixels)), quality
        )
        for i in range(min(config.num_fit, len(fit_source)))
    ]
    static = fit_contexts(fitted, taps=False)
    rows: list[dict[str, Any]] = []
    for i in range(min(len(source), config.num_images or len(source))):
        symbols = codec.quantise(codec.latents_of(as_picture(source[i].pixels)), quality)
        lanes = 1 << log2_lanes(symbols.size)
        payload = encode_symbols(symbols, contexts, lanes=lanes)
        without = encode_symbols(symbols, static, lanes=lanes)
        rows.append(
            {
                "image": source.name(i),
                "symbols": symbols.size,
                "bytes": len(payload),
                "static_bytes": len(without),
                "encode_ms": median_ms(partial(encode_symbols, symbols, contexts, lanes=lanes)),
                "decode_ms": median_ms(partial(decode_symbols, payload, symbols.shape, contexts, lanes=lanes)),
            }
        )
    figures = {name: float(np.median([r[name] for r in rows])) for name in ("symbols", "encode_ms", "decode_ms")}
    figures["saved_by_contexts"] = 1 - sum(r["bytes"] for r in rows) / sum(r["static_bytes"] for r in rows)
    for name, figure in figures.items():
        print(f"{name}: {figure:.4g}")
    if config.output is not None:
        record = {"config": as_json(config), "machine": describe_machine(torch.device("cpu")), **figures, "rows": rows}
        write_json(config.output, record)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Config, description="Time the entropy coder on one core."))
