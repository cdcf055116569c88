"""`--like RUN`: a new run with another run's settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ldm_vae.errors import ConfigError, RunError
from ldm_vae.runs.config import as_json, parse_config
from training import train_diffusion, train_vae


def write_run(folder: Path, config: object, **others: object) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": as_json(config) | others}))
    return str(folder)


def parse(*words: str, trainer: object = train_vae) -> object:
    return parse_config(trainer.PRESETS, description="", args=list(words))  # type: ignore[attr-defined]


def test_a_run_like_another_has_its_settings_but_for_the_flags_that_are_given(tmp_path: Path) -> None:
    words = ("--data", "photos", "--data", "more:2", "--steps", "77", "--value-range", "0", "4", "--seed", "5")
    old = parse("f8c8", "--output", "old", "--extend", *words)
    run = write_run(tmp_path / "old", old)
    for preset in ((), ("f8c8",)):
        new = parse(*preset, "--like", run, "--output", "new", "--kl-weight", "0")
        assert new == replace(old, output=Path("new"), like=Path(run), extend=False, kl_weight=0.0)
    new = parse(f"--like={run}", "--output", "new", "--data", "mine", "--value-range", "None")
    assert new == replace(
        old,
        output=Path("new"),
        like=Path(run),
        extend=False,
        data=("mine",),
        reading=replace(old.reading, value_range=None),
    )


def test_paths_come_back_as_paths(tmp_path: Path) -> None:
    old = parse("tiny", "--output", "old", "--latents", "cache", trainer=train_diffusion)
    run = write_run(tmp_path / "old", old)
    new = parse("--like", run, "--output", "new", trainer=train_diffusion)
    assert new == replace(old, output=Path("new"), like=Path(run))
    assert new.latents == Path("cache")


def test_settings_that_are_no_longer_there_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = parse("f4c3", "--output", "old", "--data", "photos")
    run = write_run(tmp_path / "old", old, posterior="gaussian", perceptual="dists", data="photos")
    new = parse("--like", run, "--output", "new")
    assert new == replace(old, output=Path("new"), like=Path(run))
    said = capsys.readouterr().err
    assert said == f"--like {run}: left out, as they are no longer there: perceptual dists, posterior gaussian\n"


def test_a_run_that_cannot_serve_is_said_in_one_line(tmp_path: Path) -> None:
    vae = write_run(tmp_path / "vae", parse("demo", "--output", "old", "--data", "photos"))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{}")
    for error, said, trainer, words in (
        (ConfigError, "there is no run", train_vae, ("--like", str(tmp_path / "nowhere"), "--output", "new")),
        (RunError, "is not a run's configuration", train_vae, ("--like", str(tmp_path / "odd"), "--output", "new")),
        (ConfigError, "is a run of demo, not of f8c4", train_vae, ("f8c4", "--like", vae, "--output", "new")),
        (ConfigError, "is no run of this trainer, whose presets are demo, tiny", train_diffusion, ("--like", vae)),
        (ConfigError, "--output", train_vae, ("--like", vae)),
        (ConfigError, "expected one argument", train_vae, ("demo", "--like")),
    ):
        with pytest.raises(error, match=said):
            parse(*words, trainer=trainer)
