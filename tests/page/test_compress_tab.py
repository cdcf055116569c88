"""The functions behind the page's tab *Compress*, without a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_vae.data.images import Pixels
from ldm_vae.data.sources import open_source
from ldm_vae.page.flags import Page
from tests.command_line import fails, run

pytest.importorskip("gradio", reason="Gradio is not installed")

from ldm_vae.page.compress import compare, show
from ldm_vae.page.events import in_a_folder, reduced


def image_of(width: int, height: int) -> Pixels:
    pixels = open_source("procedural:dead-leaves@3", resolution=64)[0].pixels
    return np.tile(pixels, (-(-height // 64), -(-width // 64), 1))[:height, :width]


def save(file: Path, width: int, height: int) -> Path:
    Image.fromarray(image_of(width, height)).save(file)
    return file


def outputs(tmp_path: Path, file: Path, quality: float = 75, **flags: Any) -> list[Any]:
    """The first values that the event gives the tab, and the bytes of the download behind them."""
    (tmp_path / "work").mkdir(exist_ok=True)
    return next(show(Page(**flags), tmp_path / "work", str(file), quality))


@pytest.mark.parametrize(("width", "height", "quality"), [(60, 40, 75), (1, 1, 20), (16384, 1, 90)])
def test_the_download_is_the_file_of_the_command_at_any_size(
    width: int, height: int, quality: int, tmp_path: Path
) -> None:
    photo = save(tmp_path / "a.png", width, height)
    slider, opened, facts, download, comparison, *_ = outputs(tmp_path, photo, quality)
    run("compress", photo, tmp_path / "own.ldi", "--quality", quality)
    assert Path(download["value"]).name == "a.ldi"
    assert Path(download["value"]).read_bytes() == (tmp_path / "own.ldi").read_bytes()
    run("decompress", tmp_path / "own.ldi", tmp_path / "own.png")
    assert np.array_equal(slider["value"][0], np.asarray(Image.open(photo)))
    assert np.array_equal(slider["value"][1], np.asarray(Image.open(tmp_path / "own.png")))
    assert f"{(tmp_path / 'own.ldi').stat().st_size:,} bytes" in facts["value"]
    assert (slider["visible"], comparison["visible"], opened["visible"]) == (True, True, False)


def test_a_dropped_compressed_file_is_shown_with_its_png_to_download(tmp_path: Path) -> None:
    run("compress", save(tmp_path / "a.png", 50, 30), "--quality", 40)
    slider, opened, facts, download, comparison, *_ = outputs(tmp_path, tmp_path / "a.ldi")
    run("decompress", tmp_path / "a.ldi", tmp_path / "own.png")
    assert Path(download["value"]).read_bytes() == (tmp_path / "own.png").read_bytes()
    assert np.array_equal(opened["value"], np.asarray(Image.open(tmp_path / "own.png")))
    assert "quality 40" in facts["value"]
    assert "50 x 30 pixels" in facts["value"]
    assert (slider["visible"], comparison["visible"], opened["visible"]) == (False, False, True)


def bad_files(folder: Path) -> dict[str, Path]:
    files = {name: folder / name for name in ("text.png", "empty.jpg", "channels.npy", "text.ldi", "cut.ldi")}
    for name in ("text.png", "text.ldi"):
        files[name].write_text("a letter, not an image\n")
    files["empty.jpg"].touch()
    np.save(files["channels.npy"], np.zeros((8, 8, 13), np.uint8))
    run("compress", save(folder / "whole.png", 40, 40))
    files["cut.ldi"].write_bytes((folder / "whole.ldi").read_bytes()[:-9])
    return files


def test_a_bad_file_is_answered_with_the_sentence_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import gradio

    for name, file in bad_files(tmp_path).items():
        command = "decompress" if file.suffix == ".ldi" else "compress"
        said = fails(capsys, command, file, tmp_path / f"out{'.png' if file.suffix == '.ldi' else '.ldi'}")
        with pytest.raises(gradio.Error) as error:
            list(in_a_folder(lambda folder, file=file: show(Page(), folder, str(file), 75))())
        reason = said.removeprefix("error: ").removeprefix(f"{file}: ")
        assert error.value.message.lower() == f"{reason}.".lower(), name


def test_an_image_over_the_limit_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    import gradio

    photo = save(tmp_path / "a.png", 40, 30)
    with pytest.raises(gradio.Error, match="40x30 is more than the limit of 1000 pixels"):
        list(in_a_folder(lambda folder: show(Page(max_pixels=1000), folder, str(photo), 75))())


def test_files_of_an_event_are_gone_when_it_is_over(tmp_path: Path) -> None:
    seen: list[Path] = []

    def act(folder: Path) -> Any:
        seen.append(folder)
        (folder / "file").touch()
        yield folder.exists()

    assert list(in_a_folder(act)()) == [True]
    assert not seen[0].exists()


def test_ours_and_the_others_are_compared_at_one_size_in_the_middle_of_a_large_image() -> None:
    from ldm_vae.codec.codec import LatentCodec

    codec = LatentCodec.from_pretrained("box:codec")
    ours, *others = compare(codec, image_of(800, 24), 60)
    assert ours.pixels.shape == (24, 768, 3)
    assert [rival.name for rival in others] == ["JPEG", "AVIF"]
    assert all(rival.size <= ours.size for rival in others)
    assert all(np.isfinite(rival.score) and rival.score < 100 for rival in (ours, *others))
    assert f"{ours.size:,} bytes, SSIMULACRA2" in ours.label
    [one, *_] = compare(codec, image_of(1, 1), 60)
    assert one.label == f"ldm-vae: {one.size} bytes"


def test_a_browser_is_shown_a_large_image_at_the_same_proportions() -> None:
    assert reduced(np.zeros((400, 100, 3), np.uint8), 10_000).shape == (200, 50, 3)
    assert reduced(np.zeros((40, 10, 3), np.uint8), 10_000).shape == (40, 10, 3)
