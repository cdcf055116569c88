from __future__ import annotations

import contextlib
import io

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import EpsImagePlugin, Image

from ldm_vae.data.conversion import to_images, to_pixels
from ldm_vae.data.images import centre_square, convert_channels, resize
from ldm_vae.data.reader import ReadOptions, read_image, read_pixels
from ldm_vae.errors import BadImageError

RAMP = np.arange(48 * 3, dtype=np.uint8).reshape(6, 8, 3)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM", "TGA"])
def test_lossless_formats_give_the_pixels_that_were_written(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(read_pixels(encoded(Image.fromarray(RAMP), kind, **options)), RAMP)


@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
def test_lossy_formats_give_nearly_the_pixels_that_were_written(kind: str) -> None:
    smooth = np.asarray(Image.fromarray(RAMP).resize((64, 48), Image.Resampling.BICUBIC))
    assert np.abs(read_pixels(encoded(Image.fromarray(smooth), kind, quality=95)).astype(int) - smooth).mean() < 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
def test_every_mode_becomes_one_three_or_four_channels(mode: str) -> None:
    kind = {"PA": "PNG", "LAB": "TIFF", "CMYK": "TIFF", "YCbCr": "TIFF", "RGBX": "TIFF"}.get(mode, "PNG")
    image = Image.fromarray(RAMP)
    image = image.convert("P").convert(mode) if mode == "PA" else image.convert("RGB").convert(mode)
    if mode in ("PA", "HSV"):
        image = image.convert("RGBA" if mode == "PA" else "RGB")
    data = encoded(image, kind)
    reference = np.asarray(image.convert("RGB")).astype(int)
    for channels in (1, 3, 4):
        pixels = read_pixels(data, channels=channels)
        assert pixels.shape == (6, 8, channels)
        assert pixels.dtype == np.uint8
    if mode not in ("LA", "RGBA", "PA"):
        assert np.abs(read_pixels(data).astype(int) - reference).max() <= 1


def test_a_program_for_printers_is_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL hands PostScript to Ghostscript, whatever the file is called."""
    data = encoded(Image.fromarray(RAMP), "EPS")
    assert Image.open(io.BytesIO(data)).format == "EPS"
    ran: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *words, **more: ran.append(words))
    with pytest.raises(BadImageError, match="PostScript is not read"):
        read_pixels(data)
    assert not ran


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_small_tiff_of_huge_tiles_is_refused(dtype: type) -> None:
    for side, fits in ((512, True), (4096, False)):
        file = io.BytesIO()
        tifffile.imwrite(file, np.zeros((16, 16), dtype), tile=(side, side), compression="zlib")
        if fits:
            assert read_pixels(file.getvalue(), channels=1, max_pixels=1000).shape == (16, 16, 1)
        else:
            with pytest.raises(BadImageError, match="tiles of 4096x4096 are more than"):
                read_pixels(file.getvalue(), channels=1, max_pixels=1000)


def test_the_limit_is_ours_and_not_pils(monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL refuses twice this many, whatever is asked for."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    data = encoded(Image.fromarray(RAMP), "PNG")
    assert np.array_equal(read_pixels(data, max_pixels=48), RAMP)
    with pytest.raises(BadImageError, match="8x6 is more than the limit of 47 pixels"):
        read_pixels(data, max_pixels=47)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_damaged_tiff_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    data = bytearray(encoded(Image.fromarray(RAMP), "TIFF"))
    offset = int.from_bytes(data[4:8], "little")
    data[offset + 2 : offset + 60] = b"\xff" * 58  # its first tags
    with pytest.raises(BadImageError):
        read_pixels(bytes(data))
    assert caplog.records == []


def test_the_first_frame_of_an_animation_is_the_image() -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (read_pixels(data) == [255, 0, 0]).all()


def test_transparency_is_composited_on_white() -> None:
    image = Image.fromarray(np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 51]]], np.uint8))
    pixels = read_pixels(encoded(image, "PNG"))
    assert pixels[0].tolist() == [[10, 20, 30], [255, 255, 255], [206, 208, 210]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert read_pixels(encoded(palette, "PNG", transparency=1))[0].tolist() == [[255, 0, 0], [255, 255, 255]]


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    for kind in ("PNG", "TIFF"):
        turned = read_pixels(encoded(Image.fromarray(RAMP), kind, exif=exif))
        assert np.array_equal(turned, np.rot90(RAMP, -1))
    deep = RAMP.astype(np.uint16) * 257
    for orientation, expected in ((6, np.rot90(deep, -1)), (2, deep[:, ::-1]), (5, deep.transpose(1, 0, 2))):
        exif[0x0112] = orientation
        assert np.array_equal(read_pixels(png16(deep, exif.tobytes().removeprefix(b"Exif\0\0"))), expected)
    tall = (
        np.random.default_rng(0).integers(65536, size=(2100, 70, 3)).astype(np.uint16)
    )  # longer than what libvips keeps
    assert np.array_equal(read_pixels(png16(tall, exif.tobytes().removeprefix(b"Exif\0\0"))), tall.transpose(1, 0, 2))


def test_sixteen_bits_stay_sixteen_bits() -> None:
    grey = (np.arange(40, dtype=np.uint16) * 1600).reshape(5, 8)
    colour = np.stack([grey, grey[::-1], grey + 7], axis=2)
    files = {
        "grey png": (encoded(Image.fromarray(grey), "PNG"), grey[:, :, None]),
        "colour png": (png16(colour), colour),
        "grey tiff": (tiff(grey), grey[:, :, None]),
        "colour tiff": (tiff(colour, photometric="rgb"), colour),
        "npy": (npy(colour), colour),
    }
    for name, (data, expected) in files.items():
        pixels = read_pixels(data, channels=expected.shape[2])
        assert pixels.dtype == np.uint16, name
        assert np.array_equal(pixels, expected), name
        images = to_images(pixels)
        assert np.allclose((images.double().numpy() + 1) / 2 * 65535, np.moveaxis(expected, 2, 0), atol=0.02), name


def test_a_colour_of_sixteen_bits_that_stands_for_nothing_becomes_white() -> None:
    colour = np.full((2, 3, 3), 20000, np.uint16)
    colour[0, 0] = 1, 2, 3
    pixels = read_pixels(png16(colour, key=bytes([0, 1, 0, 2, 0, 3])))
    assert (pixels[0, 0] == 65535).all()
    assert (pixels.reshape(-1, 3)[1:] == 20000).all()


def png16(pixels: np.ndarray, exif: bytes = b"", key: bytes = b"") -> bytes:
    """A 16-bit colour PNG, which PIL cannot write: the chunks by hand."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    if exif:
        parts.insert(1, (b"eXIf", exif))
    if key:
        parts.insert(1, (b"tRNS", key))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in parts)


