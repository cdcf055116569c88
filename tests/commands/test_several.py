"""Several inputs and where they go, quality on the command line, and what `info` says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.quality import step_of_quality
from tests.command_line import fails, run


@pytest.fixture
def two(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a.png, b.jpg, and an empty folder out."""
    first, second = sorted(photos.rglob("*.png"))[:2]
    shutil.copy(first, tmp_path / "a.png")
    Image.open(second).convert("RGB").save(tmp_path / "b.jpg")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_several_files_go_into_the_folder_named_last(model: Path, two: Path, capsys: pytest.CaptureFixture) -> None:
    words = ("--model", model, "--workers", 1)
    run("compress", "a.png", "b.jpg", "out", *words)
    assert names_in(two / "out") == ["a.ldi", "b.ldi"]
    run("compress", "a.png", "own.ldi", *words)
    assert (two / "own.ldi").read_bytes() == (two / "out" / "a.ldi").read_bytes()
    run("compress", "a.png", "b.jpg", "-o", "new/deep/", *words)
    assert names_in(two / "new" / "deep") == ["a.ldi", "b.ldi"]
    assert "2 of 2 files done" in capsys.readouterr().err
    run("decompress", "out/a.ldi", "out/b.ldi", "back/", *words, "--extension", ".bmp")
    assert names_in(two / "back") == ["a.bmp", "b.bmp"]
    codec = LatentCodec.from_pretrained(str(model))
    for name in "ab":
        expected = codec.decompress((two / "out" / f"{name}.ldi").read_bytes())
        assert np.array_equal(np.asarray(Image.open(two / "back" / f"{name}.bmp")), np.asarray(expected))


def test_one_file_goes_beside_itself_into_a_folder_or_to_the_output(model: Path, two: Path) -> None:
    words = ("--model", model)
    run("compress", "a.png", *words)
    run("compress", "a.png", "out", *words)
    run("compress", "a.png", "new/", *words)
    run("compress", "a.png", "-o", "c.ldi", *words)
    run("compress", *words, "--output", "out/d.ldi", "a.png")
    made = [two / name for name in ("a.ldi", "out/a.ldi", "new/a.ldi", "c.ldi", "out/d.ldi")]
    assert len({file.read_bytes() for file in made}) == 1
    run("decompress", "c.ldi", "out", *words)
    run("decompress", "c.ldi", "--extension", ".bmp", *words)
    assert np.array_equal(np.asarray(Image.open("out/c.png")), np.asarray(Image.open("c.bmp")))


def test_several_files_go_on_past_a_bad_one_and_where_they_stopped(
    model: Path, two: Path, capsys: pytest.CaptureFixture
) -> None:
    (two / "bad.png").write_bytes(b"nothing")
    words = ("compress", "a.png", "bad.png", "none.png", "b.jpg", "out", "--model", model, "--workers", 1)
    assert "2 of 4 files could not be done" in fails(capsys, *words)
    assert names_in(two / "out") == ["a.ldi", "b.ldi"]
    before = (two / "out" / "a.ldi").stat().st_mtime_ns
    assert "2 of 2 files could not be done" in fails(capsys, *words)
    assert (two / "out" / "a.ldi").stat().st_mtime_ns == before


def test_names_of_several_files_stay_apart(model: Path, two: Path, capsys: pytest.CaptureFixture) -> None:
    words = ("--model", model, "--workers", 1)
    shutil.copy("a.png", "b.png")
    run("compress", "b.jpg", "b.png", "out", *words)
    assert names_in(two / "out") == ["b.jpg.ldi", "b.png.ldi"]
    (two / "other").mkdir()
    shutil.copy("a.png", "other/a.png")
    assert "2 inputs are called a.png" in fails(capsys, "compress", "a.png", "other/a.png", "out", *words)


