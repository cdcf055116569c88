"""Colour spaces to sRGB: by ICC profile, by the code points of ITU-T H.273, of inks, and of CIELAB. No torch here.

Values that sRGB cannot hold are clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache

import imagecodecs
import numpy as np

from ldm_vae.data.images import Pixels, rounded, white
from ldm_vae.data.large import strips
from ldm_vae.data.metadata import Metadata

Cicp = tuple[int, int, int, int]
SIGNATURE = b"acsp"
"""At byte 36 of an ICC profile."""
KINDS = {b"GRAY": ("grey", (1, 2)), b"RGB ": ("RGB", (3, 4)), b"CMYK": ("CMYK", ())}
"""What an ICC profile says that it describes (ICC.1, 7.2.8): in words, and the channels of such pixels."""
PRIMARIES = {
    1: (0.640, 0.330, 0.300, 0.600, 0.150, 0.060, 0.3127, 0.3290),
    4: (0.67, 0.33, 0.21, 0.71, 0.14, 0.08, 0.310, 0.316),
    5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06, 0.3127, 0.3290),
    6: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, 0.3127, 0.3290),
    7: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, 0.3127, 0.3290),
    8: (0.681, 0.319, 0.243, 0.692, 0.145, 0.049, 0.310, 0.316),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, 0.3127, 0.3290),
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.3127, 0.3290),
    22: (0.630, 0.340, 0.295, 0.605, 0.155, 0.077, 0.3127, 0.3290),
}
"""x and y of red, green, blue and white (H.273, table 2)."""
LIKE_SRGB = frozenset((1, 2, 6, 13, 14, 15))
"""Transfers that are read as sRGB's: those of BT.709 and its kin are, in practice, shown alike; and unspecified (2)."""
REFERENCE_WHITE = 203.0
"""cd/m2 of white in PQ, and in HLG on a display of 1,000 cd/m2 (ITU-R BT.2408, table 1)."""
EXACT = 0x0100
"""Little CMS' cmsFLAGS_NOOPTIMIZE: of 16 bits, and of grey, it would make a coarse table (errors of up to 6 %)."""
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
D50, D65 = (0.3457, 0.3585), (0.3127, 0.3290)


def in_srgb(pixels: Pixels, metadata: Metadata) -> tuple[Pixels, Metadata, tuple[str, ...]]:
    """Pixels (H, W, 1 to 4) in sRGB, the metadata without what described their colours, and notes.

    A cICP counts before an ICC profile (PNG, third edition, 4.3).
    """
    plain = replace(metadata, icc=b"", cicp=None)
    colours = pixels.shape[2] - (pixels.shape[2] in (2, 4))
    if metadata.cicp is not None:
        if not metadata.cicp[3]:
            pixels = by_strips(pixels, to_full_range)
        if is_srgb_cicp(metadata.cicp):
            return pixels, plain, ()
        primaries, transfer = metadata.cicp[:2]
        if primaries not in (*PRIMARIES, 2) or transfer not in (*LIKE_SRGB, *LINEAR_OF):
            return pixels, plain, (f"colours of primaries {primaries} and transfer {transfer} were read as sRGB",)
        clipped: list[bool] = []

        def convert(strip: Pixels) -> Pixels:
            rgb = strip if colours == 3 else np.repeat(strip, 3, axis=2)
            converted = from_cicp(rgb, primaries, transfer, clipped)
            return converted if colours == 3 else converted[:, :, :1]

        pixels = by_strips(pixels, convert)
        note = f"HDR: what is brighter than the reference white ({REFERENCE_WHITE:g} cd/m2) became white"
        return pixels, plain, (note,) if any(clipped) else ()
    if not metadata.icc or is_srgb_profile(metadata.icc):
        return pixels, plain, ()
    try:
        return by_strips(pixels, lambda strip: from_profile(strip, metadata.icc)), plain, ()
    except Exception:  # the library has its own kinds
        return pixels, plain, ("its colour profile is damaged: read as sRGB",)


