"""Pixels are sRGB, whatever the file's colours are, unless these are to stay."""

from __future__ import annotations

import io
import struct
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from ldm_vae.data.boxes import boxes, inside
from ldm_vae.data.conversion import images_from, to_images
from ldm_vae.data.reader import ReadOptions, read_image, read_pixels
from ldm_vae.errors import BadImageError
from tests.data.test_depths import png

D65 = [0.3127, 0.3290, 1.0]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
P3 = bytes(
    imagecodecs.cms_profile("rgb", whitepoint=D65, primaries=[0.68, 0.32, 1, 0.265, 0.69, 1, 0.15, 0.06, 1], gamma=2.2)
)
GREY = bytes(imagecodecs.cms_profile("gray", whitepoint=D65, gamma=1.8))
BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
"""Linear BT.709 -> BT.2020 (ITU-R BT.2087, table 4)."""
KEPT = ReadOptions(keep_colour=True)


def colours(dtype: Any = np.uint8) -> np.ndarray:
    """Smooth colours that every wide space has."""
    top = np.iinfo(dtype).max
    small = np.random.default_rng(0).integers(20, 235, (6, 8, 3)).astype(np.uint8)
    large = np.asarray(Image.fromarray(small).resize((48, 36), Image.Resampling.BILINEAR))
    return (large.astype(float) * top / 255).round().astype(dtype)


def in_p3(pixels: np.ndarray) -> np.ndarray:
    return imagecodecs.cms_transform(pixels, SRGB, P3, colorspace="rgb", outcolorspace="rgb", flags=0x0100)


def linear(signal: np.ndarray) -> np.ndarray:
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def pq_signal(nits: np.ndarray) -> np.ndarray:
    """BT.2100's inverse EOTF, from light to signal."""
    y = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def saved(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def test_grey_is_converted_as_a_colour_of_three_equal_values_is() -> None:
    ramp = np.arange(0, 65536, 4096, dtype=np.uint16)[None, :, None]
    cicp = bytes([9, 16, 0, 1])
    grey = read_image(png16(ramp, cicp), channels=1).pixels
    rgb = read_image(png16(np.repeat(ramp, 3, axis=2), cicp), channels=3).pixels
    assert np.array_equal(grey[:, :, 0], rgb[:, :, 0])
    assert not np.array_equal(grey, ramp)


def test_the_narrow_range_of_video_is_stretched_to_all() -> None:
    levels = np.array([0, 16, 125, 235, 255], np.uint16)[None, :, None] * 256
    stretched = read_image(png16(np.repeat(levels, 3, axis=2), bytes([1, 13, 0, 0])), channels=3).pixels[0, :, 0]
    assert stretched.tolist() == [0, 0, round(109 / 219 * 65535), 65535, 65535]


def png16(pixels: np.ndarray, cicp: bytes) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(rows, 16, 2 if pixels.shape[2] == 3 else 0, pixels.shape[1], pixels.shape[0], cicp=cicp)


@pytest.mark.parametrize(
    ("kind", "options", "off"),
    [
        ("PNG", {}, 2),
        ("TIFF", {}, 2),
        ("WEBP", {"lossless": True}, 2),
        ("JPEG", {"quality": 98, "subsampling": 0}, 16),
        ("AVIF", {"quality": 98, "subsampling": "4:4:4"}, 16),
    ],
)
def test_a_photo_as_p3_and_as_srgb_gives_nearly_the_same_tensor(kind: str, options: dict, off: int) -> None:
    plain, wide = colours(), in_p3(colours())
    assert np.abs(plain.astype(int) - wide).max() > 15
    data = saved(wide, kind, icc_profile=P3, **options)
    found = read_image(data, keep_alpha=True)
    off_by = (to_images(found.pixels) - to_images(plain)).abs() * 127.5
    assert off_by.max() <= off + 0.01
    assert off_by.mean() <= off / 8  # as they are, they would be off by 8
    assert (found.metadata.icc, found.notes) == (b"", ())
    kept = read_image(data, keep_alpha=True, options=KEPT)
    assert np.abs(kept.pixels.astype(int) - wide).max() <= off
    assert kept.metadata.icc == P3


@pytest.mark.parametrize("bits", [8, 16])
def test_the_profile_of_a_jpeg_2000_counts(bits: int) -> None:
    plain = colours(np.uint8 if bits == 8 else np.uint16)
    top = (1 << bits) - 1
    for pixels, icc, expected in ((in_p3(plain), P3, plain), (plain[:, :, 0], GREY, None)):
        data = imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="jp2", reversible=True)
        data = jp2_with(data, b"\2\0\0" + icc)
        kept = read_image(data, keep_alpha=True, options=KEPT)
        assert np.array_equal(kept.pixels.squeeze(), pixels)
        assert kept.metadata.icc == icc
        found = read_image(data, keep_alpha=True)
        light = (pixels / top) ** 1.8
        grey = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * top
        off = np.abs(found.pixels.squeeze() - (grey if expected is None else expected.astype(float))).max()
        assert off <= (2 if bits == 8 else 100)
        assert (found.metadata.icc, found.notes) == (b"", ())
        strange = read_image(jp2_with(data, b"\1\0\0" + struct.pack(">I", 20)))
        assert strange.notes == ("colours of JPEG 2000's space 20 were read as sRGB",)


