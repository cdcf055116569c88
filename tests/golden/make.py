"""Makes the golden files anew: only for a new version of the format. Those of each version stay for ever.

python tests/golden/make.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from ldm_vae.codec import bitstream
from ldm_vae.codec.bitstream import MODEL_BYTES, Header
from ldm_vae.codec.contexts import encode_symbols
from ldm_vae.codec.fit_contexts import fit_contexts
from ldm_vae.codec.tables import Tables

HERE = Path(__file__).parent / "v2"
CASES = {"small": (1, 1), "odd": (9, 23), "tiles": (20, 35), "escapes": (6, 6)}


def symbols_of(name: str) -> np.ndarray:
    rng = np.random.default_rng(len(name))
    height, width = CASES[name]
    values = np.rint(
        rng.laplace(size=(3, height, width)) * [[[4]], [[1]], [[0.3]]] + rng.normal(size=(1, 1, width)) * 5
    )
    if name == "escapes":
        values = rng.integers(-(2**31), 2**31, size=values.shape)
    return values.astype(np.int32)


def main() -> None:
    rng = np.random.default_rng(0)
    scales = np.array([4, 1, 0.3])[:, None, None]
    train = [np.rint(rng.laplace(size=(3, 16, 16)) * scales * rng.uniform(0.3, 2)).astype(np.int64) for _ in range(40)]
    tables = Tables(
        vae="0" * 64,
        sigma=np.array([1.0, 0.5, 0.25, 0.125]),
        means=np.zeros(4),
        channels=(2, 0, 1),
        steps=(128, 256),
        contexts=(fit_contexts(train), fit_contexts(train, taps=False)),
    )
    HERE.mkdir(exist_ok=True)
    tables.save(HERE)
    digests = {}
    for number, name in enumerate(CASES):
        symbols = symbols_of(name)
        _, height, width = symbols.shape
        header = Header(
            width=8 * width - 3,
            height=8 * height - 5,
            colours=3,
            depth=8,
            log2_stride=3,
            channels=3,
            log2_tile=4,
            step=128 if number % 2 else 300,
            model=tables.digest[:MODEL_BYTES],
        )
        tiles = []
        for top, left, bottom, right in header.tile_boxes:
            part = symbols[:, top:bottom, left:right]
            tiles.append(encode_symbols(part, tables.contexts_of(header.step)))
        (HERE / f"{name}.ldi").write_bytes(bitstream.pack(header, {}, tiles))
        digests[name] = hashlib.sha256(symbols.astype("<i4").tobytes()).hexdigest()
    (HERE / "symbols.json").write_text(json.dumps(digests, indent=2) + "\n")


if __name__ == "__main__":
    main()
