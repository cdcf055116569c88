"""What files of each kind say beside their pixels, wherever they put it."""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ldm_vae.codec.picture import Picture, as_picture, encode_picture
from ldm_vae.codec.sections import pack_metadata, unpack_metadata
from ldm_vae.data.metadata import EXIF_PREFIX, IPTC_TAG, Metadata, iptc_segment
from ldm_vae.data.reader import read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
XMP = b"<x:xmpmeta/>"


def exif_block() -> bytes:
    exif = Image.Exif()
    exif[270] = "a title"
    return exif.tobytes().removeprefix(EXIF_PREFIX)


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content) + 8, kind) + content


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def encoded(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind, **options)
    return file.getvalue()


def metadata_in(data: bytes) -> Metadata:
    return read_image(data, keep_alpha=True).metadata


def title_in(metadata: Metadata) -> str:
    exif = Image.Exif()
    exif.load(metadata.exif)
    return str(exif[270])


@pytest.mark.parametrize("compressed", [False, True])
def test_exif_and_xmp_of_a_jpeg_xl_are_kept_also_in_brotlis_compression(compressed: bool) -> None:
    parts = [(b"Exif", bytes(4) + exif_block()), (b"xml ", XMP)]
    if compressed:
        parts = [(b"brob", kind + bytes(imagecodecs.brotli_encode(content))) for kind, content in parts]
    head = b"\0\0\0\x0cJXL \r\n\x87\n" + box(b"ftyp", b"jxl \0\0\0\0jxl ")
    pixels = box(b"jxlc", imagecodecs.jpegxl_encode(PIXELS, lossless=True, usecontainer=False))
    found = metadata_in(head + b"".join(box(*part) for part in parts) + pixels)
    assert found.xmp == XMP
    assert title_in(found) == "a title"
    damaged = read_image(head + box(b"brob", b"Exif no Brotli") + pixels, keep_alpha=True)
    assert np.array_equal(damaged.pixels, PIXELS)
    assert damaged.metadata == Metadata()


def test_exif_and_xmp_that_others_put_into_a_jpeg_2000_are_kept() -> None:
    data = imagecodecs.jpeg2k_encode(PIXELS, level=0, codecformat="jp2")
    place = data.index(b"jp2c") - 4
    xmp = box(b"uuid", bytes.fromhex("BE7ACFCB97A942E89C71999491E3AFAC") + XMP)
    exif = box(b"uuid", b"JpgTiffExif->JP2" + exif_block())
    found = metadata_in(data[:place] + xmp + exif + data[place:])
    assert found.xmp == XMP
    assert title_in(found) == "a title"


def test_a_jpeg_of_12_bits_keeps_what_one_of_8_bits_does() -> None:
    data = imagecodecs.jpeg8_encode(PIXELS.astype(np.uint16) * 16, bitspersample=12)
    jfif = segment(0xE0, b"JFIF\0\1\2\2" + struct.pack(">HH", 100, 200) + bytes(2))
    found = metadata_in(data[:2] + jfif + segment(0xFE, b"a comment") + data[2:])
    assert found.text == (("Comment", "a comment"),)
    assert found.resolution == pytest.approx((254, 508))


@pytest.mark.parametrize("words", [b'<d tiff:Orientation="6"/>', b"<d><tiff:Orientation>6</tiff:Orientation></d>"])
def test_the_orientation_in_xmp_goes_with_that_in_exif(words: bytes) -> None:
    exif = Image.Exif()
    exif[274] = 6
    found = read_image(encoded("WEBP", lossless=True, exif=exif, xmp=words), keep_alpha=True)
    assert np.array_equal(found.pixels, np.rot90(PIXELS, -1))
    assert found.metadata.xmp in (b"<d />", b"<d></d>")
    assert np.array_equal(read_image(encoded("WEBP", lossless=True, xmp=found.metadata.xmp)).pixels, PIXELS)


def test_iptc_of_a_jpeg_or_tiff_is_kept_in_the_formats_that_have_a_place_for_it() -> None:
    iptc = b"\x1c\x02\x78\0\x09a caption"
    jpeg = encoded("JPEG")
    for data in (jpeg[:2] + iptc_segment(iptc) + jpeg[2:], encoded("TIFF", tiffinfo={IPTC_TAG: iptc})):
        assert metadata_in(data).iptc == iptc
    picture = as_picture(Image.open(io.BytesIO(data)))
    kept = unpack_metadata(pack_metadata(picture.metadata))
    assert kept.iptc == iptc
    picture = replace(picture, metadata=kept)
    for extension in (".jpg", ".tif"):
        assert metadata_in(encode_picture(picture, extension)).iptc == iptc
    ((keyword, text),) = metadata_in(encode_picture(picture, ".png")).text
    assert keyword == "Raw profile type iptc"
    assert bytes.fromhex("".join(text.split("\n")[3:])) == iptc
    notes: list[str] = []
    encode_picture(picture, ".webp", notes)
    assert "IPTC" in notes[0]


def test_a_png_with_a_text_called_photoshop_is_read() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("photoshop", "a name")
    assert as_picture(Image.open(io.BytesIO(encoded("PNG", pnginfo=text)))).metadata.text == (("photoshop", "a name"),)


def test_iptc_too_long_for_a_segment_is_left_out_of_a_jpeg_and_named() -> None:
    picture = Picture(pixels=PIXELS, metadata=Metadata(iptc=bytes(70_000)))
    notes: list[str] = []
    assert metadata_in(encode_picture(picture, ".jpg", notes)).iptc == b""
    assert notes == [".jpg holds no IPTC: left out"]