def jp2_with(data: bytes, colr: bytes) -> bytes:
    """A JP2 with another box of colours."""
    header = b"".join(
        struct.pack(">I4s", len(content) + 8, kind) + content
        for kind, content in ((k, colr if k == b"colr" else c) for k, c in boxes(inside(data, b"jp2h")))
    )
    parts = [(kind, header if kind == b"jp2h" else content) for kind, content in boxes(data)]
    return b"".join(struct.pack(">I4s", len(content) + 8, kind) + content for kind, content in parts)


def test_sixteen_bits_keep_their_precision_in_another_colour_space() -> None:
    plain = colours(np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, in_p3(plain), photometric="rgb", iccprofile=P3)
    pixels = read_pixels(file.getvalue())
    assert pixels.dtype == np.uint16
    assert np.abs(pixels.astype(int) - plain).max() <= 60  # of 65,535: a quarter of a level of 8 bits


def test_an_srgb_profile_changes_nothing_and_pil_images_are_converted_too() -> None:
    assert np.array_equal(read_pixels(saved(colours(), "PNG", icc_profile=SRGB)), colours())
    image = Image.fromarray(in_p3(colours()))
    image.info["icc_profile"] = P3
    assert (images_from(image, channels=3)[0] - to_images(colours())).abs().max() * 127.5 <= 2.01


@pytest.mark.parametrize("alpha", [False, True])
def test_grey_in_a_space_of_its_own_becomes_srgb_grey(alpha: bool) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    pixels = np.stack([levels, levels[::-1]], axis=2) if alpha else levels
    found = read_image(saved(pixels, "PNG", icc_profile=GREY), keep_alpha=True)
    light = (levels / 255) ** 1.8
    expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    assert np.abs(found.pixels[:, :, 0] - expected).max() <= 1.5
    assert found.pixels.shape[2] == 1 + alpha
    assert not alpha or np.array_equal(found.pixels[:, :, 1], levels[::-1])


def test_a_profile_of_another_kind_than_the_image_is_left_out_and_named() -> None:
    for options in (KEPT, ReadOptions()):
        grey = read_image(saved(colours()[:, :, 0], "PNG", icc_profile=P3), keep_alpha=True, options=options)
        assert np.array_equal(grey.pixels[:, :, 0], colours()[:, :, 0])
        assert grey.metadata.icc == b""
        assert grey.notes == ("its colour profile is for RGB and the image is grey: left out",)
    colour = read_image(saved(colours(), "PNG", icc_profile=GREY), keep_alpha=True, options=KEPT)
    assert colour.notes == ("its colour profile is for grey and the image is RGB: left out",)
    damaged = read_image(saved(colours(), "PNG", icc_profile=P3[:200] + bytes(300)))
    assert np.array_equal(damaged.pixels, colours())
    assert damaged.notes == ("its colour profile is damaged: read as sRGB",)


