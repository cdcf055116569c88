"""Files as people have them: what is left out is said, what is odd is read, what cannot be read has a plain reason."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin

from ldm_vae.data import image_files
from ldm_vae.data.image_files import images_below
from ldm_vae.data.metadata import without_layout
from ldm_vae.data.reader import ReadOptions, read_image, read_pixels
from ldm_vae.data.sources import open_source
from ldm_vae.errors import BadImageError, DataError

PIXELS = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)).resize((40, 32)))


def encoded(kind: str, pixels: np.ndarray = PIXELS, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def tiff(*pages: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in pages:
            writer.write(page, **options)
    return file.getvalue()


# Pages and frames -----------------------------------------------------------------------------------------------------


def test_of_three_grey_pages_the_first_is_the_image_unless_they_are_channels() -> None:
    pages = [np.full((4, 5), value, np.uint8) for value in (10, 20, 30)]
    found = read_image(tiff(*pages), keep_alpha=True)
    assert np.unique(found.pixels).tolist() == [10]
    assert found.pixels.shape == (4, 5, 1)
    assert found.notes == ("page 1 of 3",)
    stacked = read_image(tiff(*pages), options=ReadOptions(pages_as_channels=True))
    assert stacked.pixels[0, 0].tolist() == [10, 20, 30]
    assert stacked.notes == ()
    with pytest.raises(BadImageError, match="1 channels, the model has 5: --pages-as-channels takes its 3 pages"):
        read_pixels(tiff(*pages), channels=5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pages_of_colours_are_pages_and_previews_are_none(dtype: Any) -> None:
    image = (PIXELS.astype(dtype)) * (257 if dtype == np.uint16 else 1)
    two = read_image(tiff(image, 255 - image, photometric="rgb"))
    assert np.array_equal(two.pixels, image)
    assert two.notes == ("page 1 of 2",)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(image[::4, ::4], photometric="rgb", subfiletype=1)
        writer.write(image, photometric="rgb")
    found = read_image(file.getvalue())
    assert np.array_equal(found.pixels, image)
    assert found.notes == ()


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("AVIF", {})])
def test_of_an_animation_the_first_frame_is_the_image_and_it_is_said(kind: str, options: dict) -> None:
    frames = [Image.new("RGB", (16, 16), (20 * i, 200 - 10 * i, 50)) for i in range(12)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    found = read_image(file.getvalue())
    assert np.abs(found.pixels.astype(int) - [0, 200, 50]).max() <= 3
    assert found.notes == ("1 of 12 frames",)


def test_of_several_images_in_a_jpeg_the_first_is_read_and_a_gain_map_is_named() -> None:
    first, second = Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1])
    file = io.BytesIO()
    first.save(file, "MPO", save_all=True, append_images=[second])
    found = read_image(file.getvalue())
    assert np.abs(found.pixels.astype(int) - PIXELS).mean() < 8
    assert found.notes == ("image 1 of 2",)
    xmp = b'<x xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" hdrgm:Version="1.0"/>'
    assert read_image(encoded("JPEG", xmp=xmp)).notes == ("its gain map (HDR) was left out",)


def test_the_first_frame_of_a_jpeg_xl_is_the_image() -> None:
    data = imagecodecs.jpegxl_encode(np.stack([PIXELS, 255 - PIXELS]), lossless=True)
    found = read_image(data)
    assert np.array_equal(found.pixels, PIXELS)
    assert found.notes == ("the first of its frames",)


# JPEG that is cut, or begins late -------------------------------------------------------------------------------------


@pytest.mark.parametrize("progressive", [False, True])
def test_bytes_before_a_jpeg_and_a_missing_end_are_read_with_a_note(progressive: bool) -> None:
    data = encoded("JPEG", progressive=progressive)
    expected = read_pixels(data)
    late = read_image(b"\r\n\0\0\0\x10junk" + data)
    assert np.array_equal(late.pixels, expected)
    assert late.notes == ("10 bytes before the start of the JPEG were skipped",)
    endless = read_image(data[:-2])
    assert np.array_equal(endless.pixels, expected)
    assert endless.notes == ("the JPEG has no end marker; its pixels are whole",)
    with pytest.raises(BadImageError, match="truncated"):
        read_pixels(data[:-12])
    assert np.array_equal(read_pixels(data + b"trailing bytes"), expected)


@pytest.mark.parametrize("data", [b"nothing" * 9, encoded("JPEG")[:300], encoded("PNG")[:90], encoded("GIF")[:60]])
def test_a_reason_is_plain_and_the_same_in_every_run(data: bytes) -> None:
    reasons = set()
    for _ in range(2):
        with pytest.raises(BadImageError) as caught:
            read_pixels(data)
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert "0x" not in reasons.pop()


# Kinds ----------------------------------------------------------------------------------------------------------------


def test_kinds_that_are_not_read_have_a_name() -> None:
    known = {
        "PAM": b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 1\nMAXVAL 255\nTUPLTYPE GRAYSCALE\nENDHDR\n0",
        "PSD": b"8BPS\0\1" + bytes(30),
        "PDF": b"%PDF-1.7\n",
        "a compressed file (.ldi)": b"\x89LDI\r\n\x1a\n" + bytes(30),
    }
    for name, data in known.items():
        with pytest.raises(BadImageError) as caught:
            read_pixels(data)
        assert str(caught.value) == f"{name} is not read"


def test_a_folder_and_a_zip_name_what_they_leave_out_and_know_images_without_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(image_files, "heif_is_there", lambda: False)
    files = {"a.png": encoded("PNG"), "b": encoded("JPEG"), "c.jxl": imagecodecs.jpegxl_encode(PIXELS, lossless=True)}
    heic = struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic")
    others = {"d.heic": b"1", "e.HEIC": b"2", "f.psd": b"3", "README": b"read me", ".hidden": b"4", "IMG_0001": heic}
    folder = tmp_path / "folder"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, data in {**files, **others}.items():
            (folder / name).write_bytes(data)
            archive.writestr(name, data)
    said = "not read: 2 .heic (pip install 'ldm-vae[heic]' to read it), "
    for path in (folder, tmp_path / "images.zip"):
        source = open_source(str(path))
        assert [source.name(i) for i in range(len(source))] == ["a.png", "b", "c.jxl"]
        assert [np.abs(source[i].pixels.astype(int) - PIXELS).mean() < 8 for i in range(3)] == [True] * 3
        line = capsys.readouterr().err
        assert line.startswith(f"{path}: {said}")
        assert "1 .psd" in line
        assert ", 1 without extension" in line
        assert ", 1 HEIC without extension (pip install 'ldm-vae[heic]' to read it)" in line
    for name in files:
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"no images in .*not read: 2 .heic"):
        open_source(str(folder))


def test_every_kind_is_known_by_its_content(tmp_path: Path) -> None:
    kinds = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "AVIF", "JPEG2000", "BMP", "PPM", "ICO")
    for kind in kinds:
        (tmp_path / kind.lower()).write_bytes(encoded(kind, **({"sizes": [(40, 32)]} if kind == "ICO" else {})))
    for number, body in ((1, b"1 " * 1280), (2, b"9 " * 1280), (3, b"9 " * 3840), (4, bytes(160)), (5, bytes(1280))):
        top = b"" if number in (1, 4) else b"255\n"
        (tmp_path / f"p{number}").write_bytes(b"P%d # a comment\n40\n32\n%s" % (number, top) + body)
    (tmp_path / "xl").write_bytes(imagecodecs.jpegxl_encode(PIXELS))
    np.save(tmp_path / "array.npy", PIXELS)
    (tmp_path / "array.npy").rename(tmp_path / "array")
    for name, text in (("notes", b"BM is short, P1 is not: 1"), ("more", b"P5-notes"), ("zeros", bytes(99))):
        (tmp_path / name).write_bytes(text)
    listing = images_below(tmp_path)
    assert len(listing.names) == len(kinds) + 5 + 2
    assert str(listing) == "not read: 3 without extension"
    source = open_source(str(tmp_path))
    assert all(source[i].pixels.shape == (32, 40, 3) for i in range(len(source)))


def test_heic_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_vae.data.heif.heif_is_there", lambda: False)
    with pytest.raises(BadImageError, match=r"HEIC: pip install 'ldm-vae\[heic\]'"):
        read_pixels(struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic") + bytes(100))


def test_heic_is_read_with_its_library() -> None:
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    heif.from_pillow(Image.fromarray(PIXELS)).save(file, quality=95)
    assert np.abs(read_pixels(file.getvalue()).astype(int) - PIXELS).mean() < 8


# What is written beside the pixels ------------------------------------------------------------------------------------


def test_metadata_of_each_kind_is_found() -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("prompt", "a cat")
    texts.add_itxt("workflow", "ü" * 3_000_000, zip=True)  # more than PIL's limit
    exif = Image.Exif()
    exif[270] = "a title"
    options = {"icc_profile": b"", "exif": exif, "dpi": (300, 300)}
    png = read_image(encoded("PNG", pnginfo=texts, **options), keep_alpha=True).metadata
    assert [(key, len(text)) for key, text in png.text] == [("prompt", 5), ("workflow", 3_000_000)]
    assert png.resolution == pytest.approx((300, 300), abs=0.01)
    jpeg = read_image(encoded("JPEG", comment=b"a comment", xmp=b"<xmp/>", **options), keep_alpha=True).metadata
    assert (jpeg.text, jpeg.xmp, jpeg.resolution) == ((("Comment", "a comment"),), b"<xmp/>", (300, 300))
    deep = tiff(PIXELS.astype(np.uint16) * 257, photometric="rgb", resolution=(118.11, 118.11), resolutionunit=3)
    assert read_image(deep, keep_alpha=True).metadata.resolution == pytest.approx((300, 300), abs=0.01)
    for metadata in (png, jpeg):
        kept = Image.Exif()
        kept.load(metadata.exif)
        assert kept[270] == "a title"


def test_of_exif_an_odd_tag_goes_alone_and_sizes_go_with_the_orientation() -> None:
    exif = Image.Exif()
    exif[270], exif[274] = "kept", 6
    exif[0x8769] = {40962: 40, 40963: 32, 33434: 0.01}
    block = exif.tobytes()
    odd = struct.pack(">HHII", 306, 5, 1, 0xFFFFFF)  # a rational that lies outside
    for data in (block, with_entry(block, odd)):
        kept = Image.Exif()
        kept.load(without_layout(data))
        assert dict(kept.get_ifd(0x8769)) == {33434: 0.01}
        assert kept[270] == "kept"
        assert 274 not in kept


def with_entry(block: bytes, entry: bytes) -> bytes:
    """EXIF with one more entry: its first directory anew, at the end."""
    begin = struct.unpack_from(">I", block, 10)[0] + 6
    count = struct.unpack_from(">H", block, begin)[0]
    entries = block[begin + 2 : begin + 2 + 12 * count] + entry
    end = block[:10] + struct.pack(">I", len(block) - 6) + block[14:]
    return end + struct.pack(">H", count + 1) + entries + bytes(4)


def test_a_turned_image_is_turned_once() -> None:
    turned = np.rot90(PIXELS, -1)
    for kind, options in (("JPEG", {"quality": 98, "subsampling": 0}), ("AVIF", {"quality": 98}), ("PNG", {})):
        exif = Image.Exif()  # PIL takes the tag out of it
        exif[274] = 6
        found = read_image(encoded(kind, exif=exif, **options), keep_alpha=True)
        assert np.abs(found.pixels.astype(int) - turned).mean() < 4, kind
        assert found.metadata.exif == b""


# What was right, and stays ------------------------------------------------------------------------------------------


def test_cmyk_of_a_jpeg_without_adobes_marker_is_no_negative() -> None:
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:, :, 0] = 255
    file = io.BytesIO()
    Image.frombytes("CMYK", (16, 16), inks.tobytes()).save(file, "JPEG", quality=95)
    data = file.getvalue()
    begin = data.index(b"\xff\xee")
    size = struct.unpack_from(">H", data, begin + 2)[0]
    plain = data[:begin] + data[begin + 2 + size :]
    with Image.open(io.BytesIO(plain)) as image:
        reference = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(read_pixels(plain).astype(int) - reference).max() <= 1


def test_a_transparent_rgb_png_and_long_images_are_read() -> None:
    data = encoded("PNG", transparency=tuple(int(v) for v in PIXELS[3, 4]))
    rgba = read_image(data, keep_alpha=True).pixels
    assert (rgba[3, 4, 3], rgba[3, 5, 3]) == (0, 255)
    assert (read_pixels(data)[3, 4] == 255).all()
    long = np.tile(np.arange(65535, dtype=np.uint16).astype(np.uint8), (2, 1))
    assert np.array_equal(read_pixels(encoded("PNG", long), channels=1)[:, :, 0], long)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_premultiplied_and_min_is_white_tiffs_mean_what_they_say(dtype: Any) -> None:
    top = np.iinfo(dtype).max
    share = np.array([1.0, 0.5, 0.25])
    colour = np.rint(np.array([0.8, 0.8, 0.8])[:, None] * top * share[:, None]).repeat(3, axis=1)
    rgba = np.concatenate([colour, np.rint(share * top)[:, None]], axis=1)[None].astype(dtype)
    found = read_image(tiff(rgba, photometric="rgb", extrasamples=["assocalpha"]), keep_alpha=True)
    assert np.abs(found.pixels[0, :, :3] / top - 0.8).max() < 3 / 255
    assert np.array_equal(found.pixels[:, :, 3], rgba[:, :, 3])
    grey = np.array([[0, top // 4, top]], dtype)
    inverted = read_pixels(tiff(grey, photometric="miniswhite"), channels=1)
    assert inverted.ravel().tolist() == [top, top - top // 4, 0]
