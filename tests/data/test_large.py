from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from ldm_vae.data import large
from ldm_vae.data.large import read_large
from ldm_vae.data.metadata import NO_METADATA, Metadata
from ldm_vae.data.png import stream_png
from ldm_vae.data.reader import ReadOptions, read_image, read_large_image, read_pixels
from ldm_vae.errors import BadImageError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "LARGE", 1000)
    monkeypatch.setattr(large, "STRIP", 700)


def pixels_of(channels: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, np.iinfo(dtype).max + 1, (53, 91, channels), dtype)


def as_file(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, kind, **options)
    return file.getvalue()


CHANNELS = {"PNG": (1, 2, 3, 4), "TIFF": (1, 2, 3, 4), "JPEG": (1, 3), "WEBP": (1, 3, 4)}


@pytest.mark.parametrize(("kind", "channels"), [(kind, c) for kind, counts in CHANNELS.items() for c in counts])
def test_what_lies_on_disk_is_what_would_lie_in_memory(kind: str, channels: int, tmp_path: Path) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = as_file(pixels_of(channels), kind, **options)
    for asked in (None, 1, 3):
        on_disk = read_large(data, tmp_path, channels=asked, max_pixels=10**6)
        assert isinstance(on_disk, np.memmap)
        assert np.array_equal(on_disk, read_pixels(data, channels=asked or 3, keep_alpha=asked is None))
    assert list(tmp_path.iterdir()) == []