def test_pq_of_a_png_becomes_srgb_with_white_at_203_nits() -> None:
    plain = colours(np.uint16)
    light = linear(plain / 65535) @ BT2020.T * 203
    signal = np.rint(pq_signal(light) * 65535).astype(np.uint16)
    found = read_image(png16(signal, bytes([9, 16, 0, 1])), keep_alpha=True)
    assert np.abs(found.pixels.astype(int) - plain).max() <= 130  # BT.2087 has four digits
    assert (found.metadata.cicp, found.notes) == (None, ())
    kept = read_image(png16(signal, bytes([9, 16, 0, 1])), keep_alpha=True, options=KEPT)
    assert np.array_equal(kept.pixels, signal)
    assert kept.metadata.cicp == (9, 16, 0, 1)
    bright = np.rint(pq_signal(np.full((2, 2, 3), 1000.0)) * 65535).astype(np.uint16)
    found = read_image(png16(bright, bytes([9, 16, 0, 1])))
    assert (found.pixels == 65535).all()
    assert found.notes == ("HDR: what is brighter than the reference white (203 cd/m2) became white",)


def test_hlg_and_p3_of_a_png_become_srgb() -> None:
    three_quarters = np.full((1, 1, 3), round(0.75 * 65535), np.uint16)
    white = read_pixels(png16(three_quarters, bytes([9, 18, 0, 1])))
    assert white.min() >= 65530  # BT.2408: the reference white of HLG is at 75 %
    half = np.full((1, 1, 3), round(0.5 * 65535), np.uint16)
    light = (1 / 12) * (1 / 12) ** 0.2 * 1000 / 203
    expected = (1.055 * light ** (1 / 2.4) - 0.055) * 65535
    assert np.abs(read_pixels(png16(half, bytes([9, 18, 0, 1]))) - expected).max() <= 2
    red = np.array([[[65535, 0, 0]]], np.uint16)
    assert read_pixels(png16(red, bytes([12, 13, 0, 1])))[0, 0].tolist() == [65535, 0, 0]
    muted = np.array([[[40000, 20000, 20000]]], np.uint16)
    r, g, b = linear(muted[0, 0] / 65535)
    light = np.array([1.2249 * r - 0.2249 * g, -0.0421 * r + 1.0421 * g, -0.0196 * r - 0.0786 * g + 1.0983 * b])
    expected = (1.055 * light ** (1 / 2.4) - 0.055) * 65535
    assert np.abs(read_pixels(png16(muted, bytes([12, 13, 0, 1])))[0, 0] - expected).max() <= 20


def test_code_points_that_are_not_known_are_named() -> None:
    found = read_image(png16(colours(np.uint16), bytes([10, 13, 0, 1])))
    assert np.array_equal(found.pixels, colours(np.uint16))
    assert found.notes == ("colours of primaries 10 and transfer 13 were read as sRGB",)


@pytest.mark.parametrize("bits", [8, 10])
def test_the_code_points_of_an_avif_count(bits: int) -> None:
    top = (1 << bits) - 1
    wide = np.full((16, 16, 3), [0.7, 0.4, 0.3])
    stored = np.rint(wide * top).astype(np.uint8 if bits == 8 else np.uint16)
    data = imagecodecs.avif_encode(stored, level=100, bitspersample=bits, primaries=12, transfer=13, matrix=0)
    r, g, b = linear(wide[0, 0])
    light = np.array([1.2249 * r - 0.2249 * g, -0.0421 * r + 1.0421 * g, -0.0196 * r - 0.0786 * g + 1.0983 * b])
    expected = 1.055 * light ** (1 / 2.4) - 0.055
    pixels = read_pixels(data)
    assert np.abs(pixels / np.iinfo(pixels.dtype).max - expected).max() < 1.5 / top
    kept = read_image(data, keep_alpha=True, options=KEPT)
    assert kept.metadata.cicp == (12, 13, 0, 1)
    assert np.abs(kept.pixels / np.iinfo(pixels.dtype).max - wide).max() < 1.5 / top


