from __future__ import annotations

import io
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.picture import as_picture, encode_picture, read_picture
from ldm_vae.codec.tables import load_tables
from ldm_vae.data import large
from ldm_vae.data.metadata import Metadata
from ldm_vae.metrics import psnr
from tests.command_line import fails, run


def test_a_file_goes_there_and_back(model: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small, back = tmp_path / "a.ldi", tmp_path / "a.png"
    run("compress", image, small, "--model", model, "--step", 0.5)
    run("decompress", small, back, "--model", model)
    codec = LatentCodec.from_pretrained(str(model))
    expected = codec.decompress(codec.compress(Image.open(image), step=0.5))
    assert np.array_equal(np.asarray(Image.open(back)), np.asarray(expected))
    run("decompress", small, tmp_path / "part.bmp", "--model", model, "--region", 3, 4, 20, 10)
    assert Image.open(tmp_path / "part.bmp").size == (20, 10)
    capsys.readouterr()
    run("info", small)
    said = capsys.readouterr().out
    assert "72 x 60 pixels" in said
    assert f"({small.stat().st_size} bytes)" in said
    assert codec.digest.hex() in said


def test_tables_are_written_beside_the_model_or_with_a_copy_of_it(model: Path, photos: Path, tmp_path: Path) -> None:
    assert load_tables(model / "codec").steps == (96, 128, 256)
    run("fit-codec", "--vae", model, "--data", photos, "--output", tmp_path / "copy", "--num-images", 2)
    assert len(load_tables(tmp_path / "copy" / "codec").steps) == 7
    LatentCodec.from_pretrained(str(tmp_path / "copy"))


def test_targets_are_met(model: Path, image: Path, tmp_path: Path) -> None:
    run("compress", image, tmp_path / "fine.ldi", "--model", model, "--step", 0.6)
    bpp = 8 * (tmp_path / "fine.ldi").stat().st_size / (72 * 60)
    run("compress", image, tmp_path / "met.ldi", "--model", model, "--target-bpp", bpp)
    run("compress", image, tmp_path / "coarse.ldi", "--model", model, "--step", 1)
    sizes = [(tmp_path / f"{name}.ldi").stat().st_size for name in ("coarse", "met", "fine")]
    assert sizes[0] < sizes[1] <= sizes[2]
    run("compress", image, tmp_path / "met.ldi", "--model", model, "--target-size", sizes[1], "--overwrite")
    assert (tmp_path / "met.ldi").stat().st_size == sizes[1]
    pixels = np.asarray(Image.open(image).convert("RGB"))
    figures = {}
    for name in ("coarse", "fine"):
        decoded = LatentCodec.from_pretrained(str(model)).decompress((tmp_path / f"{name}.ldi").read_bytes())
        figures[name] = psnr(pixels[None], np.asarray(decoded)[None])[0]
    wanted = min(figures.values()) - 0.01  # untrained: finer is hardly better
    run("compress", image, tmp_path / "good.ldi", "--model", model, "--target-psnr", wanted)
    run("decompress", tmp_path / "good.ldi", tmp_path / "good.png", "--model", model)
    assert psnr(pixels[None], np.asarray(Image.open(tmp_path / "good.png"))[None])[0] >= wanted


def test_metadata_is_kept_unless_it_is_stripped(
    model: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    exif, text = Image.Exif(), PngInfo()
    exif[0x010E] = "a description"
    text.add_text("prompt", "a cat, a mat")
    text.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta/>")
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.open(image).convert("RGB").save(tmp_path / "a.png", exif=exif, icc_profile=icc, pnginfo=text, dpi=(300, 300))
    there, back = (tmp_path / "a.png", tmp_path / "a.ldi"), (tmp_path / "a.ldi", tmp_path / "b.png")
    run("compress", *there, "--model", model, "--strip")
    run("decompress", *back, "--model", model)
    assert read_picture(tmp_path / "b.png").metadata == Metadata()
    run("compress", *there, "--model", model, "--overwrite")
    run("decompress", *back, "--model", model, "--overwrite")
    given, found = (read_picture(file).metadata for file in (tmp_path / "a.png", tmp_path / "b.png"))
    assert replace(found, resolution=None) == replace(given, resolution=None)
    assert found.resolution == pytest.approx((300, 300), abs=0.01)
    assert found.text == (("prompt", "a cat, a mat"),)
    capsys.readouterr()
    run("info", tmp_path / "a.ldi")
    assert 'ICC profile, EXIF, XMP, resolution, text "prompt"' in capsys.readouterr().out
    jpeg = ("decompress", tmp_path / "a.ldi", tmp_path / "b.jpg", "--model", model)
    lost = '.jpg holds no text "prompt": left out'
    assert lost in fails(capsys, *jpeg, "--strict")
    assert not (tmp_path / "b.jpg").exists()
    run(*jpeg)
    assert capsys.readouterr().err == f"{tmp_path / 'a.ldi'}: {lost}\n"


def test_an_original_is_not_written_over(
    model: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    original = tmp_path / "a.png"
    shutil.copy(image, original)
    (tmp_path / "link.ldi").symlink_to(original)
    os.link(original, tmp_path / "hard.ldi")
    words = ("--model", model, "--overwrite")
    for name in ("a.png", "link.ldi", "hard.ldi"):
        assert "is the input itself" in fails(capsys, "compress", original, tmp_path / name, *words, "--force")
    for name in ("a.png", "o.jpg", "o"):
        assert "not named .ldi" in fails(capsys, "compress", original, tmp_path / name, *words)
    assert original.read_bytes() == image.read_bytes()
    run("compress", original, tmp_path / "o.jpg", "--model", model, "--force")
    run("compress", original, os.devnull, "--model", model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "hard.ldi", "link.ldi", "o.jpg"]
    run("decompress", tmp_path / "o.jpg", tmp_path / "again.png", "--model", model)


def test_what_is_left_out_is_said_and_with_strict_an_error(
    model: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(image, source / "whole.png")
    frames = [Image.new("L", (40, 30), level) for level in (0, 90, 180)]
    frames[0].save(source / "moving.gif", save_all=True, append_images=frames[1:])
    np.save(source / "float.npy", np.linspace(-1, 3, 1200, dtype=np.float32).reshape(30, 40))
    (source / "notes.txt").write_text("no image")
    words = ("--model", model, "--workers", 1)
    assert "1 of 3 files could not be done" in fails(capsys, "compress", source, tmp_path / "out", *words)
    run("compress", source, tmp_path / "out", *words, "--value-range", -1, 3)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"{source}: not read: 1 .txt"
    run("compress", source / "moving.gif", tmp_path / "a.ldi", *words)
    assert capsys.readouterr().err == f"{source / 'moving.gif'}: 1 of 3 frames\n"
    strict = (*words, "--strict", "--value-range", -1, 3)
    fails(capsys, "compress", source, tmp_path / "strict", *strict)
    assert sorted(p.name for p in (tmp_path / "strict").iterdir()) == ["float.ldi", "whole.ldi"]
    assert "1 of 3 frames" in fails(capsys, "compress", source / "moving.gif", tmp_path / "b.ldi", *strict)
    assert not (tmp_path / "b.ldi").exists()
    assert "not read: 3 .ldi" in fails(capsys, "compress", tmp_path / "out", tmp_path / "none", *words)


def test_bytes_do_not_go_to_a_terminal(
    model: Path, image: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "is a terminal" in fails(capsys, "compress", image, "-", "--model", model)


def test_a_name_that_begins_with_a_dash_needs_more(
    model: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hint = "error: -x.ldi was read as a flag: if it is a file, write ./-x.ldi, or -- before it; "
    assert fails(capsys, "info", "-x.ldi").startswith(hint)
    run("compress", "--model", model, "--", image, "-x.ldi")
    run("info", "--", "-x.ldi")
    run("info", "./-x.ldi")


def test_times_are_kept_where_asked(model: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(image, tmp_path / "in" / "a.png")
    os.utime(tmp_path / "in" / "a.png", (1e9, 1e9))
    words = ("--model", model, "--keep-times", "--workers", 1)
    run("compress", tmp_path / "in", tmp_path / "small", *words)
    run("decompress", tmp_path / "small" / "a.ldi", tmp_path / "a.png", *words)
    assert (tmp_path / "small" / "a.ldi").stat().st_mtime == (tmp_path / "a.png").stat().st_mtime == 1e9
    assert "no times" in fails(capsys, "compress", image, "-", *words)


def test_a_folder_ends_with_bytes_before_and_after_and_what_grew(
    model: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    Image.open(image).convert("RGB").save(source / "large.bmp")
    (source / "small.pgm").write_bytes(b"P5 1 1 255\n\0")
    words = ("--model", model, "--workers", 1)
    run("compress", source, tmp_path / "out", *words)
    before = sum(p.stat().st_size for p in source.iterdir())
    after = sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    said = capsys.readouterr().err
    assert f"2 of 2 files done; they are in {tmp_path / 'out'}; {before} -> {after} bytes" in said
    assert f"({100 * (after / before - 1):+.1f}%), 1 grew" in said
    for _ in range(2):
        run("compress", source, tmp_path / "kept", *words, "--only-if-smaller")
        assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["large.ldi", "small.pgm"]
    assert (tmp_path / "kept" / "small.pgm").read_bytes() == (source / "small.pgm").read_bytes()
    said = capsys.readouterr().err
    assert "1 copied as they were" in said
    assert "0 of 0 files done, 2 were there" in said
    assert "for folders" in fails(capsys, "compress", image, tmp_path / "x.ldi", *words, "--only-if-smaller")


def test_what_was_copied_because_it_would_have_grown_comes_out_of_its_folder_again(
    model: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source, kept, back = (tmp_path / name for name in ("in", "kept", "back"))
    (source / "below").mkdir(parents=True)
    (source / "below" / "small.pgm").write_bytes(b"P5 1 1 255\n\0")
    (source / "unnamed").write_bytes(b"P5 # a comment\n1 1 255\n\0")
    Image.open(image).convert("RGB").save(source / "below" / "small.bmp")
    Image.open(image).convert("RGB").save(source / "large.bmp")
    words = ("--model", model, "--workers", 1)
    run("compress", source, kept, *words, "--only-if-smaller")
    (kept / "notes.txt").write_text("no image")
    capsys.readouterr()
    for said in ("4 of 4 files done", "0 of 0 files done, 4 were there"):
        run("decompress", kept, back, *words)
        assert said in capsys.readouterr().err
    names = sorted(str(p.relative_to(back)) for p in back.rglob("*") if p.is_file())
    assert names == ["below/small.bmp.png", "below/small.pgm", "large.png", "unnamed"]
    for name in ("below/small.pgm", "unnamed"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    assert Image.open(back / "below" / "small.bmp.png").size == (72, 60)
    assert "2 of 4 files could not be done" in fails(
        capsys, "decompress", kept, tmp_path / "part", *words, "--region", 0, 0, 9, 9
    )
    run("decompress", source / "below", tmp_path / "copies", *words)  # no compressed file among them
    assert (tmp_path / "copies" / "small.pgm").read_bytes() == (source / "below" / "small.pgm").read_bytes()


def test_noise_that_nobody_sees_takes_no_bytes_unless_it_shall_stay_exact(model: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    pixels[8:24, 8:40, :3], pixels[:, :, 3] = 100, 0
    pixels[8:24, 8:40, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    run("compress", tmp_path / "a.png", tmp_path / "smooth.ldi", "--model", model, "--step", 0.5)
    run("compress", tmp_path / "a.png", tmp_path / "exact.ldi", "--model", model, "--step", 0.5, "--exact")
    assert 2 * (tmp_path / "smooth.ldi").stat().st_size < (tmp_path / "exact.ldi").stat().st_size
    codec = LatentCodec.from_pretrained(str(model))
    assert (tmp_path / "exact.ldi").read_bytes() == codec.compress(pixels, step=0.5)


def test_a_folder_goes_there_and_back_on_two_workers(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(photos, tmp_path / "in")
    first = sorted((tmp_path / "in").rglob("*.png"))[0]
    shutil.copy(first, first.with_suffix(".bmp"))  # differs from another in its extension alone
    first.parent.rename(tmp_path / "elsewhere")
    first.parent.symlink_to(tmp_path / "elsewhere")
    run("compress", tmp_path / "in", tmp_path / "small", "--model", model, "--workers", 2)
    assert "13 of 13 files done" in capsys.readouterr().err
    run("compress", tmp_path / "in", tmp_path / "alone", "--model", model, "--workers", 1)
    files = sorted(p.relative_to(tmp_path / "small") for p in (tmp_path / "small").rglob("*.ldi"))
    assert len(files) == 13
    assert {f"{first.name}.ldi", f"{first.stem}.bmp.ldi"} <= {f.name for f in files}
    for file in files:
        assert (tmp_path / "small" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    run("decompress", tmp_path / "small", tmp_path / "back", "--model", model, "--workers", 1)
    assert len(list((tmp_path / "back").rglob("*.png"))) == 13


def test_a_folder_goes_on_where_it_stopped_and_past_bad_files(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(photos, tmp_path / "in")
    (tmp_path / "in" / "bad.jpg").write_bytes(b"nothing")
    words = ("compress", tmp_path / "in", tmp_path / "out", "--model", model, "--workers", 1)
    assert "1 of 13 files could not be done" in fails(capsys, *words)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.ldi")}
    assert len(times) == 12
    assert "1 of 1 files" in fails(capsys, *words)  # the others are there
    assert {p: p.stat().st_mtime_ns for p in times} == times


def test_files_that_differ_in_their_extension_alone_become_files_of_different_names(
    model: Path, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "in" / ".hidden").mkdir(parents=True)
    for name in ("a.png", "a.bmp", "a.png.png", "b.png", ".hidden/b.png"):
        shutil.copy(image, tmp_path / "in" / name)
    words = ("compress", tmp_path / "in", tmp_path / "out", "--model", model, "--workers", 1)
    run(*words)
    files = ["a.bmp.ldi", "a.png.ldi", "a.png.png.ldi", "b.ldi"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == files
    old = (tmp_path / "out" / "a.png.ldi").read_bytes()
    run(*words, "--overwrite", "--step", 0.5)
    assert (tmp_path / "out" / "a.png.ldi").read_bytes() != old


def test_standard_input_and_output(model: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def piped(data: bytes, *words: object) -> bytes:
        out = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
            patch.setattr(sys, "stdout", io.TextIOWrapper(out))
            run(*words, "-", "-", "--model", model)
            return out.getvalue()

    made = piped(image.read_bytes(), "compress")
    run("compress", image, tmp_path / "a.ldi", "--model", model)
    run("decompress", tmp_path / "a.ldi", tmp_path / "a.png", "--model", model)
    assert made == (tmp_path / "a.ldi").read_bytes()
    assert piped(made, "decompress") == (tmp_path / "a.png").read_bytes()


def test_salvage_writes_what_is_whole_and_says_the_rest(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    Image.new("RGB", (530, 40), (200, 100, 50)).save(tmp_path / "a.png")
    run("compress", tmp_path / "a.png", tmp_path / "a.ldi", "--model", model)
    (tmp_path / "a.ldi").write_bytes((tmp_path / "a.ldi").read_bytes()[:-1])
    words = ("decompress", tmp_path / "a.ldi", tmp_path / "b.png", "--model", model)
    assert "ends after" in fails(capsys, *words)
    assert not (tmp_path / "b.png").exists()
    assert "tile 1" in fails(capsys, *words, "--salvage")
    assert Image.open(tmp_path / "b.png").getpixel((520, 10)) == (255, 0, 255)


def test_a_photo_alone_is_enough(image: Path, tmp_path: Path) -> None:
    """The model is that of the box, the output beside the input."""
    shutil.copy(image, tmp_path / "photo.png")
    run("compress", tmp_path / "photo.png")
    (tmp_path / "photo.png").unlink()
    run("decompress", tmp_path / "photo.ldi")
    with Image.open(tmp_path / "photo.png") as again, Image.open(image) as original:
        assert again.size == original.size
        difference = np.asarray(again.convert("RGB"), float) - np.asarray(original.convert("RGB"), float)
    assert 10 * np.log10(255**2 / np.square(difference).mean()) > 25


def test_what_cannot_work_is_said_in_one_line(
    model: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "x.ldi"
    compress = ("compress", image, out)
    assert "the box has box:codec" in fails(capsys, *compress, "--model", "box:nothing")
    assert "no such model" in fails(capsys, *compress, "--model", tmp_path / "nowhere")
    bare = tmp_path / "bare"
    shutil.copytree(model / "vae", bare)
    assert "fit-codec" in fails(capsys, *compress, "--model", bare)
    with_model = ("--model", model)
    nowhere = fails(capsys, "compress", tmp_path / "no.png", out, *with_model)
    assert nowhere == f"error: {tmp_path / 'no.png'}: No such file or directory"
    assert "give one of" in fails(capsys, *compress, *with_model, "--target-bpp", 1, "--target-psnr", 30)
    assert "cannot be reached" in fails(capsys, *compress, *with_model, "--target-psnr", 99)
    assert "try 100k" in fails(capsys, *compress, *with_model, "--target-size", "100 kilos")
    assert "10 bytes cannot be reached" in fails(capsys, *compress, *with_model, "--target-size", 10)
    assert "--quality is 0.5: it must be at least 1" in fails(capsys, *compress, *with_model, "--quality", 0.5)
    assert "give one of" in fails(capsys, *compress, *with_model, "--quality", 75, "--step", 1)
    assert "step 80 is far from" in fails(capsys, *compress, *with_model, "--step", 80)
    assert "no folder" in fails(capsys, "compress", image, tmp_path / "no" / "x.ldi", *with_model)
    assert "name the output, too" in fails(capsys, "compress", tmp_path, *with_model)
    assert "workers" in fails(capsys, *compress, *with_model, "--workers", -1)
    for device in ("cuda:99", "no-such-device"):
        assert f"--device {device}" in fails(capsys, *compress, *with_model, "--device", device)
    assert not out.exists()
    run(*compress, *with_model)
    assert "there already" in fails(capsys, *compress, *with_model)
    assert f"{image}: " in fails(capsys, "decompress", image, tmp_path / "y.png", *with_model)
    assert "begins otherwise" in fails(capsys, "decompress", image, tmp_path / "y.png", *with_model)
    (tmp_path / "cut").write_bytes(image.read_bytes()[:200])
    cut = fails(capsys, "compress", tmp_path / "cut", tmp_path / "y.ldi", *with_model)
    assert cut == f"error: {tmp_path / 'cut'}: cannot be decoded: truncated PNG"
    assert "begins otherwise" in fails(capsys, "info", image)
    assert "not within" in fails(capsys, "decompress", out, tmp_path / "y.png", *with_model, "--region", 0, 0, 99, 9)
    assert "limit" in fails(capsys, "decompress", out, tmp_path / "y.png", *with_model, "--max-side", 10)
    assert "name an image file" in fails(capsys, "decompress", out, tmp_path / "y", *with_model)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    assert "no images (not read: 1 .txt)" in fails(capsys, "decompress", tmp_path / "texts", tmp_path / "z")
    assert "inside the input" in fails(capsys, "compress", image.parent, image.parent / "z", *with_model)
    assert "standard output" in fails(capsys, "compress", image.parent, "-", *with_model)
    fit = ("fit-codec", "--vae", model, "--data", image.parent)
    assert "num-images" in fails(capsys, *fit, "--num-images", 0)
    assert "--output" in fails(capsys, "fit-codec", "--vae", "owner/name", "--data", image.parent)
    before = load_tables(model / "codec").digest
    assert "--overwrite" in fails(capsys, *fit)
    assert load_tables(model / "codec").digest == before
    assert "limit" in fails(capsys, "compress", image, tmp_path / "y.ldi", *with_model, "--max-side", 10)
    assert "name an image file" in fails(capsys, "decompress", image.parent, tmp_path / "z", "--extension", "png")
    assert not (tmp_path / "y.png").exists()


@pytest.mark.parametrize("kind", ["grey", "16 bits", "alpha"])
def test_large_images_go_by_way_of_the_disk(
    kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, dtype = {"grey": ((150, 210), "u1"), "16 bits": ((150, 210, 3), "u2"), "alpha": ((150, 210, 4), "u1")}[kind]
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype)
    exif = Image.Exif()
    exif[270] = "a title"
    given = as_picture(pixels)
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() if kind == "alpha" else b""
    given = replace(given, metadata=Metadata(exif=exif.tobytes().removeprefix(b"Exif\0\0"), icc=icc))
    (tmp_path / "in.png").write_bytes(encode_picture(given, ".png"))
    outputs = []
    for limit in (large.LARGE, 10_000):
        monkeypatch.setattr(large, "LARGE", limit)
        run("compress", tmp_path / "in.png", tmp_path / f"{limit}.ldi", "--model", model)
        run("decompress", tmp_path / f"{limit}.ldi", tmp_path / f"{limit}.png", "--model", model)
        found = read_picture((tmp_path / f"{limit}.png").read_bytes())
        assert found.metadata.icc == icc
        assert Image.open(tmp_path / f"{limit}.png").getexif()[270] == "a title"
        outputs.append([(tmp_path / f"{limit}.ldi").read_bytes(), found.whole()])
    assert outputs[0][0] == outputs[1][0]
    assert np.array_equal(outputs[0][1], outputs[1][1])
    assert len(list(tmp_path.iterdir())) == 5
