from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import equal_time

PACE = {("f8c4", "no"): 320.0, ("f8c4", "bf16"): 160.0}  # images/s; the others do 32 either way
BEST = {"f8c4": 2e-3, "AutoencoderKL": 5e-4, "AutoencoderTiny": 1e-3}


def test_each_model_gets_its_faster_precision_its_best_rate_and_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer is stood in for by one of known speed, whose runs take a fifth longer than the speed says."""
    launched: list[dict[str, str]] = []

    def trainer(script: Path, *words: object) -> float:
        assert script.name == "train_vae.py"
        flags = {str(k): str(v) for k, v in zip(words[1::2], words[2::2], strict=True)}
        name = Path(flags["--init"]).name if "--init" in flags else "f8c4"
        launched.append(flags | {"name": name})
        speed = PACE.get((name, flags["--mixed-precision"]), 32.0)
        seconds = 1.2 * int(flags["--steps"]) * 16 / speed
        psnr = 30 if float(flags["--learning-rate"]) == BEST[name] else 20
        output = Path(flags["--output"])
        output.mkdir(parents=True)
        lines: list[dict[str, Any]] = [{"images_per_second": speed, "seconds": seconds}]
        lines += [{"val_psnr": psnr, "seconds": seconds}]
        (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return seconds

    monkeypatch.setattr(equal_time, "seconds_of_script", trainer)
    config = equal_time.Config(data="photos", val_data="others", output=tmp_path, seconds=600, sweep_seconds=60)
    equal_time.main(config)
    models = json.loads((tmp_path / "equal_time.json").read_text())["models"]
    assert {name: m["learning_rate"] for name, m in models.items()} == BEST
    assert models["f8c4"]["precision"] == "no"
    for name, facts in models.items():
        assert facts["training_seconds"] == pytest.approx(600, rel=0.01)
        *tries, final = [flags for flags in launched if flags["name"] == name]
        assert len(tries) == 2 + len(equal_time.RATES)
        for flags in tries:  # chosen without a look at the photos that it is measured on
            assert (flags["--data"], flags["--val-data"]) == ("photos#train", "photos#held-out")
        assert (final["--data"], final["--val-data"]) == ("photos", "others")
        assert ("--kl-weight" in final) == (name == "AutoencoderTiny")
    assert (tmp_path / "psnr_against_time.png").stat().st_size > 10_000
