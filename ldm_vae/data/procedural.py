"""Images computed on the fly, without end, download or licence: dead leaves and labelled shapes."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from ldm_vae.data.images import Pixels, Sample, convert_channels
from ldm_vae.data.order import Stream, generator_at, mix
from ldm_vae.errors import DataError

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "crescent", "stripes")
LENGTH = 2**40
"""Procedural sources have no end; this is far enough for any training."""

SUPERSAMPLING = 2
PROCEDURAL = ("dead-leaves", "shapes")


class ProceduralSource:
    """Image i is a pure function of (name, seed, size, i)."""

    def __init__(self, name: str, *, seed: int, size: int, channels: int) -> None:
        if channels not in (1, 3, 4):
            raise DataError(f"procedural images have 1, 3 or 4 channels, not {channels}")
        self.kind, self.seed, self.size, self.channels = name, seed, size, channels
        self.classes: tuple[str, ...] = SHAPES if name == "shapes" else ()

    def __len__(self) -> int:
        return LENGTH

    def name(self, index: int) -> str:
        return f"{self.kind}-{self.seed}-{index:012d}"

    def fingerprint(self) -> str:
        return f"procedural:{self.kind}@{self.seed}, {self.size} pixels, {self.channels} channels"

    def __getitem__(self, index: int) -> Sample:
        rng = generator_at(mix(self.seed), index, Stream.PROCEDURAL)
        label = index % len(SHAPES) if self.kind == "shapes" else None
        pixels = dead_leaves(rng, self.size) if label is None else shape(rng, self.size, label)
        return Sample(pixels=convert_channels(pixels, self.channels), label=label, name=self.name(index))


def natural_colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 3) of [0, 1]: a few muted hues an image, a wide spread of brightness."""
    palette = rng.normal(rng.choice([0.08, 0.28, 0.58], 4, p=[0.5, 0.2, 0.3]), 0.05)  # earth, leaves, sky
    hues = rng.normal(rng.choice(palette, count), 0.03)
    saturation, value = rng.beta(1.5, 3.5, count), rng.beta(1.5, 1.5, count)
    waves = np.cos(2 * np.pi * (hues[:, None] + np.array([0, -1 / 3, 1 / 3])))
    return value[:, None] * (1 - saturation[:, None] * (0.5 - 0.5 * waves))