def fitting(metadata: Metadata, channels: int) -> tuple[Metadata, tuple[str, ...]]:
    """Without an ICC profile that describes pixels of another kind, and a note of it."""
    kind, counts = KINDS.get(metadata.icc[16:20], ("another kind of colours", ()))
    if metadata.icc[36:40] != SIGNATURE or channels in counts or channels > 4:
        return metadata, ()
    image = "grey" if channels < 3 else "RGB"
    return replace(metadata, icc=b""), (f"its colour profile is for {kind} and the image is {image}: left out",)


def by_strips(pixels: Pixels, convert: Callable[[Pixels], Pixels]) -> Pixels:
    """`convert` of the colours, strip by strip so that little memory is needed; transparency as it is."""
    colours = pixels.shape[2] - (pixels.shape[2] in (2, 4))
    converted = pixels.copy()
    for top, bottom in strips(*pixels.shape[:2]):
        converted[top:bottom, :, :colours] = convert(np.ascontiguousarray(pixels[top:bottom, :, :colours]))
    return converted


def to_full_range(colours: Pixels) -> Pixels:
    """Values of 16 to 235 of 255, as video has them, stretched to all; more bits likewise (H.273, equation 20)."""
    top = white(colours)
    unit = 1 / 255 if colours.dtype.kind == "f" else (top + 1) / 256
    stretched = (colours.astype(np.float32) - 16 * unit) / (219 * unit)
    return rounded(np.clip(stretched, 0, 1) * top, colours.dtype)


# ICC profiles ---------------------------------------------------------------------------------------------------------


@cache
def srgb_profile() -> bytes:
    return bytes(imagecodecs.cms_profile("srgb"))


def from_profile(colours: Pixels, icc: bytes) -> Pixels:
    """Grey (H, W, 1), RGB (H, W, 3) or CMYK (H, W, 4) -> sRGB of the same type; grey stays grey."""
    space = {1: "gray", 3: "rgb", 4: "cmyk"}[colours.shape[2]]
    given = colours[:, :, 0] if space == "gray" else colours
    flags = None if given.dtype == np.uint8 and space != "gray" else EXACT
    converted = imagecodecs.cms_transform(
        given, icc, srgb_profile(), colorspace=space, outcolorspace="rgb", flags=flags
    )
    converted = np.clip(converted, 0, 1) if given.dtype.kind == "f" else converted
    return converted[:, :, 1:2] if space == "gray" else converted


@lru_cache(maxsize=64)
def profile_of(*, gamma: float | None, points: tuple[float, ...] | None, grey: bool) -> bytes:
    """An ICC profile of what a PNG's gAMA and cHRM say; empty where that is sRGB, or cannot be.

    Args:
        gamma: light ** gamma is the signal; sRGB's unless given, and if it is within 5 % of 1 / 2.2.
        points: x and y of white, red, green and blue; sRGB's unless given.
    """
    like_srgb = not gamma or abs(2.2 * gamma - 1) < 0.05
    white, primaries = (points[:2], points[2:]) if points else (D65, PRIMARIES[1][:6])
    if like_srgb and (grey or np.allclose((*primaries, *white), PRIMARIES[1], atol=0.005)):
        return b""
    space, colours = ("gray", None) if grey else ("rgb", [v for i in (0, 2, 4) for v in (*primaries[i : i + 2], 1.0)])
    try:
        return bytes(
            imagecodecs.cms_profile(space, whitepoint=[*white, 1.0], primaries=colours, gamma=1 / (gamma or 1 / 2.2))
        )
    except imagecodecs.CmsError:  # no such colours
        return b""


@lru_cache(maxsize=64)
def is_srgb_profile(icc: bytes) -> bool:
    """Whether pixels of 8 bits would stay as they are, to one level."""
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    if icc[16:20] == b"GRAY":
        colours = levels[:, None, None]
    elif icc[16:20] == b"RGB ":
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    else:
        return False
    try:
        return bool(np.abs(from_profile(colours, icc).astype(int) - colours).max() <= 1)
    except Exception:  # the library has its own kinds
        return False


def from_inks(inks: Pixels, icc: bytes) -> Pixels:
    """CMYK (H, W, 4), in which 0 is no ink -> sRGB (H, W, 3) of the same type, by the profile if it is one for inks."""
    if icc[16:20] == b"CMYK":
        try:
            return from_profile(inks, icc)
        except Exception:  # a profile that cannot be used
            pass
    top = white(inks)
    light = 1 - inks.astype(np.float32) / top
    return rounded(light[:, :, :3] * light[:, :, 3:] * top, inks.dtype)