def tiff(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_and_tiffs_of_many_channels_are_read_exactly(channels: int, dtype: type) -> None:
    values = np.random.default_rng(0).random((6, 7, channels))
    array = values.astype(dtype) if dtype == np.float32 else (values * np.iinfo(dtype).max).astype(dtype)
    assert np.array_equal(read_pixels(npy(array), channels=channels), array)
    pages = np.moveaxis(array, 2, 0)
    if channels > 1:
        paged = tiff(pages, photometric="minisblack")
        stacked = read_image(paged, channels=channels, options=ReadOptions(pages_as_channels=True))
        assert np.array_equal(stacked.pixels, array)
        assert stacked.notes == ()
        interleaved = tiff(array, photometric="minisblack", planarconfig="contig")
        planar = tiff(pages, photometric="minisblack", planarconfig="separate")
        assert np.array_equal(read_pixels(interleaved, channels=channels), array)
        assert np.array_equal(read_pixels(planar, channels=channels), array)
    with pytest.raises(BadImageError, match=f"{channels} channels, the model has 7"):
        read_pixels(npy(array), channels=7)


def test_an_array_of_any_byte_order_and_version_is_read() -> None:
    values = np.arange(24, dtype=np.uint16).reshape(2, 4, 3)
    for dtype in (">u2", "<u2"):
        assert np.array_equal(read_pixels(npy(values.astype(dtype))), values)
    file = io.BytesIO()
    np.lib.format.write_array(file, values.astype(">u2"), version=(3, 0))
    assert np.array_equal(read_pixels(file.getvalue()), values)
    assert np.array_equal(read_pixels(npy((values / 24).astype(">f4"))), (values / 24).astype(np.float32))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not an image at all", "cannot be decoded"),
        (encoded(Image.fromarray(RAMP), "PNG")[:50], "cannot be decoded"),
        (encoded(Image.fromarray(np.tile(RAMP, (9, 9, 1))), "JPEG")[:400], "cannot be decoded"),
        (npy(RAMP)[:150], "truncated array"),
        (npy(RAMP)[:70], "the header of the .npy is damaged"),
        (npy(RAMP).replace(b"'shape'", b"'shade'"), "the header of the .npy is damaged"),
        (b"\x93NUMPY\x09\0" + npy(RAMP)[8:], r"\.npy of version 9\.0 is not read"),
        (imagecodecs.jpegxl_encode(RAMP)[:-20], "cannot be decoded: truncated JPEG XL"),
        (imagecodecs.jpegxl_encode(RAMP)[:4], "JPEG XL"),
        (b"\xff\xd8\xff\xc0\0\2\xff\xd9", "cannot be decoded: damaged JPEG"),
        (encoded(Image.fromarray(RAMP), "JPEG")[:200], "cannot be decoded: truncated JPEG"),
        (encoded(Image.fromarray(RAMP), "BMP")[:60], "cannot be decoded: truncated BMP"),
        (encoded(Image.fromarray(RAMP), "PNG")[:20] + bytes(90), "cannot be decoded: damaged PNG"),
        (png16(np.zeros((9, 9, 3), np.uint16))[:50] + bytes(30), "cannot be decoded: damaged PNG"),
        (encoded(Image.fromarray(RAMP), "TIFF")[:40] + bytes(500), "cannot be decoded: damaged TIFF"),
        (encoded(Image.fromarray(RAMP), "WEBP")[:20] + bytes(90), "cannot be decoded: damaged WebP"),
        (b"P6\n4 x\n255\n" + bytes(48), "cannot be decoded: damaged PNM"),
        (npy(np.full((3, 3), np.nan)), "outside"),
        (npy(np.array([{"a": 1}], dtype=object)), "shape"),
        (npy(np.zeros((3, 4, 0), np.uint8)), "shape"),
        (npy(np.zeros((2, 2), np.int32)), "int32"),
        (encoded(Image.new("L", (1100, 1000)), "PNG"), "more than the limit of 1000000"),
        (png16(np.zeros((1100, 1000, 3), np.uint16)), "more than the limit of 1000000"),
        (
            tiff(np.zeros((5, 1100, 1000), np.uint8), compression="zlib", photometric="minisblack"),
            "more than the limit",
        ),
    ],
)
def test_a_bad_file_is_named_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        read_pixels(data, max_pixels=1_000_000)