def one_over_f(rng: np.random.Generator, side: int) -> np.ndarray:
    """(side, side) noise with amplitude 1/frequency, periodic, of unit deviation."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    spectrum = rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)
    field = np.fft.irfft2(spectrum / frequency, s=(side, side))
    return field / field.std()


def dead_leaves(rng: np.random.Generator, size: int) -> Pixels:
    """An image of the dead-leaves model: uint8 (size, size, 3).

    Occluding discs and polygons whose radii have density r^-3 (Lee, Mumford & Huang 2001, "Occlusion Models for
    Natural Images"), each with its own colour, shading, stripes and share of a 1/f texture.
    """
    side = size * SUPERSAMPLING
    smallest, largest = 4 * SUPERSAMPLING, side * 0.6
    mean_area = math.pi * 2 * math.log(largest / smallest) / (smallest**-2 - largest**-2)
    count = 2 + int(8.0 * side**2 / mean_area)  # eight times the area: hardly a pixel stays uncovered
    radius = (smallest**-2 - rng.random(count) * (smallest**-2 - largest**-2)) ** -0.5
    radius[0] = side  # what lies behind all leaves
    centre = rng.uniform(-0.1 * side, 1.1 * side, (count, 2))
    corners = rng.integers(3, 8, count) * (rng.random(count) < 0.5)  # 0: a disc
    squash = rng.uniform(0.5, 1, count)
    turn = rng.uniform(0, 2 * np.pi, count)
    leaves = Image.new("I", (side, side), 0)
    draw = ImageDraw.Draw(leaves)
    for leaf, ((x, y), r, n, s, a) in enumerate(
        zip(centre.tolist(), radius.tolist(), corners.tolist(), squash.tolist(), turn.tolist(), strict=True)
    ):
        if n:
            angles = [a + 2 * math.pi * k / n for k in range(n)]
            draw.polygon([(x + r * math.cos(t), y + r * s * math.sin(t)) for t in angles], fill=leaf)
        else:
            draw.ellipse((x - r, y - r * s, x + r, y + r * s), fill=leaf)
    ids = np.asarray(leaves)  # (side, side): which leaf is seen
    stripes = 0.25 * rng.random(count) * (rng.random(count) < 0.25)
    pitch = 2 * np.pi / np.maximum(radius * rng.uniform(0.1, 0.6, count), 4)
    shade = rng.normal(0, 0.2, (count, 2)) / radius[:, None]
    rough = 0.12 * rng.exponential(1, count)
    table = np.column_stack(
        [centre * shade @ [1, 1], shade, pitch * np.cos(turn), pitch * np.sin(turn), stripes, rough]
    ).astype(np.float32)
    offset, gx, gy, fx, fy, amplitude, roughness = np.moveaxis(table[ids], 2, 0)  # each (side, side)
    y, x = np.mgrid[:side, :side].astype(np.float32)
    noise = one_over_f(rng, side).astype(np.float32)
    texture = gx * x + gy * y - offset + amplitude * np.sin(fx * x + fy * y) + roughness * noise
    colour = natural_colours(rng, count).astype(np.float32)[ids]  # (side, side, 3)
    light = 1 + 0.15 * rng.standard_normal() * (x / side - 0.5) + 0.15 * rng.standard_normal() * (y / side - 0.5)
    return shrink(colour * ((1 + texture) * light)[:, :, None])


def shape(rng: np.random.Generator, size: int, label: int) -> Pixels:
    """One filled shape of class `SHAPES[label]` on a shaded background: uint8 (size, size, 3)."""
    side = size * SUPERSAMPLING
    r = side * rng.uniform(0.2, 0.36)
    centre = side / 2 + rng.uniform(-0.12, 0.12, 2) * side
    turn = rng.uniform(0, 2 * np.pi)
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)

    def at(radius: float, angle: float) -> tuple[float, float]:
        return centre[0] + radius * math.cos(turn + angle), centre[1] + radius * math.sin(turn + angle)

    def bar(half_width: float, across: float = 0.0, angle: float = 0.0) -> list[tuple[float, float]]:
        corners = [(r, across - half_width), (r, across + half_width), (-r, across + half_width)]
        corners.append((-r, across - half_width))
        return [at(math.hypot(u, v), math.atan2(v, u) + angle) for u, v in corners]

    polygons = {
        "square": [[at(r, k * np.pi / 2) for k in range(4)]],
        "triangle": [[at(r, k * 2 * np.pi / 3) for k in range(3)]],
        "star": [[at(r if k % 2 == 0 else 0.4 * r, k * np.pi / 5) for k in range(10)]],
        "cross": [bar(0.25 * r), bar(0.25 * r, angle=np.pi / 2)],
        "stripes": [bar(0.2 * r, across * r) for across in (-0.75, 0.0, 0.75)],
    }
    discs = {  # radius, distance from the centre, and whether it is filled or cut out
        "circle": [(r, 0.0, 255)],
        "ring": [(r, 0.0, 255), (0.55 * r, 0.0, 0)],
        "crescent": [(r, 0.0, 255), (0.8 * r, 0.5 * r, 0)],
    }
    for corners in polygons.get(SHAPES[label], []):
        draw.polygon(corners, fill=255)
    for radius, distance, fill in discs.get(SHAPES[label], []):
        x, y = at(distance, 0.0)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    inside = np.asarray(mask)[:, :, None] / 255
    front, back = natural_colours(rng, 1), natural_colours(rng, 1)
    if abs(front.mean() - back.mean()) < 0.25:  # keep the shape visible
        back = front + 0.5 if front.mean() < 0.5 else front - 0.5
    y, x = np.mgrid[:side, :side] / side - 0.5
    slope = rng.normal(0, 0.25, 2)
    shading = 1 + (slope[0] * x + slope[1] * y)[:, :, None]
    return shrink((inside * front + (1 - inside) * back) * shading)


def shrink(values: np.ndarray) -> Pixels:
    """The mean of each SUPERSAMPLING x SUPERSAMPLING cell of values in [0, 1], clipped -> uint8."""
    side = values.shape[0] // SUPERSAMPLING
    cells = np.clip(values, 0, 1).reshape(side, SUPERSAMPLING, side, SUPERSAMPLING, 3).mean(axis=(1, 3))
    return np.rint(cells * 255).astype(np.uint8)