def test_paths_that_leave_open_which_is_the_output_are_refused_and_nothing_is_lost(
    model: Path, two: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ("--model", model, "--overwrite")
    shutil.copy("a.png", "c.png")
    run("compress", "a.png", "out", *words)
    shutil.copy("out/a.ldi", "b.ldi")
    before = {file: file.read_bytes() for file in two.rglob("*.*")}
    assert "several images go into a folder" in fails(capsys, "compress", "a.png", "c.png", *words)
    assert "several files go into a folder" in fails(capsys, "decompress", "out/a.ldi", "b.ldi", *words)
    for last in ("c.png", "nowhere"):
        said = fails(capsys, "compress", "a.png", "b.jpg", last, *words)
        assert f"{last} is not a folder, and there are 2 inputs" in said
    assert "x.ldi is not a folder, and there are 2" in fails(
        capsys, "compress", "a.png", "b.jpg", "-o", "x.ldi", *words
    )
    assert "the folder out is among several inputs" in fails(capsys, "compress", "a.png", "out", "new/", *words)
    assert "standard input is among several" in fails(capsys, "compress", "a.png", "-", "out", *words)
    assert "out is a folder" in fails(capsys, "compress", "-", "out", *words)
    assert "name a file" in fails(capsys, "compress", *words)
    assert "for folders" in fails(capsys, "compress", "a.png", "b.jpg", "out", *words, "--only-if-smaller")
    assert {file: file.read_bytes() for file in two.rglob("*.*")} == before


def test_quality_is_75_unless_given_and_more_is_better(model: Path, two: Path, capsys: pytest.CaptureFixture) -> None:
    words = ("compress", "a.png", "--model", model, "-o")
    run(*words, "usual.ldi")
    run(*words, "75.ldi", "--quality", 75)
    run(*words, "60.ldi", "--quality", 60)
    run(*words, "step.ldi", "--step", step_of_quality(60))
    assert Path("usual.ldi").read_bytes() == Path("75.ldi").read_bytes()
    assert Path("60.ldi").read_bytes() == Path("step.ldi").read_bytes()
    assert Path("60.ldi").stat().st_size < Path("75.ldi").stat().st_size


def test_effort_is_made_where_asked_and_refused_with_a_target(
    model: Path, two: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ("compress", "a.png", "--model", model, "-o")
    run(*words, "better.ldi", "--effort", 1, "--step", 0.5)
    codec = LatentCodec.from_pretrained(str(model))
    with Image.open("a.png") as image:
        assert Path("better.ldi").read_bytes() == codec.compress(image, effort=1, step=0.5)
        assert Path("better.ldi").read_bytes() != codec.compress(image, step=0.5)
    assert "--effort is for --quality and --step" in fails(capsys, *words, "b.ldi", "--effort", 1, "--target-bpp", 1)
    assert "--effort is 4: it must be at least 0 and at most 3" in fails(capsys, *words, "b.ldi", "--effort", 4)
    assert not Path("b.ldi").exists()


def test_a_quality_out_of_reach_is_said_once_for_all_files(
    model: Path, two: Path, capsys: pytest.CaptureFixture
) -> None:
    run("compress", "a.png", "b.jpg", "out", "--model", model, "--workers", 1, "--quality", 100)
    assert capsys.readouterr().err.count("quality 100 is out of this model's reach: its finest, step 0.375") == 1
    run("compress", "a.png", "--model", model, "--step", 0.375)
    assert Path("a.ldi").read_bytes() == Path("out/a.ldi").read_bytes()
    assert "reach" not in capsys.readouterr().err


def test_info_says_the_quality_and_everything_as_json(model: Path, two: Path, capsys: pytest.CaptureFixture) -> None:
    run("compress", "a.png", "b.jpg", "out", "--model", model, "--workers", 1, "--quality", 70)
    capsys.readouterr()
    run("info", "out/a.ldi")
    step = round(256 * step_of_quality(70)) / 256
    assert f"70 (step {step:g})" in capsys.readouterr().out
    run("info", "out/a.ldi", "--json")
    facts = json.loads(capsys.readouterr().out)
    size = (two / "out" / "a.ldi").stat().st_size
    assert facts | {"model": "", "metadata": [], "sections": {}} == {
        "file": "out/a.ldi",
        "bytes": size,
        "bits_per_pixel": round(8 * size / (72 * 60), 4),
        "width": 72,
        "height": 60,
        "channels": 3,
        "bits": 8,
        "quality": 70.0,
        "step": step,
        "tuning": "visual",
        "latent_channels": facts["latent_channels"],
        "stride": facts["stride"],
        "tiles": 1,
        "tile_side": 128,
        "sections": {},
        "metadata": [],
        "model": "",
    }
    assert facts["model"] == LatentCodec.from_pretrained(str(model)).digest.hex()


def test_info_of_several_files_is_a_list_and_goes_on_past_a_bad_one(
    model: Path, two: Path, capsys: pytest.CaptureFixture
) -> None:
    run("compress", "a.png", "b.jpg", "out", "--model", model, "--workers", 1)
    capsys.readouterr()
    run("info", "out/a.ldi", "out/b.ldi", "--json")
    assert [facts["file"] for facts in json.loads(capsys.readouterr().out)] == ["out/a.ldi", "out/b.ldi"]
    with pytest.raises(SystemExit) as exit_:
        run("info", "out/a.ldi", "a.png", "out/b.ldi", "--json")
    said = capsys.readouterr()
    assert exit_.value.code == 2
    assert len(json.loads(said.out)) == 2
    assert "a.png: not a compressed image" in said.err
    assert "name a file" in fails(capsys, "info")
