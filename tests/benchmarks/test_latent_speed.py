from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies.latent_speed import Config, main
from ldm_vae.errors import ConfigError
from ldm_vae.objectives import denoising


def test_three_ways_to_a_batch_are_measured_in_turns(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    real = denoising.encode_moments

    def counted(vae: Any, images: torch.Tensor) -> torch.Tensor:
        encoded.append(len(images))
        time.sleep(0.5)  # an encoder so slow that the three ways cannot be taken for one another
        return real(vae, images)

    monkeypatch.setattr(denoising, "encode_moments", counted)
    main(
        Config(
            data=str(photos),
            output=tmp_path,
            vae=("f8c4",),
            resolution=32,
            batch_size=2,
            num_images=4,
            rounds=1,
            seconds=0.1,
        )
    )
    result = json.loads((tmp_path / "results.json").read_text())["results"]["f8c4"]
    assert result["latent_shape"] == [4, 4, 4]
    ratio = result["cache_images_per_second"] / result["on_the_fly_images_per_second"]
    assert result["cache_over_on_the_fly"] == pytest.approx(ratio)
    assert ratio > 2
    assert result["cache_over_random"] > 0.3
    assert len(encoded) >= 4  # the warm-up, and three times at least
    assert "| f8c4 |" in (tmp_path / "table.md").read_text()


def test_an_unknown_vae_or_denoiser_is_one_clear_error(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no VAE f9c9: try demo"):
        main(Config(data=str(photos), output=tmp_path, vae=("f9c9",)))
    with pytest.raises(ConfigError, match="no denoiser huge: try demo, tiny"):
        main(Config(data=str(photos), output=tmp_path, denoiser="huge"))
