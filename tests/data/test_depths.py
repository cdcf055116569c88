"""Of values of any number of bits the largest is white, and none loses precision."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from ldm_vae.data import large
from ldm_vae.data.reader import ReadOptions, read_image, read_pixels
from ldm_vae.errors import BadImageError

AS_STORED = ReadOptions(keep_colour=True)


def ramp(bits: int, channels: int = 3) -> np.ndarray:
    """(12, 16, channels) from 0 to the largest value."""
    shape = (12, 16, channels)
    values = np.linspace(0, (1 << bits) - 1, np.prod(shape)).round().reshape(shape)
    return np.ascontiguousarray(values.squeeze(), np.uint8 if bits <= 8 else np.uint16)


def scaled(values: np.ndarray, bits: int) -> np.ndarray:
    top = 255 if bits <= 8 else 65535
    return np.atleast_3d(np.rint(values.astype(float) * top / ((1 << bits) - 1)))


def packed_tiff(values: np.ndarray, bits: int | list[int], photometric: int = 1, extra: int | None = None) -> bytes:
    """A TIFF of (H, W) or (H, W, C) whose rows are whole bytes of values without gaps."""
    height, width = values.shape[:2]
    channels = values.size // (height * width)
    each = bits if isinstance(bits, list) else [bits] * channels
    flat = values.reshape(height, width, channels, 1).astype(">u4")
    every_bit = np.concatenate(
        [np.unpackbits(flat[:, :, c].view(np.uint8), axis=2)[:, :, 32 - n :] for c, n in enumerate(each)], axis=2
    )
    rows = np.packbits(every_bit.reshape(height, -1), axis=1).tobytes()
    rows += b"\0" * (len(rows) % 2)
    rows += struct.pack(f">{channels}I", *each)  # the depths, where they do not fit into the tag
    tags = {256: width, 257: height, 258: each[0], 259: 1, 262: photometric, 273: 8, 277: channels, 278: height}
    tags |= {279: len(rows) - 4 * channels} | ({} if extra is None else {338: extra})
    place = 8 + len(rows) - 4 * channels
    entries = b"".join(
        struct.pack(">HHII", 258, 4, channels, place)
        if tag == 258 and channels > 1
        else struct.pack(">HHII", tag, 4, 1, value)
        for tag, value in tags.items()
    )
    return struct.pack(">2sHI", b"MM", 42, 8 + len(rows)) + rows + struct.pack(">H", len(tags)) + entries + bytes(4)


def png(values: bytes, bits: int, kind: int, width: int, height: int, key: bytes = b"", cicp: bytes = b"") -> bytes:
    """A PNG of rows that are packed already, each behind its filter's byte."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    beside = (chunk(b"cICP", cicp) if cicp else b"") + (chunk(b"tRNS", key) if key else b"")
    return b"\x89PNG\r\n\x1a\n" + header + beside + chunk(b"IDAT", zlib.compress(values)) + chunk(b"IEND", b"")


def test_a_packed_tiff_of_12_bits_has_its_white_at_65535() -> None:
    rows = np.tile(np.array([4095, 0], np.uint16), (2, 4))
    data = packed_tiff(rows, 12)
    assert data[8:14] == bytes.fromhex("fff000fff000")
    assert read_pixels(data, channels=1)[:, :, 0].tolist() == [[65535, 0] * 4] * 2


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 14, 16])
def test_a_tiff_of_any_depth_scales_by_its_own_maximum(bits: int) -> None:
    values = np.arange(96).reshape(6, 16) * ((1 << bits) - 1) // 95
    expected = scaled(values, bits)
    assert np.array_equal(read_pixels(packed_tiff(values, bits), channels=1), expected)
    inverted = read_pixels(packed_tiff(values, bits, photometric=0), channels=1)
    assert np.array_equal(inverted, expected.max() - expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_colours_of_few_bits_and_transparency_beside_any_colours_are_read_from_a_tiff(bits: int) -> None:
    rgb, grey, inks = (np.random.default_rng(bits).integers(0, 1 << bits, (5, 8, c)) for c in (3, 2, 5))
    assert np.array_equal(read_pixels(packed_tiff(rgb, bits, photometric=2)), scaled(rgb, bits))
    for photometric in (0, 1):
        found = read_pixels(packed_tiff(grey, bits, photometric=photometric, extra=2), keep_alpha=True)
        levels = grey if photometric else np.stack([(1 << bits) - 1 - grey[:, :, 0], grey[:, :, 1]], axis=2)
        assert np.array_equal(found, scaled(levels, bits))
    opaque = read_image(packed_tiff(inks[:, :, :4], bits, photometric=5), keep_alpha=True)
    light = 1 - scaled(inks[:, :, :4], bits) / 255
    assert np.abs(opaque.pixels - light[:, :, :3] * light[:, :, 3:] * 255).max() <= 1
    seen = read_image(packed_tiff(inks, bits, photometric=5, extra=2), keep_alpha=True)
    assert np.array_equal(seen.pixels[:, :, :3], opaque.pixels)
    assert np.array_equal(seen.pixels[:, :, 3:], scaled(inks[:, :, 4], bits))
    assert seen.notes == opaque.notes == ("its CMYK colours were converted to sRGB",)
    band = read_image(packed_tiff(inks, bits, photometric=5, extra=0), keep_alpha=True)
    assert np.array_equal(band.pixels, opaque.pixels)


@pytest.mark.parametrize("compression", ["webp", "jpegxl", "png"])
def test_compressions_that_pil_does_not_know_are_read_from_a_tiff(compression: str) -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, ramp(8), photometric="rgb", compression=compression, compressionargs={"level": 100})
    assert np.abs(read_pixels(file.getvalue()).astype(int) - ramp(8)).mean() < 8


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (packed_tiff(np.ones((4, 6, 3)), [5, 6, 5], photometric=2), "TIFF whose samples have 5, 6, 5 bits is not read"),
        (packed_tiff(np.ones((4, 6, 4)), 8, photometric=6, extra=2), "TIFF of YCBCR colours in this layout"),
        (packed_tiff(np.ones((4, 6, 2)), 8, photometric=3, extra=1), "TIFF of PALETTE colours in this layout"),
    ],
)
def test_a_layout_of_tiff_that_is_not_read_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        read_pixels(data)


