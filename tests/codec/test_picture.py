from __future__ import annotations

import io
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from ldm_vae import pillow_plugin
from ldm_vae.codec import transparency
from ldm_vae.codec.bitstream import ALPHA, METADATA
from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.picture import Picture, as_picture, encode_picture, read_picture
from ldm_vae.codec.sections import inflate, pack_metadata, pack_sections, unpack_alpha, unpack_metadata
from ldm_vae.codec.transparency import smooth_transparent
from ldm_vae.data import large
from ldm_vae.data.metadata import Metadata
from ldm_vae.errors import BadImageError, ConfigError, CorruptError


def pixels_of(channels: int, dtype: type = np.uint8) -> np.ndarray:
    top = np.iinfo(dtype).max
    return np.random.default_rng(channels).integers(top, size=(9, 14, channels), dtype=dtype, endpoint=True)


def deflated(content: bytes) -> bytes:
    return zlib.compress(content, 9, -15)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_png_holds_every_picture_whole(channels: int, dtype: type) -> None:
    values = pixels_of(channels, dtype)
    exif = Image.Exif()
    exif[0x010E] = "a description"
    picture = Picture(
        pixels=values[:, :, : channels - 1] if channels in (2, 4) else values,
        alpha=values[:, :, -1] if channels in (2, 4) else None,
        metadata=Metadata(
            icc=b"a profile" * 50,
            cicp=(9, 16, 0, 1),
            exif=exif.tobytes().removeprefix(b"Exif\0\0"),
            xmp=b"<x:xmpmeta/>",
            text=(("prompt", "a cat, é"), ("workflow", "{}" * 500)),
            resolution=(300.0, 150.0),
        ),
    )
    read = read_picture(encode_picture(picture, ".png"))
    assert np.array_equal(read.whole(), picture.whole())
    assert read.whole().dtype == dtype
    assert replace(read.metadata, resolution=None) == replace(picture.metadata, resolution=None)
    assert read.metadata.resolution == pytest.approx((300, 150), abs=0.0254)


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
    kept.load(read.metadata.exif)
    assert dict(kept) == {0x010E: "kept"}


def test_pages_and_bands_of_a_tiff_are_no_transparency() -> None:
    pages = np.random.default_rng(0).integers(256, size=(2, 9, 14), dtype=np.uint8)
    file = io.BytesIO()
    tifffile.imwrite(file, pages, photometric="minisblack")
    assert np.array_equal(read_picture(file.getvalue(), channels=3).pixels, pages[0, :, :, None])
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


def test_a_line_names_what_a_format_cannot_hold() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    texts = (("Comment", "a comment"), ("prompt", "a cat"))
    metadata = Metadata(icc=srgb, cicp=(9, 16, 0, 1), xmp=b"<x:xmpmeta/>", text=texts, resolution=(300.0, 300.0))
    picture = Picture(pixels=pixels_of(3), metadata=metadata)
    expected = {
        ".png": [],
        ".jpg": ["cICP", 'text "prompt"'],
        ".webp": ["cICP", "resolution", 'text "Comment"', 'text "prompt"'],
        ".npy": ["ICC profile", "cICP", "XMP", "resolution", 'text "Comment"', 'text "prompt"'],
    }
    for extension, names in expected.items():
        notes: list[str] = []
        encode_picture(picture, extension, notes)
        assert notes == ([f"{extension} holds no {', '.join(names)}: left out"] if names else [])
    read = read_picture(encode_picture(picture, ".jpg"))
    assert read.metadata == replace(metadata, cicp=None, text=texts[:1])


def test_all_metadata_takes_one_small_section() -> None:
    metadata = Metadata(
        cicp=(9, 16, 0, 1),
        exif=b"II*\0",
        xmp=b"<x/>",
        text=(("prompt", "é"), ("empty", "")),
        resolution=(72.009, 300),
    )
    picture = Picture(pixels=pixels_of(3), metadata=metadata)
    sections = pack_sections(picture, strip=False)
    assert list(sections) == [METADATA]
    assert unpack_metadata(sections[METADATA]) == metadata
    assert len(pack_metadata(Metadata(resolution=(72.0, 72.0)))) <= 10
    assert pack_sections(picture, strip=True) == {}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\4\3abc", "cICP of 3 bytes"),
        (b"\5\2\0\1", "resolution"),
        (b"\5\1\1", "cut short"),
        (b"\1\7abc", "cut short"),
        (b"\6", "cut short"),
        (b"\0\0" * 5000, "4096 items"),
    ],
)
def test_metadata_that_cannot_be_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(CorruptError, match=reason):
        unpack_metadata(deflated(content))
    assert unpack_metadata(deflated(b"\x77\2xy\3\1z")) == Metadata(xmp=b"z")  # one of a later writer


