"""What a PNG says beside its pixels: texts, time, and colours by gAMA and cHRM where nothing better says them."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm_vae.codec.picture import as_picture, encode_picture, read_picture
from ldm_vae.codec.sections import pack_metadata, unpack_metadata
from ldm_vae.data.colour import linear_to_srgb, srgb_to_linear
from ldm_vae.data.png import chunk
from ldm_vae.data.reader import ReadOptions, from_pil, read_image, read_pixels
from tests.data.test_colour import P3, SRGB, colours, in_p3, saved

CHUNKS = {
    b"gAMA": struct.pack(">I", 45455),
    b"cHRM": struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000),
    b"cICP": bytes([1, 13, 0, 1]),
    b"sRGB": b"\0",
    b"iCCP": b"sRGB\0\0" + zlib.compress(SRGB),
}
LINEAR = struct.pack(">I", 100_000)
KEPT = ReadOptions(keep_colour=True)


def png_with(pixels: np.ndarray, *chunks: tuple[bytes, bytes], behind: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """A PNG with more chunks before its pixels, and behind them."""
    data = saved(pixels, "PNG")
    between = b"".join(chunk(*one) for one in chunks)
    return data[:33] + between + data[33:-12] + b"".join(chunk(*one) for one in behind) + data[-12:]


def test_texts_of_one_keyword_are_kept_in_order_with_those_behind_the_pixels() -> None:
    texts = [
        (b"tEXt", b"note\0first \xe9"),
        (b"zTXt", b"note\0\0" + zlib.compress(b"second")),
        (b"iTXt", b"prompt\0\1\0en\0Prompt\0" + zlib.compress("third ü".encode())),
        (b"iTXt", b"note\0\0\0\0\0fourth"),
        (b"zTXt", b"cut\0\0" + zlib.compress(b"damaged")[:-3]),
    ]
    kept = (("note", "first é"), ("note", "second"), ("prompt", "third ü"), ("note", "fourth"), ("cut", ""))
    picture = read_picture(png_with(colours(), *texts[:3], behind=tuple(texts[3:])))
    assert picture.metadata.text == kept
    assert unpack_metadata(pack_metadata(picture.metadata)) == picture.metadata
    assert read_picture(encode_picture(picture, ".png")).metadata.text == kept
    notes: list[str] = []
    encode_picture(picture, ".webp", notes)
    assert notes == ['.webp holds no text "note", text "note", text "note", text "prompt", text "cut": left out']


def test_the_time_of_the_last_change_is_kept() -> None:
    time = struct.pack(">H5B", 2024, 2, 29, 23, 59, 60)
    picture = read_picture(png_with(colours(), behind=((b"tIME", time),)))
    assert picture.metadata.modified == time
    assert unpack_metadata(pack_metadata(picture.metadata)).modified == time
    assert chunk(b"tIME", time) in encode_picture(picture, ".png")
    notes: list[str] = []
    encode_picture(picture, ".jpg", notes)
    assert notes == [".jpg holds no time of the last change: left out"]


def test_a_gamma_and_chromaticities_become_srgb_and_are_kept_as_a_profile() -> None:
    light = np.rint(srgb_to_linear(colours() / 255) * 255).astype(np.uint8)
    from_light = linear_to_srgb(light / 255) * 255
    files = {
        "linear": png_with(light, (b"gAMA", LINEAR)),
        "p3": png_with(in_p3(colours()), (b"gAMA", CHUNKS[b"gAMA"]), (b"cHRM", CHUNKS[b"cHRM"])),
        "p3 alone": png_with(in_p3(colours()), (b"cHRM", CHUNKS[b"cHRM"])),
    }
    for name, data in files.items():
        stored, expected = (light, from_light) if name == "linear" else (in_p3(colours()), colours())
        assert np.abs(stored - expected).max() > 15
        found = read_image(data, keep_alpha=True)
        assert np.abs(found.pixels - expected.astype(float)).max() <= 2, name
        assert (found.metadata.icc, found.notes) == (b"", ())
        picture = read_picture(data)
        assert np.array_equal(picture.pixels, stored)
        again = read_image(encode_picture(picture, ".png"))
        assert np.array_equal(again.pixels, found.pixels)
        with Image.open(io.BytesIO(data)) as opened:
            assert np.array_equal(from_pil(opened).pixels, found.pixels)
    grey = read_pixels(png_with(light[:, :, 0], (b"gAMA", LINEAR)), channels=1)
    assert np.abs(grey - from_light[:, :, :1]).max() <= 2


@pytest.mark.parametrize(
    "better", [(b"cICP",), (b"iCCP",), (b"sRGB",), (b"iCCP", b"sRGB"), (b"cICP", b"iCCP")], ids=lambda b: str(b)
)
def test_gamma_and_chromaticities_count_only_where_nothing_better_says_the_colours(better: tuple[bytes, ...]) -> None:
    chunks = [(b"gAMA", LINEAR), (b"cHRM", CHUNKS[b"cHRM"]), *((kind, CHUNKS[kind]) for kind in better)]
    data = png_with(colours(), *chunks)
    assert np.array_equal(read_pixels(data), colours())
    metadata = read_picture(data).metadata
    assert metadata.icc == (SRGB if b"iCCP" in better else b"")
    assert metadata.cicp == ((1, 13, 0, 1) if b"cICP" in better else None)


SRGB_POINTS = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"gAMA", struct.pack(">I", 45455))],
        [(b"gAMA", struct.pack(">I", 45455)), (b"cHRM", SRGB_POINTS)],
        [(b"gAMA", bytes(4))],
        [(b"cHRM", bytes(32))],
        [(b"cHRM", struct.pack(">8I", *[30000] * 8))],
    ],
)
def test_what_is_srgb_or_cannot_be_changes_nothing(chunks: list[tuple[bytes, bytes]]) -> None:
    found = read_image(png_with(colours(), *chunks), keep_alpha=True, options=KEPT)
    assert np.array_equal(read_pixels(png_with(colours(), *chunks)), colours())
    assert (found.metadata.icc, found.notes) == (b"", ())


def test_an_image_of_pils_has_the_code_points_of_its_png() -> None:
    data = png_with(in_p3(colours()), (b"cICP", bytes([12, 13, 0, 1])), (b"gAMA", LINEAR))
    opened, loaded, copied = (Image.open(io.BytesIO(data)) for _ in range(3))
    loaded.load()
    for image in (opened, loaded, copied.convert("RGBA").crop((0, 0, 48, 36))):
        metadata = as_picture(image).metadata
        assert (metadata.cicp, metadata.icc) == ((12, 13, 0, 1), b"")
        assert np.array_equal(from_pil(image).pixels[:, :, :3], read_pixels(data))
    picture = read_picture(data)
    assert as_picture(picture.to_pil()).metadata.cicp == (12, 13, 0, 1)


def test_the_code_points_of_an_avif_that_pil_has_opened_are_kept_or_it_is_said() -> None:
    plain, profiled = saved(colours(), "AVIF"), saved(in_p3(colours()), "AVIF", icc_profile=P3)
    with warnings.catch_warnings(action="error"):
        assert as_picture(Image.open(io.BytesIO(plain))).metadata.cicp == (1, 13, 0, 1)
        with Image.open(io.BytesIO(profiled)) as opened:
            opened.load()
            assert as_picture(opened).metadata.icc == P3
        as_picture(Image.fromarray(colours()))
    with Image.open(io.BytesIO(plain)) as opened:
        opened.load()
        with pytest.warns(UserWarning, match="Pillow keeps no code points .* of an AVIF"):
            assert as_picture(opened).metadata.cicp is None


def test_a_profile_made_of_a_gamma_is_one_for_other_programs() -> None:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(read_picture(png_with(colours(), (b"gAMA", LINEAR))).metadata.icc))
    assert ImageCms.isIntentSupported(profile, ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Direction.INPUT) == 1
