from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae.codec.fit_tables import fit_tables
from ldm_vae.data.sources import open_source
from ldm_vae.errors import RunError
from ldm_vae.models.autoencoder import ARCHITECTURES, PatchAutoencoderKL
from tests.endurance.any_size import TILE, Config, main, measure, write_image


def test_the_image_has_its_size_and_no_two_tiles_beside_each_other_alike(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 2500)
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (2500, 2500, 3)
    assert not np.array_equal(pixels[:TILE, :TILE], pixels[:TILE, TILE : 2 * TILE])
    write_image(tmp_path / "b.png", 300, transparent=True)
    alpha = np.asarray(Image.open(tmp_path / "b.png"))[:, :, 3]
    assert 0.1 < (alpha == 0).mean() < 0.9
    assert set(np.unique(alpha)) == {0, 255}


def test_what_this_process_has_held_is_not_taken_for_a_commands() -> None:
    held = np.ones(600 * 2**20, np.uint8)
    found = measure(["-c", "import time; x = bytearray(200 << 20); time.sleep(0.3)"])
    assert 200 < found["resident_mib"] < 300 < held.nbytes / 2**20
    assert 0.3 < found["seconds"] < 30
    with pytest.raises(RunError, match="no such thing"):
        measure(["-c", "import sys; sys.exit('no such thing')"])


@pytest.mark.slow
def test_commands_are_measured_and_stay_in_bounds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(**ARCHITECTURES["f8c32"])
    vae.save_pretrained(tmp_path / "model" / "vae")
    tables = tmp_path / "model" / "codec"
    tables.mkdir()
    fit_tables(vae.eval(), open_source("procedural:dead-leaves", resolution=64), num_images=4, steps=(1,)).save(tables)
    main(Config(model=str(tmp_path / "model"), output=tmp_path / "out", sides=(1024, 6144)))
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    for found in results.values():
        assert found.keys() == {
            *("compress", "decompress", "reconstruct", "reconstruct, from a progressive JPEG"),
            *("compress, with transparency", "decompress, with transparency"),
        }
        assert all(0 < r["resident_mib"] < 1900 for r in found.values())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"results.json", "table.md"}