def test_noise_under_transparent_pixels_gives_way_to_their_neighbours_colours() -> None:
    rng = np.random.default_rng(0)
    for dtype, channels, shape in ((np.uint8, 3, (70, 50)), (np.uint16, 1, (17, 91)), (np.uint8, 3, (1, 3))):
        top = np.iinfo(dtype).max
        pixels = rng.integers(top, size=(*shape, channels), dtype=dtype, endpoint=True)
        alpha = np.zeros(shape, dtype)
        alpha[: shape[0] // 2 + 1, : shape[1] // 3] = 1
        pixels[alpha > 0] = top // 3
        given = pixels.copy()
        filled = smooth_transparent(Picture(pixels=pixels, alpha=alpha)).pixels
        assert np.array_equal(pixels, given)
        assert np.abs(filled.astype(int) - top // 3).max() <= 1
        empty = smooth_transparent(Picture(pixels=pixels, alpha=np.zeros(shape, dtype)))
        assert (empty.pixels == empty.pixels[0, 0]).all()
    opaque = Picture(pixels=pixels, alpha=np.ones(shape, np.uint8))
    assert smooth_transparent(opaque) is opaque


def test_transparent_pixels_are_filled_alike_strip_by_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    y, x = np.mgrid[:60, :40]
    pixels = np.stack([4 * y, 6 * x, x + y], axis=2).astype(np.uint8)
    alpha = np.where((y - 30) ** 2 + (x - 20) ** 2 < 200, 255, 0).astype(np.uint8)
    whole = smooth_transparent(Picture(pixels=pixels, alpha=alpha)).pixels
    for module in (large, transparency):
        monkeypatch.setattr(module, "STRIP", 40 * 9)
    assert np.array_equal(smooth_transparent(Picture(pixels=pixels, alpha=alpha)).pixels, whole)
    assert np.array_equal(whole[alpha > 0], pixels[alpha > 0])
    assert np.abs(np.diff(whole.astype(int), axis=0)).max() < 90


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_comes_back_or_is_refused(dtype: type) -> None:
    alpha = pixels_of(1, dtype)[:, :, 0]
    packed = pack_sections(Picture(pixels=alpha[:, :, None], alpha=alpha), strip=True)[ALPHA]
    assert np.array_equal(unpack_alpha(packed, 9, 14, np.dtype(dtype)), alpha)
    for damaged, height in ((packed, 10), (packed[:40], 9), (b"", 9), (b"x" * 60, 9)):
        with pytest.raises(CorruptError, match=r"PNG|damaged"):
            unpack_alpha(damaged, height, 14, np.dtype(dtype))


def test_metadata_that_would_grow_without_end_is_refused() -> None:
    assert inflate(deflated(bytes(1000)), limit=1000) == bytes(1000)
    for data in (
        deflated(bytes(10**7)),
        deflated(b"x") + b"more",
        b"",
        b"nonsense",
        deflated(b"x")[:-1],
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
        kept.load(read.metadata.exif)
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
    kept.load(read.metadata.exif)
    assert dict(kept) == {0x010E: "kept"}
    part = Picture(pixels=read.pixels[:4, :5], metadata=read.metadata)
    with Image.open(io.BytesIO(encode_picture(part, ".tif"))) as again:
        assert np.array_equal(np.asarray(again), read.pixels[:4, :5])


def test_pillow_saves_and_opens_with_metadata_and_smooth_colours_where_nothing_is_seen(
    codec: LatentCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pillow_plugin.state, "visual", codec)
    values = np.random.default_rng(0).integers(0, 256, (40, 40, 4), np.uint8)
    values[:, :, 3] = 0
    values[:16, :16] = 100
    image = Image.fromarray(values)
    image.info.update({"xmp": b"<x/>", "dpi": (300, 150), "icc_profile": b""})
    smooth, exact = io.BytesIO(), io.BytesIO()
    image.save(smooth, "LDI")
    image.save(exact, "LDI", exact=True)
    assert exact.getvalue() == codec.compress(image)
    assert smooth.getvalue() == codec.compress(smooth_transparent(as_picture(image)))
    assert len(smooth.getvalue()) < len(exact.getvalue())
    with Image.open(smooth) as opened:
        assert (opened.info["xmp"], opened.info["dpi"]) == (b"<x/>", (300, 150))
        assert np.array_equal(np.asarray(opened)[:, :, 3], values[:, :, 3])


def test_a_grey_image_loses_a_profile_for_colours() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(pixels_of(1)[:, :, 0])
    image.info["icc_profile"] = srgb
    with pytest.warns(UserWarning, match="profile is for RGB and the image is grey"):
        assert as_picture(image).metadata.icc == b""
    file, notes = io.BytesIO(), list[str]()
    image.save(file, "PNG", icc_profile=srgb)
    read = read_picture(file.getvalue(), notes=notes)
    assert (read.metadata.icc, notes) == (b"", ["its colour profile is for RGB and the image is grey: left out"])
    assert b"iCCP" not in encode_picture(read, ".png")


def test_metadata_that_a_format_cannot_hold_is_one_error() -> None:
    with pytest.raises(ConfigError, match=r"\.png"):
        encode_picture(Picture(pixels=pixels_of(3), metadata=Metadata(exif=b"garbage")), ".tif")


def test_a_model_of_four_channels_takes_them_as_colours() -> None:
    assert as_picture(pixels_of(4), channels=4).alpha is None
    assert as_picture(pixels_of(4), channels=3).alpha is not None


def test_a_tiff_without_a_resolution_has_none(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "none.tif")
    assert read_picture(tmp_path / "none.tif").metadata.resolution is None
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "some.tif", dpi=(300, 300))
    assert read_picture(tmp_path / "some.tif").metadata.resolution == (300, 300)


def test_what_a_format_has_no_mode_for_names_one_that_has() -> None:
    deep = as_picture(np.zeros((4, 4, 3), np.uint16))
    with pytest.raises(ConfigError, match=r"\.tif cannot hold this picture .*: write \.png"):
        encode_picture(deep, ".tif")
