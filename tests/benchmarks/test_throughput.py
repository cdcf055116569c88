from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.throughput import Config, main
from ldm_vae.errors import ConfigError


def test_models_are_measured_side_by_side(tmp_path: Path) -> None:
    models = ("f8c4", "f8c8")
    main(Config(output=tmp_path, models=models, resolution=32, batch_size=2, rounds=1, seconds=0.05, losses="l1-kl"))
    (file,) = tmp_path.glob("throughput-*-no-l1-kl.json")
    results = json.loads(file.read_text())["results"]
    assert results["f8c4"]["f8c4_trains_times_as_fast"] == 1
    ratio = results["f8c4"]["train_images_per_second"] / results["f8c8"]["train_images_per_second"]
    assert results["f8c8"]["f8c4_trains_times_as_fast"] == pytest.approx(ratio)
    assert results["f8c8"]["step_gflop"] > results["f8c4"]["step_gflop"] > 0
    for result in results.values():
        assert 0 < result["share_of_peak"] < 2
        assert result["reconstruction_ms"] > 0


def test_an_unknown_model_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model f9c9: try demo, f8c4"):
        main(Config(output=tmp_path, models=("f9c9",), seconds=0.01))
