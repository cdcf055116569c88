from __future__ import annotations

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from ldm_vae.codec.bitstream import ALPHA
from ldm_vae.codec.picture import Picture, as_picture, encode_picture, read_picture
from ldm_vae.codec.sections import inflate, pack_sections, unpack_alpha
from ldm_vae.errors import BadImageError, ConfigError, CorruptError


def pixels_of(channels: int, dtype: type = np.uint8) -> np.ndarray:
    top = np.iinfo(dtype).max
    return np.random.default_rng(channels).integers(top, size=(9, 14, channels), dtype=dtype, endpoint=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_png_holds_every_picture_whole(channels: int, dtype: type) -> None:
    values = pixels_of(channels, dtype)
    exif = Image.Exif()
    exif[0x010E] = "a description"
    picture = Picture(
        pixels=values[:, :, : channels - 1] if channels in (2, 4) else values,
        alpha=values[:, :, -1] if channels in (2, 4) else None,
        icc=b"a profile" * 50,
        exif=exif.tobytes().removeprefix(b"Exif\0\0"),
    )
    read = read_picture(encode_picture(picture, ".png"))
    assert np.array_equal(read.whole(), picture.whole())
    assert read.whole().dtype == dtype
    assert (read.icc, read.exif) == (picture.icc, picture.exif)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "CMYK", "I;16"])
def test_any_mode_of_pil_becomes_a_picture(mode: str) -> None:
    image = Image.fromarray(pixels_of(3)).convert("I" if mode == "I;16" else mode)
    image = image.convert(mode)
    read = as_picture(image)
    reference = image.convert("RGB") if mode in ("P", "CMYK") else image.convert("L") if mode == "1" else image
    assert np.array_equal(read.whole().squeeze(), np.asarray(reference).squeeze())
    assert (read.alpha is not None) == (mode in ("LA", "RGBA"))


def test_the_orientation_is_applied_and_no_longer_said() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "kept"
    file = io.BytesIO()
    Image.fromarray(pixels_of(3)).save(file, "PNG", exif=exif)
    read = read_picture(file.getvalue())
    assert np.array_equal(read.pixels, np.rot90(pixels_of(3), -1))
    kept = Image.Exif()
    kept.load(read.exif)
    assert dict(kept) == {0x010E: "kept"}


def test_pages_and_bands_of_a_tiff_are_no_transparency() -> None:
    pages = np.random.default_rng(0).integers(256, size=(2, 9, 14), dtype=np.uint8)
    file = io.BytesIO()
    tifffile.imwrite(file, pages, photometric="minisblack")
    with pytest.raises(BadImageError, match="2 pages"):
        read_picture(file.getvalue(), channels=3)
    assert np.array_equal(read_picture(file.getvalue(), channels=2).pixels, np.moveaxis(pages, 0, 2))
    bands = pixels_of(4, np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, bands, photometric="rgb", extrasamples=["unspecified"])
    four = read_picture(file.getvalue(), channels=4)
    assert np.array_equal(four.pixels, bands)
    assert four.alpha is None
    assert np.array_equal(read_picture(file.getvalue(), channels=3).pixels, bands[:, :, :3])


