"""The refiner's trainer as people run it: launched, killed, resumed and misused; and the codec with what it makes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import ROOT, flags, largest_difference, launch, metrics, run_until_killed, state

from ldm_vae import cli
from ldm_vae.errors import LdmVaeError, ModelMismatchError, RunError
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from training.train_refiner import PRESETS, Config, draws_at, main

SCRIPT = str(ROOT / "training" / "train_refiner.py")
TINY = PRESETS["tiny"][1]


@pytest.fixture(scope="module")
def codec(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codec")
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(latent_channels=4, block_out_channels=(16, 16), linear_path=True)
    with torch.no_grad():
        vae.encoder.conv_out.bias[4:] = -1.0
    vae.save_pretrained(folder / "vae")
    cli.main(["fit-codec", "--vae", str(folder), "--data", str(photos), "--num-images", "5", "--qualities", "0.5", "1"])
    return folder


def config_for(codec: Path, photos: Path, output: Path, /, **changes: Any) -> Config:
    """Small and exact: 4 steps of 8 crops of 32 pixels, a checkpoint each second step."""
    settings: dict[str, Any] = {"resolution": 32, "steps": 4, "batch_size": 8, "learning_rate": 1e-4, "warmup_steps": 2}
    settings |= {"mixed_precision": "no", "num_workers": 0, "log_every": 1, "sample_every": 100, "checkpoint_every": 2}
    settings |= {"codec": str(codec), "data": str(photos), "output": output, "tracker": "none"}
    return replace(TINY, **settings | changes)


def words(config: Config) -> list[str]:
    return ["tiny", *flags(config, TINY)]


@pytest.fixture(scope="module")
def reference(codec: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "run"
    torch.set_num_threads(1)
    main(config_for(codec, photos, output))
    return output


def test_two_processes_and_micro_batches_and_one_process_give_the_same_network(
    reference: Path, codec: Path, photos: Path, tmp_path: Path
) -> None:
    two = launch(SCRIPT, words(config_for(codec, photos, tmp_path / "two")), 2)
    assert two.returncode == 0, two.stderr
    main(config_for(codec, photos, tmp_path / "micro", gradient_accumulation_steps=2))
    for other in ("two", "micro"):
        assert largest_difference(state(reference, 4), state(tmp_path / other, 4), ("unet", "ema")) < 1e-5
    assert largest_difference(state(reference, 4), state(reference, 2), ("unet",)) > 1e-5  # it trains


KILLER = """
import os, signal, sys
from ldm_vae.config import parse_config
from training import train_refiner
calls, real = 0, train_refiner.error_of
def error_of(*args):
    global calls
    calls += 1
    if calls == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
train_refiner.error_of = error_of
train_refiner.main(parse_config(train_refiner.PRESETS, description="", args=sys.argv[1:]))
"""


def test_a_killed_run_ends_bit_identical(reference: Path, codec: Path, photos: Path, tmp_path: Path) -> None:
    config = config_for(codec, photos, tmp_path / "run")
    run_until_killed(KILLER, words(config))
    main(config)
    a, b = state(reference, 4), state(tmp_path / "run", 4)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_run_says_how_much_error_is_left_and_an_untrained_network_leaves_all_of_it(
    reference: Path, codec: Path, photos: Path, tmp_path: Path
) -> None:
    main(config_for(codec, photos, tmp_path / "run", steps=1, learning_rate=1e-12, val_data=str(photos)))
    left = [m["val_left"] for m in metrics(tmp_path / "run") if "val_left" in m]
    # it says 0 where "noise - error" is asked for: both are left, and they are as large as one another
    assert left == [pytest.approx(2, abs=0.4)]


def test_draws_belong_to_positions_and_fill_their_ranges() -> None:
    config = replace(TINY, codec="c", data="d", output=Path("o"))
    quality, times = draws_at(list(range(2000)), config)
    assert quality.min() >= 0.5
    assert quality.max() <= 4
    assert times.min() >= 0
    assert float((times == 1).float().mean()) == pytest.approx(0.5, abs=0.04)
    assert float(quality.log2().mean()) == pytest.approx(0.5, abs=0.06)
    assert float(times[times < 1].mean()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(draws_at([7, 5], config)[1], times[[7, 5]])


def test_decompress_refines_with_the_run(
    reference: Path, codec: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    image, folder = sorted(photos.rglob("*.png"))[0], tmp_path / "files"
    folder.mkdir()
    file, model = str(folder / "a.ldi"), ["--model", str(codec)]
    cli.main(["compress", str(image), file, *model])
    cli.main(["decompress", file, str(tmp_path / "plain.png"), *model])
    refine = ["--refine", "2", "--refiner", str(reference)]
    cli.main(["decompress", file, str(tmp_path / "refined.png"), *model, *refine])
    cli.main(["decompress", str(folder), str(tmp_path / "folder"), *model, *refine, "--workers", "1"])
    names = ("plain.png", "refined.png", "folder/a.png")
    plain, refined, again = (np.asarray(Image.open(tmp_path / name)) for name in names)
    assert np.array_equal(refined, again)
    assert not np.array_equal(refined, plain)
    for wrong, message in (
        (["--refine", "1"], "holds no refiner"),
        (["--refine", "-1"], "must not be negative"),
        (["--refiner", str(reference)], "needs --refine"),
        ([*refine, "--region", "0", "0", "8", "8"], "whole pictures"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main(["decompress", file, str(tmp_path / "c.png"), *model, *wrong])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "c.png").exists()


def test_bad_images_are_named(codec: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "bad.png").write_bytes(b"no image")
    main(config_for(codec, tmp_path / "photos", tmp_path / "run", steps=1))
    assert "bad.png" in (tmp_path / "run" / "bad_images.csv").read_text()


def test_a_run_is_not_resumed_with_other_tables(codec: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(codec, tmp_path / "codec")
    main(config_for(tmp_path / "codec", photos, tmp_path / "run", steps=1))
    again = ["--vae", str(tmp_path / "codec"), "--data", str(photos), "--num-images", "4", "--qualities", "1"]
    cli.main(["fit-codec", *again, "--overwrite"])
    with pytest.raises(RunError, match="tables"):
        main(config_for(tmp_path / "codec", photos, tmp_path / "run", steps=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quality_range": (2.0, 1.0)}, "--quality-range"),
        ({"resolution": 20}, "multiple of 8|try"),
        ({"codec": "nowhere"}, "nowhere"),
        ({"data": "nowhere"}, "nowhere"),
        ({"steps": 0}, "--steps"),
    ],
)
def test_what_cannot_work_is_said(changes: dict, message: str, codec: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(LdmVaeError, match=message):
        main(config_for(codec, photos, tmp_path / "run", **changes))


def test_tables_of_another_vae_are_refused(codec: Path, photos: Path, tmp_path: Path) -> None:
    PatchAutoencoderKL(latent_channels=4, block_out_channels=(16, 16)).save_pretrained(tmp_path / "vae")
    (tmp_path / "codec").symlink_to(next(codec.rglob("tables.safetensors")).parent)
    with pytest.raises(ModelMismatchError, match="another autoencoder"):
        main(config_for(tmp_path, photos, tmp_path / "run"))
