from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae.codec.picture import as_picture
from ldm_vae.data.conversion import images_from, images_to, mask_from, to_images
from ldm_vae.data.reader import read_pixels
from ldm_vae.errors import BadImageError


def colours() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def test_the_same_image_in_any_form_is_the_same_tensor() -> None:
    pixels = colours()
    expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    forms: list[Any] = [Image.fromarray(pixels), pixels, pixels[None], pixels / 255]
    forms += [(expected[0] + 1) / 2, (expected + 1) / 2]
    for given in forms:
        torch.testing.assert_close(images_from(given, channels=3), expected)
    torch.testing.assert_close(images_from(forms, channels=3), expected.expand(6, -1, -1, -1))
    torch.testing.assert_close(images_from(pixels.astype(np.uint16) * 257, channels=3), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "F"])
def test_every_mode_of_pil_is_read(mode: str) -> None:
    grey = Image.fromarray(colours()[:, :, 0])
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    else:
        image = grey.convert(mode) if mode != "PA" else grey.convert("P").convert("PA")
    expected = torch.from_numpy(np.asarray(grey.convert("1") if mode == "1" else grey).astype(np.float32))
    expected = (expected if mode != "1" else expected * 255) / 127.5 - 1
    for channels in (1, 3):
        images = images_from(image, channels=channels)
        assert images.shape == (1, channels, 5, 7)
        atol = 0.02 if mode in ("CMYK", "YCbCr") else 1e-5
        torch.testing.assert_close(images[0], expected.expand(channels, -1, -1), rtol=0, atol=atol)


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_transparent_colour_is_white_however_the_image_is_given(mode: str) -> None:
    image = Image.fromarray(np.array([[[10, 20, 30], [40, 50, 60]]], np.uint8)).convert(mode)
    file = io.BytesIO()
    key = image.getpixel((0, 0))
    image.save(file, "PNG", transparency=key)
    pixels = read_pixels(file.getvalue())
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == list(image.convert("RGB").getpixel((1, 0)))
    opened = Image.open(file)
    assert torch.equal(images_from(opened, channels=3), to_images(pixels)[None])
    assert as_picture(opened).alpha[0].tolist() == [0, 255]


def test_integers_of_32_bits_are_read_as_16_and_refused_beyond() -> None:
    image = Image.fromarray(np.array([[0, 65535]], np.int32))
    assert images_from(image, channels=1).tolist() == [[[[-1, 1]]]]
    for value in (-5, 65536):
        with pytest.raises(BadImageError, match="at most 16 bits are read"):
            images_from(Image.fromarray(np.array([[0, value]], np.int32)), channels=1)


def test_an_image_lies_as_its_orientation_says() -> None:
    image = Image.fromarray(colours())
    image.getexif()[274] = 6
    assert images_from(image, channels=3).shape == (1, 3, 7, 5)


def test_masks_are_white_from_one_half_on() -> None:
    levels = np.array([[0, 127, 128, 255]], np.uint8)
    expected = torch.tensor([[[[False, False, True, True]]]])
    forms: list[Any] = [Image.fromarray(levels), levels, levels[:, :, None], levels[None, :, :, None]]
    forms += [levels > 127, levels / 255, torch.from_numpy(levels / 255), expected, expected[0], expected[0, 0]]
    for given in forms:
        assert torch.equal(mask_from(given), expected)
    assert torch.equal(mask_from([forms[0], forms[1]]), expected.expand(2, -1, -1, -1))
    assert torch.equal(mask_from([expected, expected[0]]), expected.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match=r"a mask of shape \(3, 1, 4\)"):
        mask_from(torch.zeros(3, 1, 4))


def test_images_leave_as_they_came() -> None:
    pixels = colours()
    images = images_from(pixels, channels=3)
    np.testing.assert_array_equal(np.asarray(images_to(images, "pil")[0]), pixels)
    np.testing.assert_allclose(images_to(images, "np")[0], pixels / 255, atol=1e-6)
    torch.testing.assert_close(images_to(images, "pt") * 2 - 1, images)
    assert images_to(images[:, :1], "pil")[0].mode == "L"
    assert images_to(images[:, [0, 1, 2, 0]], "pil")[0].mode == "RGBA"
    assert images_to(images * 9, "np").max() == 1


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("photo.png", ValueError, "str was given: a PIL image, an array or a tensor is needed"),
        (np.zeros(4), ValueError, r"ndarray of shape \(4,\) was given"),
        (np.zeros((4, 4, 7), np.uint8), BadImageError, "7 channels, the model has 3"),
        (np.full((4, 4, 3), 255.0), BadImageError, r"outside \[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), BadImageError, "values of type int64"),
        (torch.zeros(1, 4, 4), ValueError, r"\(1, 4, 4\) and torch.float32 was given: floats in"),
        (torch.full((3, 4, 4), -0.5), ValueError, r"outside \[0, 1\] was given: of images in \[-1, 1\], give"),
        (torch.full((3, 4, 4), torch.nan), ValueError, r"outside \[0, 1\]"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)], ValueError, "different sizes"),
    ],
)
def test_what_is_no_image_is_said_to_be_none(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        images_from(given, channels=3)