# Code points of H.273 -------------------------------------------------------------------------------------------------


def pq(signal: np.ndarray) -> np.ndarray:
    """Signal in [0, 1] -> light, 1 at the reference white (ITU-R BT.2100, table 4: the EOTF)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = signal ** (1 / m2)
    return (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1) * (10000 / REFERENCE_WHITE)


def hlg(signal: np.ndarray) -> np.ndarray:
    """Signal in [0, 1] -> scene light in [0, 1] (ITU-R BT.2100, table 5: the inverse OETF)."""
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def displayed(scene: np.ndarray) -> np.ndarray:
    """BT.2020 scene light (..., 3) -> that of an HLG display of 1,000 cd/m2, 1 at the reference white (the OOTF)."""
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593])
    return scene * luminance[..., None] ** 0.2 * (1000 / REFERENCE_WHITE)


def srgb_to_linear(signal: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(light: np.ndarray) -> np.ndarray:
    """Light, clipped to [0, 1] -> signal in [0, 1]."""
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


LINEAR_OF: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    4: lambda signal: signal**2.2,
    5: lambda signal: signal**2.8,
    8: lambda signal: signal,
    16: pq,
    17: lambda signal: signal**2.6 * (52.37 / 48),
    18: hlg,
}
"""By transfer: signal in [0, 1] -> light, 1 at white (H.273, table 3)."""


def is_srgb_cicp(cicp: Cicp) -> bool:
    return cicp[0] in (1, 2) and cicp[1] in LIKE_SRGB


def from_cicp(colours: Pixels, primaries: int, transfer: int, clipped: list[bool]) -> Pixels:
    """RGB (H, W, 3) -> sRGB of the same type. `clipped` gets whether anything was brighter than white."""
    top = white(colours)
    linear_of = LINEAR_OF.get(transfer, srgb_to_linear)
    if colours.dtype.kind == "u":
        light = linear_of(np.arange(top + 1) / top).astype(np.float32)[colours]
    else:
        light = linear_of(colours)
    if transfer == 18:
        light = displayed(light)
    light = light @ to_bt709(primaries).T
    clipped.append(bool(light.max() > 1.01) and transfer in (16, 18))
    return rounded(linear_to_srgb(light) * top, colours.dtype)


@cache
def to_bt709(primaries: int) -> np.ndarray:
    """The matrix (3, 3) from linear RGB of these primaries to that of sRGB; white becomes white."""
    known = PRIMARIES.get(primaries, PRIMARIES[1])
    return np.linalg.inv(to_xyz(PRIMARIES[1])) @ adaptation(known[6:], D65) @ to_xyz(known)


def to_xyz(chromaticities: tuple[float, ...]) -> np.ndarray:
    """The matrix from linear RGB of these primaries and white to CIE XYZ (SMPTE RP 177)."""
    columns = np.stack([xyz(chromaticities[i : i + 2]) for i in (0, 2, 4)], axis=1)
    return columns * np.linalg.solve(columns, xyz(chromaticities[6:]))


def xyz(xy: tuple[float, ...]) -> np.ndarray:
    x, y = xy
    return np.array([x / y, 1, (1 - x - y) / y])


def adaptation(source: tuple[float, ...], target: tuple[float, ...]) -> np.ndarray:
    """The matrix on XYZ that makes one white the other (Bradford, as ICC.1 has it)."""
    scale = (BRADFORD @ xyz(target)) / (BRADFORD @ xyz(source))
    return np.linalg.inv(BRADFORD) @ np.diag(scale) @ BRADFORD


# CIELAB ---------------------------------------------------------------------------------------------------------------


def from_lab(lab: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (..., 3) of white D50 -> sRGB in [0, 1] (CIE 15)."""
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], axis=-1)
    relative = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    to_linear = np.linalg.inv(to_xyz(PRIMARIES[1])) @ adaptation(D50, D65)
    return linear_to_srgb((relative * xyz(D50)) @ to_linear.T)
