from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Config, correctness, main
from ldm_vae.models.reconstruction import exact_float32
from ldm_vae.runs.config import parse_config, parse_flags


def test_every_way_to_compute_a_picture_agrees() -> None:
    exact_float32()
    found = correctness(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert found.pop("vae: bf16 - float32") < 0.05
    assert found.pop("pipeline: device - CPU") < 1e-3
    assert max(found.values()) < 1e-4, found


def test_it_runs_what_there_is_reads_what_came_of_it_and_goes_on_where_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scripts' own parsers take the words; what the scripts write is put there instead of computed."""
    ran: list[str] = []

    def stand_in(name: str, *words: object) -> None:
        script = importlib.import_module(name.removesuffix(".py").replace("/", "."))
        args, presets = [str(w) for w in words], getattr(script, "PRESETS", None)
        config = parse_config(presets, description="", args=args) if presets else None
        config = config or parse_flags(script.Config, description="", args=args)
        ran.append(Path(name).stem)
        if ran == ["throughput"] * 3 + ["train_vae", "reconstruction", "class_conditional"]:
            (config.output / "vae").mkdir(parents=True)
            raise KeyboardInterrupt  # cut in the first part of its training
        config.output.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {"training_seconds": {"all": 1.0}, "figures": {}, "results": {}}
        log = [{"step": s, "images_per_second": s} for s in (20, 40, 60)] + [{"step": 60, "psnr": 1.0}]
        runs = {"train_vae": [config.output], "class_conditional": [config.output / "diffusion"]}
        for run in runs.get(Path(name).stem, []):
            run.mkdir(exist_ok=True)
            (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)))
        if name.endswith("throughput.py"):
            (config.output / "throughput-cpu.json").write_text(json.dumps(record))
        if name.endswith("reconstruction.py"):
            record["results"] = {path: {"psnr": 20.0} for path in config.vae}
        if name.endswith("class_conditional.py"):
            assert not (config.output / "vae").exists()
            (config.output / "guidance 2, 20 steps").mkdir()
            (config.output / "guidance 2, 20 steps" / "contact_sheet.png").write_bytes(b"sheet")
        (config.output / "results.json").write_text(json.dumps(record))

    monkeypatch.setattr(gpu_check, "seconds_of_script", stand_in)
    monkeypatch.setattr(gpu_check, "correctness", lambda device: {"largest": 0.0})
    monkeypatch.setattr(gpu_check, "peak_flops", lambda *_, **__: 1.0)
    data = {"photos": "a", "val_photos": "b", "fashion_mnist": "c", "flowers64": "d"}
    config = Config(output=tmp_path, vae_steps=60, **data)
    with pytest.raises(KeyboardInterrupt):
        main(config)
    main(config)
    assert ran[6:] == ["class_conditional", "class_conditional"]
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    speeds = found["photos"]["images_per_second"]
    assert (found["photos"]["psnr"], speeds) == (20.0, {"without the discriminator": 20, "with it": 60})
    assert found["flowers64"]["diffusion_images_per_second"] == 50
    assert (tmp_path / "fashion-mnist-guidance-2-20-steps.png").read_bytes() == b"sheet"
