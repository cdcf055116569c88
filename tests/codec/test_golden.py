"""Files that were written once decode to the same symbols for ever."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from ldm_vae.codec import bitstream
from ldm_vae.codec.contexts import decode_symbols
from ldm_vae.codec.tables import load_tables

GOLDEN = Path(__file__).parent.parent / "golden" / "v2"
DIGESTS = json.loads((GOLDEN / "symbols.json").read_text())


@pytest.mark.parametrize("name", list(DIGESTS))
def test_a_golden_file_decodes_to_its_symbols(name: str) -> None:
    tables = load_tables(GOLDEN)
    contents = bitstream.unpack((GOLDEN / f"{name}.ldi").read_bytes())
    header = contents.header
    assert header.model == tables.digest[:4]
    symbols = np.zeros((header.channels, *header.latent_size), "<i4")
    for (top, left, bottom, right), part in zip(header.tile_boxes, contents.tiles, strict=True):
        shape = (header.channels, bottom - top, right - left)
        contexts = tables.contexts_of(header.step)
        symbols[:, top:bottom, left:right] = decode_symbols(contents.read(part), shape, contexts)
    assert hashlib.sha256(symbols.tobytes()).hexdigest() == DIGESTS[name]