def test_what_only_others_read_right_is_left_to_them(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[274] = 6
    cmyk = Image.fromarray(pixels_of(3)).convert("CMYK")
    file = io.BytesIO()
    cmyk.save(file, "JPEG")
    for data in (as_file(pixels_of(3), "JPEG", exif=turned), file.getvalue(), b"none", as_file(pixels_of(3), "BMP")):
        assert read_large(data, tmp_path, channels=None, max_pixels=10**6) is None


def test_what_is_cut_short_or_too_large_is_refused(tmp_path: Path) -> None:
    data = as_file(pixels_of(3), "PNG")
    with pytest.raises(BadImageError, match="cannot be decoded"):
        read_large(data[: len(data) // 2], tmp_path, channels=3, max_pixels=10**6)
    with pytest.raises(BadImageError, match="91x53 is more than the limit of 4000 pixels"):
        read_large(data, tmp_path, channels=3, max_pixels=4000)
    assert list(tmp_path.iterdir()) == []


def test_damaged_pixels_of_a_large_tiff_are_refused_and_an_odd_tag_is_none(tmp_path: Path) -> None:
    for tag, damage in (((65000, 13, 1, 8, True), 0), (None, 9)):
        file = io.BytesIO()
        options = {"photometric": "rgb", "compression": "zlib", "extratags": [tag] if tag else []}
        tifffile.imwrite(file, pixels_of(3, np.uint16), **options)
        data = bytearray(file.getvalue())
        data[len(data) // 2 : len(data) // 2 + damage] = bytes(damage)
        if damage:
            with pytest.raises(BadImageError, match="cannot be decoded: damaged TIFF"):
                read_image(bytes(data), scratch=tmp_path)
        else:
            assert np.array_equal(read_image(bytes(data), scratch=tmp_path).pixels, pixels_of(3, np.uint16))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (2, np.uint8), (3, np.uint16), (4, np.uint16)])
def test_strips_become_one_file(channels: int, dtype: Any, tmp_path: Path) -> None:
    pixels = pixels_of(channels, dtype)
    exif = Image.Exif()
    exif[270], exif[50000] = "a title", "somebody's own"
    with open(tmp_path / "out", "wb") as out:
        parts = [pixels[:20], pixels[20:21], pixels[21:]]
        text = {"name": "ü.png", "no text": os.fsdecode(b"caf\xe9")}
        metadata = Metadata(icc=b"a profile", exif=exif.tobytes().removeprefix(b"Exif\0\0"))
        stream_png(out, parts, pixels.shape, metadata=metadata, text=text)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    data = (tmp_path / "out").read_bytes()
    assert np.array_equal(read_pixels(data, keep_alpha=True, channels=channels), pixels)
    with Image.open(tmp_path / "out") as image:
        assert dict(image.getexif()) == {270: "a title", 50000: "somebody's own"}
        assert image.info["name"] == "ü.png"
        assert image.info["no text"] == "caf\\udce9"
        assert image.info["icc_profile"] == b"a profile"


def test_nothing_is_said_of_an_image_that_nobody_said(tmp_path: Path) -> None:
    pixels = pixels_of(3)
    with open(tmp_path / "out", "wb") as out:
        stream_png(out, [pixels], pixels.shape)
    with Image.open(tmp_path / "out") as image:
        image.load()
        assert (dict(image.info), dict(image.getexif())) == ({}, {})


def test_a_name_that_is_no_text_is_read_as_any_other(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    file.write_bytes(as_file(pixels_of(3), "PNG"))
    found = read_image(file, options=ReadOptions(keep_colour=True), scratch=tmp_path)
    assert isinstance(found.pixels, np.memmap)
    assert np.array_equal(found.pixels, pixels_of(3))
    assert found.metadata == NO_METADATA


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_of_a_tiff_bands_are_bands_and_pages_are_pages(dtype: Any, tmp_path: Path) -> None:
    pixels = pixels_of(4, dtype)
    files: dict[str, Any] = {
        "band": {"photometric": "rgb", "extrasamples": ["unspecified"]},
        "multiplied": {"photometric": "rgb", "extrasamples": ["assocalpha"]},
        "pages": {"photometric": "minisblack"},
    }
    for name, options in files.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", np.moveaxis(pixels, 2, 0) if name == "pages" else pixels, **options)
        data = (tmp_path / f"{name}.tif").read_bytes()
        for given in (data, tmp_path / f"{name}.tif"):
            options = ReadOptions(pages_as_channels=name == "pages")
            assert read_large_image(given, tmp_path, channels=3, max_pixels=10**6, options=options) is None
    tifffile.imwrite(tmp_path / "alpha.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    found = read_large(tmp_path / "alpha.tif", tmp_path, channels=None, max_pixels=10**6)
    assert np.array_equal(found, pixels)
    with tifffile.TiffWriter(tmp_path / "preview.tif") as preview:
        preview.write(pixels[:, :, :3], photometric="rgb")
        preview.write(pixels[::4, ::4, :3], photometric="rgb")
    assert np.array_equal(
        read_large(tmp_path / "preview.tif", tmp_path, channels=3, max_pixels=10**6), pixels[:, :, :3]
    )


def moving(kind: str, **options: Any) -> bytes:
    """Three images in one file."""
    frames = [Image.fromarray(pixels_of(3)), Image.fromarray(pixels_of(4)[:, :, :3]), Image.new("RGB", (91, 53))]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
NOTED = {
    "webp": (moving("WEBP", lossless=True), "1 of 3 frames"),
    "apng": (moving("PNG"), "1 of 3 frames"),
    "gif": (moving("GIF"), "1 of 3 frames"),
    "avif": (moving("AVIF"), "1 of 3 frames"),
    "mpo": (moving("MPO"), "image 1 of 3"),
    "tiff": (moving("TIFF"), "page 1 of 3"),
    "profile": (as_file(pixels_of(1), "PNG", icc_profile=ICC), "its colour profile is for RGB and the image is grey"),
    "grey jpeg": (
        as_file(pixels_of(1), "JPEG", icc_profile=ICC),
        "its colour profile is for RGB and the image is grey",
    ),
    "gain map": (as_file(pixels_of(3), "JPEG", xmp=b"http://ns.adobe.com/hdr-gain-map/"), "its gain map (HDR)"),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_is_said_of_a_large_image_is_what_is_said_of_any(name: str, tmp_path: Path) -> None:
    data, said = NOTED[name]
    (tmp_path / "file").write_bytes(data)
    in_memory = read_image(data, keep_alpha=True, options=ReadOptions(keep_colour=True))
    assert in_memory.notes[0].startswith(said)
    for given in (data, tmp_path / "file"):
        found = read_image(given, keep_alpha=True, options=ReadOptions(keep_colour=True), scratch=tmp_path)
        assert isinstance(found.pixels, np.memmap) or name in ("gif", "avif")
        assert (found.notes, found.metadata) == (in_memory.notes, in_memory.metadata)


@pytest.mark.parametrize("options", [{"photometric": "rgb", "compression": "png"}, {"photometric": "ycbcr"}])
def test_tiffs_that_libvips_does_not_read_right_are_left_to_the_other_reader(options: dict, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels_of(3), **options)
    found = read_image(tmp_path / "a.tif", keep_alpha=True, scratch=tmp_path, options=ReadOptions(keep_colour=True))
    expected = Image.fromarray(pixels_of(3), "YCbCr").convert("RGB") if len(options) == 1 else pixels_of(3)
    assert np.abs(found.pixels.astype(int) - np.asarray(expected)).max() <= 1


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(small_disk: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (800, 900, 3), np.uint8)
    with pytest.raises(OSError, match="No space left"):
        read_large(as_file(noise, "PNG"), small_disk, channels=3, max_pixels=10**6)
    with pytest.raises(OSError, match="No space left"), open(small_disk / "out", "wb") as out:
        stream_png(out, [noise], noise.shape)
    assert [p.name for p in small_disk.iterdir()] == ["out"]
