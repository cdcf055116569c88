from __future__ import annotations

import json
import timeit
from pathlib import Path

import pytest
import torch

from benchmarks.studies import codec_speed
from ldm_vae.codec.fit_tables import fit_tables
from ldm_vae.data.sources import open_source
from ldm_vae.models.autoencoder import PatchAutoencoderKL


def test_symbols_are_timed_and_counted_with_and_without_contexts_and_commands_from_their_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(block_out_channels=(8,), encoder_layers_per_block=(1,), decoder_layers_per_block=(1,))
    vae.save_pretrained(tmp_path / "run" / "vae")
    (tmp_path / "run" / "codec").mkdir()
    source = open_source("procedural:dead-leaves", resolution=64)
    fit_tables(vae.eval(), source, num_images=4, steps=(0.25, 1)).save(tmp_path / "run" / "codec")
    monkeypatch.setattr(codec_speed, "median_seconds", lambda call: timeit.timeit(call, number=1))
    data = "procedural:dead-leaves"
    codec_speed.main(
        codec_speed.Config(
            codec=str(tmp_path / "run"), fit_data=data, data=data, output=tmp_path / "out", num_fit=2, num_images=2
        )
    )
    torch.set_num_threads(threads)
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(record["rows"]) == 2
    saved = 1 - sum(r["bytes"] for r in record["rows"]) / sum(r["static_bytes"] for r in record["rows"])
    assert record["saved_by_contexts"] == pytest.approx(saved)
    timed = ("encode_ms", "decode_ms", "compress_ms", "decompress_ms")
    assert all(row[name] > 0 for row in record["rows"] for name in timed)
    assert 0.3 < record["compress_seconds"] < 60
    assert 0.3 < record["decompress_seconds"] < 60