def test_linear_light_in_a_jpeg_xl_becomes_srgb() -> None:
    light = np.linspace(0.1, 1, 12 * 16 * 3, dtype=np.float32).reshape(12, 16, 3)
    data = imagecodecs.jpegxl_encode(light, lossless=True)  # which calls floats linear
    assert np.allclose(read_pixels(data), 1.055 * light ** (1 / 2.4) - 0.055, atol=1e-5)
    assert read_image(data, keep_alpha=True, options=KEPT).metadata.cicp == (1, 8, 0, 1)


def lab_tiff(lab: np.ndarray, photometric: str, bits: int) -> bytes:
    """L, a, b -> a TIFF, by TIFF 6.0 and Adobe's TIFF technical notes."""
    unit = 1 << (bits - 8)
    signed = photometric == "cielab"
    lightness = lab[:, :, :1] * ((1 << bits) - 1 if signed else 255 * unit) / 100
    a_b = np.rint((lab[:, :, 1:] + (0 if signed else 128)) * unit).astype(np.int64) % (1 << bits)
    stored = np.concatenate([np.rint(lightness), a_b], axis=2).astype(f"u{bits // 8}")
    file = io.BytesIO()
    tifffile.imwrite(file, stored, photometric=photometric)
    return file.getvalue()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("photometric", ["cielab", "icclab"])
def test_cielab_becomes_the_colours_that_it_means(photometric: str, bits: int) -> None:
    lab = np.array([[[0, 0, 0], [50, 0, 0], [100, 0, 0], [60, 30, -20], [40, -25, 35]]], float)
    found = read_image(lab_tiff(lab, photometric, bits), keep_alpha=True, options=KEPT)
    profile, target = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    to_srgb = ImageCms.buildTransform(profile, target, "LAB", "RGB")
    eight = np.concatenate([np.rint(lab[:, :, :1] * 2.55), lab[:, :, 1:] % 256], axis=2).astype(np.uint8)
    reference = ImageCms.applyTransform(Image.frombytes("LAB", (5, 1), eight.tobytes()), to_srgb)
    top = np.iinfo(found.pixels.dtype).max
    assert top == (1 << bits) - 1
    assert np.abs(found.pixels / top * 255 - np.asarray(reference)).max() <= 1.6
    assert found.notes == ("its CIELAB colours were converted to sRGB",)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_inks_become_rgb_and_it_is_said(dtype: Any) -> None:
    top = np.iinfo(dtype).max
    inks = (np.array([[[0, 0, 0, 0], [1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1]]]) * top).astype(dtype)
    file = io.BytesIO()
    tifffile.imwrite(file, inks, photometric="separated")
    found = read_image(file.getvalue(), keep_alpha=True)
    expected = [[1, 1, 1], [0, 1, 1], [1, 0.5, 0.5], [0, 0, 0]]
    assert np.abs(found.pixels[0] / top - expected).max() <= 1 / 255
    assert found.notes == ("its CMYK colours were converted to sRGB",)


@pytest.mark.parametrize(("number", "name"), [(32803, "CFA"), (34892, "LINEAR_RAW"), (32845, "LOGLUV"), (10, "ITULAB")])
def test_colours_that_are_not_read_are_refused_by_name(number: int, name: str) -> None:
    file = io.BytesIO()
    tifffile.imwrite(file, colours(np.uint16), photometric="rgb")
    data = file.getvalue()
    tag = struct.pack("<HHIH", 262, 3, 1, 2)
    assert tag in data
    with pytest.raises(BadImageError, match=f"TIFF of {name} colours is not read"):
        read_pixels(data.replace(tag, struct.pack("<HHIH", 262, 3, 1, number)))