@pytest.mark.parametrize(("photometric", "values"), [("rgb", [[[0, 2**31, 2**32 - 1]]]), ("minisblack", [[0, 2**31]])])
def test_a_tiff_of_32_bits_holds_counts_of_which_nobody_knows_the_white(photometric: str, values: list) -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, np.array(values, np.uint32), photometric=photometric)
    with pytest.raises(BadImageError, match=r"uint32 from 0 to .*--value-range LOW HIGH"):
        read_pixels(file.getvalue())
    found = read_image(file.getvalue(), options=ReadOptions(value_range=(0, 2**32 - 1))).pixels
    assert np.allclose(found[0].ravel()[[0, -1]], [0, 1 if photometric == "rgb" else 0.5])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_grey_png_of_few_bits_has_the_transparency_that_it_says(bits: int) -> None:
    levels = np.arange(8) % (1 << bits)
    row = np.packbits(np.unpackbits(levels.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :]).tobytes()
    data = png(b"\0" + row, bits, 0, 8, 1, key=b"\0\1")
    grey, alpha = np.moveaxis(read_pixels(data, keep_alpha=True), 2, 0)
    assert np.array_equal(grey[0], levels * 255 // ((1 << bits) - 1))
    assert np.array_equal(alpha[0], np.where(levels == 1, 0, 255))


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3)])
@pytest.mark.parametrize("bits", [8, 16])
def test_the_transparent_colour_of_a_png_is_that_on_disk_too(
    kind: int, channels: int, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = (np.arange(40 * channels) * (1 if bits == 8 else 400)).astype(f">u{bits // 8}").reshape(4, -1)
    key = b"".join(struct.pack(">H", v) for v in values[1, :channels])
    data = png(b"".join(b"\0" + row.tobytes() for row in values), bits, kind, 10, 4, key=key)
    monkeypatch.setattr(large, "LARGE", 10)
    options = ReadOptions(keep_colour=True)
    found = read_image(data, keep_alpha=True, options=options)
    on_disk = read_image(data, keep_alpha=True, options=options, scratch=tmp_path)
    assert isinstance(on_disk.pixels, np.memmap)
    assert np.array_equal(found.pixels, on_disk.pixels)
    assert np.argwhere(found.pixels[:, :, -1] == 0).tolist() == [[1, 0]]


@pytest.mark.parametrize("top", [15, 255, 1023, 4095, 65535])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_pnm_scales_by_its_own_maximum(top: int, plain: bool, channels: int) -> None:
    values = np.linspace(0, top, 24 * channels).round().astype(">u2" if top > 255 else np.uint8)
    number = (2 if plain else 5) + (channels == 3)
    body = " ".join(str(v) for v in values).encode() if plain else values.tobytes()
    data = f"P{number}\n# a comment\n6 4\n{top}\n".encode() + body
    pixels = read_pixels(data, channels=channels)
    assert pixels.dtype == (np.uint16 if top > 255 else np.uint8)
    expected = np.rint(values.astype(float) * (65535 if top > 255 else 255) / top).reshape(4, 6, channels)
    assert np.abs(pixels - expected).max() <= (0 if top > 255 else 1)
    assert pixels.max() == (65535 if top > 255 else 255)


@pytest.mark.parametrize("bits", [4, 8, 12, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_jpeg_2000_keeps_its_precision(bits: int, channels: int) -> None:
    values = ramp(bits, channels)
    for codecformat in ("jp2", "j2k"):
        data = imagecodecs.jpeg2k_encode(values, level=0, codecformat=codecformat, bitspersample=bits, reversible=True)
        pixels = read_pixels(data, keep_alpha=True)
        assert pixels.dtype == (np.uint8 if bits <= 8 else np.uint16)
        assert np.array_equal(pixels, scaled(values, bits))


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_avif_keeps_its_precision(bits: int, channels: int) -> None:
    values = ramp(bits, channels)
    data = imagecodecs.avif_encode(values, level=100, bitspersample=bits)
    pixels = read_pixels(data, keep_alpha=True)
    assert pixels.dtype == np.uint16
    assert np.abs(pixels - scaled(values, bits)).max() <= 65535 / ((1 << bits) - 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_of_12_bits_keeps_them(channels: int) -> None:
    values = ramp(12, channels)
    data = imagecodecs.jpeg8_encode(values, level=100, bitspersample=12, subsampling="444")
    pixels = read_pixels(data, channels=channels)
    assert pixels.dtype == np.uint16
    assert np.abs(pixels - scaled(values, 12)).mean() < 40  # of 65,535: a quarter of a level of 10 bits
    for cut in (data[:-12], data[:-2]):
        with pytest.raises(BadImageError, match="truncated JPEG"):
            read_pixels(cut)
    with pytest.raises(BadImageError, match="16x12 is more than the limit of 100 pixels"):
        read_pixels(data, max_pixels=100)


@pytest.mark.parametrize(("bits", "channels"), [(8, 1), (8, 3), (8, 4), (10, 3), (12, 3), (16, 1), (16, 4)])
def test_a_jpeg_xl_is_read_at_its_depth(bits: int, channels: int) -> None:
    values = ramp(bits, channels)
    for container in (False, True):
        data = imagecodecs.jpegxl_encode(values, lossless=True, bitspersample=bits, usecontainer=container)
        pixels = read_image(data, keep_alpha=True, options=AS_STORED).pixels
        assert pixels.dtype == (np.uint8 if bits == 8 else np.uint16)
        assert np.array_equal(pixels, scaled(values, bits))
        with pytest.raises(BadImageError, match="16x12 is more than the limit of 100 pixels"):
            read_pixels(data, max_pixels=100)
    floats = np.linspace(0, 1, 12 * 16 * 3, dtype=np.float32).reshape(12, 16, 3)
    linear = read_image(imagecodecs.jpegxl_encode(floats, lossless=True), options=AS_STORED)
    assert np.allclose(linear.pixels, floats, atol=1e-6)


def files_of(values: np.ndarray) -> dict[str, bytes]:
    tiff, npy = io.BytesIO(), io.BytesIO()
    tifffile.imwrite(tiff, values)
    np.save(npy, values)
    return {"tiff": tiff.getvalue(), "npy": npy.getvalue()}


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint32", "int32", "float32", "float64"])
def test_other_values_are_refused_with_the_way_and_read_by_their_range(dtype: str) -> None:
    values = np.array([[0, 25, 50], [75, 100, 120]], dtype)
    for data in files_of(values).values():
        with pytest.raises(BadImageError, match=rf"{dtype} from 0 to 120.*--value-range LOW HIGH"):
            read_pixels(data, channels=1)
        found = read_image(data, channels=1, options=ReadOptions(value_range=(0, 100)))
        assert np.allclose(found.pixels[:, :, 0], [[0, 0.25, 0.5], [0.75, 1, 1]])


def test_a_range_of_values_holds_for_more_than_8_bits_and_not_for_photos() -> None:
    options = ReadOptions(value_range=(1000, 3000))
    deep = np.array([[0, 1000, 2000, 3000, 65535]], np.uint16)
    for data in files_of(deep).values():
        assert np.allclose(read_image(data, channels=1, options=options).pixels.ravel(), [0, 0, 0.5, 1, 1])
    file = io.BytesIO()
    Image.fromarray(ramp(8)).save(file, "PNG")
    assert np.array_equal(read_image(file.getvalue(), options=options).pixels, ramp(8))


def test_a_range_below_zero_is_that_of_signed_values() -> None:
    values: Any = np.array([[-1000, 0, 1000]], np.int16)
    for data in files_of(values).values():
        found = read_image(data, channels=1, options=ReadOptions(value_range=(-1000, 1000)))
        assert np.allclose(found.pixels.ravel(), [0, 0.5, 1])


def test_a_tiff_of_fewer_channels_than_its_colours_need_is_refused_and_one_of_planes_is_read_by_its_shape() -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((8, 9), np.uint16), photometric="minisblack")
    data = bytearray(file.getvalue())
    tag = data.index(np.array([262, 3], "<u2").tobytes())  # the colours
    data[tag + 8] = 5
    with pytest.raises(BadImageError, match="SEPARATED colours in 1 channels is not read"):
        read_image(bytes(data), channels=3)
    planes = np.arange(3 * 8 * 9, dtype=np.uint16).reshape(3, 8, 9)
    file = io.BytesIO()
    tifffile.imwrite(file, planes, photometric="rgb", planarconfig="separate")
    data = bytearray(file.getvalue())
    tag = data.index(np.array([284, 3], "<u2").tobytes())
    data[tag + 8] = 3  # no layout of planes that there is
    assert np.array_equal(read_image(bytes(data), channels=3).pixels, np.moveaxis(planes, 0, 2))