def test_other_extensions_hold_what_they_can() -> None:
    picture = Picture(pixels=pixels_of(3))
    for extension in (".bmp", ".tif", ".npy", ".png", ".webp", ".ppm"):
        read = read_picture(encode_picture(picture, extension))
        assert np.array_equal(read.pixels, picture.pixels)
    for extension in ("", ".txt", ".xyz"):
        with pytest.raises(ConfigError, match="image file"):
            encode_picture(picture, extension)
    smooth = Picture(pixels=np.indices((40, 60, 3)).sum(axis=0).astype(np.uint8))
    for extension in (".jpg", ".avif"):
        read = read_picture(encode_picture(smooth, extension)).pixels.astype(int)
        assert np.abs(read - smooth.pixels).max() <= 3
    with_alpha = Picture(pixels=pixels_of(3), alpha=pixels_of(1)[:, :, 0])
    for extension in (".png", ".npy", ".webp", ".tif"):
        assert np.array_equal(read_picture(encode_picture(with_alpha, extension)).whole(), with_alpha.whole())
    for extension in (".jpg", ".bmp", ".ppm", ".gif"):
        with pytest.raises(ConfigError, match=r"write \.png"):
            encode_picture(with_alpha, extension)
    with pytest.raises(ConfigError, match="16 bits"):
        encode_picture(Picture(pixels=pixels_of(3, np.uint16)), ".bmp")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_comes_back_or_is_refused(dtype: type) -> None:
    alpha = pixels_of(1, dtype)[:, :, 0]
    packed = pack_sections(Picture(pixels=alpha[:, :, None], alpha=alpha), strip=True)[ALPHA]
    assert np.array_equal(unpack_alpha(packed, 9, 14, np.dtype(dtype)), alpha)
    for damaged, height in ((packed, 10), (packed[:40], 9), (b"", 9), (b"x" * 60, 9)):
        with pytest.raises(CorruptError, match=r"PNG|damaged"):
            unpack_alpha(damaged, height, 14, np.dtype(dtype))


def test_metadata_that_would_grow_without_end_is_refused() -> None:
    import zlib

    assert inflate(zlib.compress(bytes(1000)), limit=1000) == bytes(1000)
    for data in (
        zlib.compress(bytes(10**7)),
        zlib.compress(b"x") + b"more",
        b"",
        b"nonsense",
        zlib.compress(b"x")[:-1],
    ):
        with pytest.raises(CorruptError, match=r"1000 bytes|damaged"):
            inflate(data, limit=1000)


def test_what_is_no_picture_is_refused() -> None:
    for values in (np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), np.zeros((2, 2, 2, 2), np.uint8)):
        with pytest.raises(BadImageError, match="uint8 or uint16"):
            as_picture(values)
    for alpha in (np.zeros((9, 13), np.uint8), np.zeros((9, 14), np.uint16)):
        with pytest.raises(BadImageError, match="alpha"):
            Picture(pixels=pixels_of(3), alpha=alpha)


def test_a_phones_photo_comes_upright_with_its_exif_from_pil_and_from_a_file() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a phone"
    file = io.BytesIO()
    Image.fromarray(pixels_of(3)).save(file, "JPEG", exif=exif, quality=95)
    from_file, from_pil = read_picture(file.getvalue()), as_picture(Image.open(io.BytesIO(file.getvalue())))
    for read in (from_file, from_pil):
        assert read.pixels.shape == (14, 9, 3)
        kept = Image.Exif()
        kept.load(read.exif)
        assert dict(kept) == {0x010F: "a phone"}
    assert np.array_equal(from_file.pixels, from_pil.pixels)
    with Image.open(io.BytesIO(encode_picture(from_file, ".jpg"))) as again:
        assert again.getexif()[0x010F] == "a phone"
    assert dict(from_file.to_pil().getexif()) == {0x010F: "a phone"}


def test_how_a_tiff_is_stored_is_not_kept_as_exif() -> None:
    file = io.BytesIO()
    Image.fromarray(pixels_of(3)).save(file, "TIFF", description="kept", compression="tiff_lzw")
    read = read_picture(file.getvalue())
    kept = Image.Exif()
    kept.load(read.exif)
    assert dict(kept) == {0x010E: "kept"}
    part = Picture(pixels=read.pixels[:4, :5], exif=read.exif)
    with Image.open(io.BytesIO(encode_picture(part, ".tif"))) as again:
        assert np.array_equal(np.asarray(again), read.pixels[:4, :5])


def test_metadata_that_a_format_cannot_hold_is_one_error() -> None:
    with pytest.raises(ConfigError, match=r"\.png"):
        encode_picture(Picture(pixels=pixels_of(3), exif=b"garbage"), ".tif")


def test_a_model_of_four_channels_takes_them_as_colours() -> None:
    assert as_picture(pixels_of(4), channels=4).alpha is None
    assert as_picture(pixels_of(4), channels=3).alpha is not None
