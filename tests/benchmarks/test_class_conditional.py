"""The whole way from labelled images to judged samples, made small."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.studies import class_conditional
from benchmarks.studies.class_conditional import FASHION, PRESETS, halves, judge, main, write_fashion_mnist
from ldm_vae.data.sources import open_source
from ldm_vae.errors import ConfigError, DataError, RunError

SMALL = replace(
    PRESETS["fashion-mnist"][1],
    vae_steps=2,
    vae_batch_size=4,
    steps=2,
    batch_size=4,
    classifier_widths=(8, 16),
    classifier_epochs=1,
    num_images=20,
    guidance_scales=(1.0,),
    interval_scales=(2.0,),
    sampling_steps=2,
    compared_steps=(3,),
)


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in the files and the format of Fashion-MNIST: 60 training and 80 test images of ten classes."""
    folder = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 80)):
        pixels = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    return folder


def test_images_are_padded_and_lie_in_the_folder_of_their_class(fashion: Path, tmp_path: Path) -> None:
    source = open_source(write_fashion_mnist(replace(SMALL, data=fashion, output=tmp_path), "train"), channels=1)
    assert source.classes == tuple(sorted(FASHION))
    raw = gzip.decompress((fashion / "train-images-idx3-ubyte.gz").read_bytes())
    pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    for i in range(len(source)):
        number = int(Path(source.name(i)).stem)
        assert source.classes[source[i].label or 0] == FASHION[number % 10]
        assert np.array_equal(source[i].pixels[2:30, 2:30, 0], pixels[number])
        assert source[i].pixels[:2].max() == source[i].pixels[:, 30:].max() == 0
    with pytest.raises(DataError, match=r"does not hold Fashion-MNIST's idx.gz files"):
        write_fashion_mnist(replace(SMALL, data=tmp_path, output=tmp_path), "t10k")


def test_the_halves_share_no_image(fashion: Path, tmp_path: Path) -> None:
    config = replace(SMALL, data=fashion, output=tmp_path)
    names = [set(zipfile.ZipFile(half).namelist()) for half in halves(config, write_fashion_mnist(config, "t10k"))]
    assert [len(n) for n in names] == [40, 40]
    assert not names[0] & names[1]


def test_everything_is_trained_sampled_and_judged_and_a_second_time_nothing_is_left_to_train(
    fashion: Path, tmp_path: Path, in_process: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def recorded(script: str, *words: Any) -> float:
        ran.append(Path(script).stem)
        return in_process(script, *words)

    monkeypatch.setattr(class_conditional, "seconds_of_script", recorded)
    config = replace(SMALL, data=fashion, output=tmp_path / "run")
    main(config)
    assert ran == "train_vae cache_latents train_diffusion train_classifier generation".split()
    record = json.loads((config.output / "results.json").read_text())
    assert record["training_seconds"] == {"vae": 1.0, "cache": 1.0, "diffusion": 1.0, "all": 3.0}
    assert 0 < record["vae_val_psnr"] < 30
    results = record["figures"]["results"]
    assert list(results) == [
        *("real against real", "reconstructions"),
        *("guidance 1, 2 steps of sde-dpmsolver++", "guidance 2 in 0.3 to 0.8, 2 steps of sde-dpmsolver++"),
    ]
    assert "guidance 1, 3 steps" in record["figures"]["compared"]["results"]
    generated = config.output / "figures" / "generated"
    assert (generated / "guidance 2 in 0.3 to 0.8, 2 steps of sde-dpmsolver++" / "contact_sheet.png").exists()
    ran.clear()
    main(replace(config, guidance_scales=(*config.guidance_scales, 1.5)))
    assert ran == ["generation"]
    judged = json.loads((config.output / "results.json").read_text())
    new = judged["figures"]["results"].keys() - results.keys()
    assert new == {"guidance 1.5, 2 steps of sde-dpmsolver++"}
    with pytest.raises(RunError, match=r"other settings \(steps: 2 -> 3\): choose another --output"):
        main(replace(config, steps=3))
    (config.output / "seconds.json").unlink()
    with pytest.raises(RunError, match="vae was not finished: its time is not known"):
        main(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "ddim"}, "scheduler ddim does not fit flow"),
        ({"denoiser": "huge"}, "no denoiser huge: try demo"),
        ({"min_snr_gamma": 0.0}, "--min-snr-gamma is 0.0: it must be more than 0"),
        ({"label_dropout": 1.5}, "--label-dropout is 1.5: it must be at least 0 and at most 1"),
    ],
)
def test_what_cannot_be_trained_or_sampled_is_refused_before_anything_is_made(
    changes: dict[str, Any], message: str, fashion: Path, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        main(replace(SMALL, data=fashion, output=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_the_default_scheduler_is_left_to_the_pipeline_so_that_its_samples_are_compared_too(
    fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        class_conditional, "seconds_of_script", lambda name, *words: float(ran.append((name, *words)) or 1.0)
    )
    config = replace(SMALL, data=fashion, output=tmp_path, mixed_precision="auto")
    for scheduler, given in (("dpmsolver++", False), ("euler", True)):
        judge(replace(config, scheduler=scheduler), "train.zip", write_fashion_mnist(config, "t10k"))
        words = ran[-1]
        assert ("--scheduler" in words) is given
        assert words[words.index("--mixed-precision") + 1] in ("no", "bf16")


def test_what_a_script_says_is_passed_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(f'a warning\\nerror: no such model: {sys.argv[1]}')")
    with pytest.raises(RunError, match=r"script\.py: no such model: 3"):
        class_conditional.seconds_of_script(str(script), 3)