def test_the_fourth_sample_of_a_tiff_is_transparency_only_where_the_file_says_so() -> None:
    bands = np.full((4, 5, 4), 30000, np.uint16)
    bands[:, :, 3] = 10000
    for kind, expected in (("unspecified", 30000), ("unassalpha", 60113)):
        data = tiff(bands, photometric="rgb", extrasamples=[kind])
        assert np.array_equal(read_pixels(data, channels=4), bands)
        assert np.unique(read_pixels(data, channels=3)).tolist() == [expected]
        small = (bands / 257).astype(np.uint8)
        assert np.array_equal(read_pixels(tiff(small, photometric="rgb", extrasamples=[kind]), channels=4), small)
    two = tiff(bands[:2, :, :], photometric="minisblack")
    with pytest.raises(BadImageError, match="2 pages of 1 channels, the model has 3"):
        read_image(two, channels=3, options=ReadOptions(pages_as_channels=True))


def test_tiffs_of_every_compression_orientation_and_with_previews_are_read() -> None:
    sixteen = (np.arange(40 * 48 * 3, dtype=np.uint16) * 11).reshape(40, 48, 3)
    for compression in ("lzw", "zlib", "packbits", "lzma", "zstd", None):
        data = tiff(sixteen, photometric="rgb", compression=compression)
        assert np.array_equal(read_pixels(data), sixteen), compression
    for orientation in range(1, 9):
        data = tiff(sixteen, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
        eight = (sixteen >> 8).astype(np.uint8)
        exif = Image.Exif()
        exif[0x0112] = orientation
        reference = read_pixels(encoded(Image.fromarray(eight), "TIFF", exif=exif))
        assert np.array_equal(read_pixels(data) >> 8, reference), orientation
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write((sixteen >> 8).astype(np.uint8), photometric="rgb")
        writer.write((sixteen[::4, ::4] >> 8).astype(np.uint8), photometric="rgb")
    assert np.array_equal(read_pixels(file.getvalue()), sixteen >> 8)
    floats = (sixteen / 65535).astype(np.float32)
    assert np.array_equal(read_pixels(tiff(floats, photometric="rgb")), floats)
    inverted = read_pixels(tiff(sixteen[:, :, 0], photometric="miniswhite"), channels=1)
    assert np.array_equal(inverted[:, :, 0], 65535 - sixteen[:, :, 0])


def test_a_file_that_was_cut_is_refused_unless_all_of_its_pixels_are_there() -> None:
    colour = (np.arange(5 * 8 * 3, dtype=np.uint16) * 500).reshape(5, 8, 3)
    for data in (encoded(Image.fromarray(RAMP), "PNG"), tiff(colour, photometric="rgb"), npy(colour), png16(colour)):
        for length in range(0, len(data), 3):
            with contextlib.suppress(BadImageError):
                assert np.array_equal(read_pixels(data[:length]), read_pixels(data))


def test_grey_is_the_luma_of_colour() -> None:
    reference = np.asarray(Image.fromarray(RAMP).convert("L")).astype(int)
    assert np.abs(convert_channels(RAMP, 1)[:, :, 0].astype(int) - reference).max() <= 1


def test_pixels_and_images_are_inverse_and_rounded_to_the_nearest() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    images = to_images(every)
    assert images.min() == -1
    assert images.max() == 1
    assert np.array_equal(to_pixels(images), every)
    half = torch.tensor([[[-1.2, 1.2, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1]]])
    assert to_pixels(half).ravel().tolist() == [0, 255, 0, 1]


def test_resizing_sixteen_bits_agrees_with_resizing_eight() -> None:
    eight = np.random.default_rng(1).integers(0, 256, (40, 30, 3)).astype(np.uint8)
    sixteen = resize(eight.astype(np.uint16) * 257, (16, 16))
    assert np.abs(sixteen / 257 - resize(eight, (16, 16))).max() <= 1.01


def test_the_centre_square_of_a_square_of_that_size_is_itself() -> None:
    square = np.random.default_rng(1).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert np.array_equal(centre_square(square, 32), square)
    wide = np.concatenate([square * 0, square, square * 0], axis=1)
    assert np.array_equal(centre_square(wide, 32), square)
