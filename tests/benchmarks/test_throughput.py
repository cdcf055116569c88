from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.throughput import Config, earlier_results, main, slower
from ldm_vae.errors import ConfigError


def test_every_stage_is_measured_beside_diffusers(tmp_path: Path) -> None:
    models = ("f8c4", "AutoencoderTiny")
    small: dict[str, Any] = {"resolution": 32, "batch_size": 2, "side": 64, "rounds": 1, "seconds": 0.05}
    main(Config(output=tmp_path, models=models, **small))
    file = tmp_path / "throughput-cpu-no.json"
    record = json.loads(file.read_text())
    results = record["results"]
    steps = [f"{m}: {what}" for m in models for what in ("step", "encode", "decode")]
    others = ["denoiser: step", "denoiser: sampling in 10 steps", "caching", "codec: compress", "codec: decompress"]
    assert list(results) == [*steps, *others, "loader, in one process"]
    for name, result in results.items():
        assert result["images_per_second"] > 0
        assert 0 < result["share_of_peak"] < 2 or name.startswith("loader")
    step, decode = results["f8c4: step"]["gflop"] / 2, results["f8c4: decode"]["gflop"]  # of 32x32 and of 64x64
    assert 2.5 < step / ((decode + results["f8c4: encode"]["gflop"]) / 4) < 3.2  # forward and backward
    (line,) = (tmp_path / "history.jsonl").read_text().splitlines()
    assert json.loads(line)["images_per_second"]["caching"] == pytest.approx(
        results["caching"]["images_per_second"], abs=1e-3
    )
    fast = {k: v | {"images_per_second": 9 * v["images_per_second"]} for k, v in results.items()}
    assert len(slower(results, fast)) == len(results)
    assert slower(fast, results) == []
    assert earlier_results(file, record) == results
    with pytest.raises(ConfigError, match="does not compare: machine differ"):
        earlier_results(file, record | {"machine": "another one"})
    for text in ("{}", "[1]", "3", '{"results": {"a": {}}}', "{"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ConfigError, match="is no record of this benchmark"):
            earlier_results(tmp_path / "other.json", record)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"models": ("f9c9",)}, "no model f9c9: try .*AutoencoderTiny"),
        ({"compare": Path("none.json")}, "is no record"),
        ({"rounds": 0}, "--rounds is 0: it must be at least 1"),
    ],
)
def test_what_cannot_work_is_one_clear_error(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        main(Config(output=tmp_path, seconds=0.01, **flags))
