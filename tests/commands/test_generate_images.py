"""`ldm-vae generate`: the script's images, with defaults of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.command_line import fails, run
from tests.pipelines.test_generate import save_pipeline


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_pipeline(tmp_path_factory.mktemp("flowers"), classes=("daisies", "roses", "tulips"))


def names_in(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))


def test_sixteen_images_of_all_classes_or_of_those_that_are_named(
    flowers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("generate", "--model", flowers, "--steps", 1)
    assert len(names_in(tmp_path / "generated")) == 17  # and the contact sheet
    run("generate", "--model", flowers, "--steps", 1, "--class", "roses", "--class", 0, "-o", "two", "--num-images", 3)
    assert names_in(tmp_path / "two") == [
        *("contact_sheet.png", "daisies/00000001.png", "roses/00000000.png", "roses/00000002.png")
    ]
    assert Image.open("two/roses/00000000.png").info["class"] == "roses"
    Image.new("RGB", (12, 16)).save("photo.png")
    run("generate", "--model", flowers, "--steps", 2, "--image", "photo.png", "-o", "from")
    assert names_in(tmp_path / "from") == ["00000000.png", "contact_sheet.png"]


def test_a_class_that_is_not_there_is_one_line_with_those_that_are(
    flowers: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ("generate", "--model", flowers, "-o", tmp_path / "out", "--steps", 1)
    assert "there is no class wasps: try daisies, roses, tulips" in fails(capsys, *words, "--class", "wasps")
    assert "the model's are 0 to 2" in fails(capsys, *words, "--class", 7)
    assert "no such model: box:nothing (the box has box:codec" in fails(capsys, "generate", "--model", "box:nothing")
    of_the_box = fails(capsys, "generate", "-o", tmp_path / "out", "--class", "wasps")
    assert "there is no class wasps: try daisy, dandelion, roses, sunflowers, tulips" in of_the_box
    assert not (tmp_path / "out").exists()
