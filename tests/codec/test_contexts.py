from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ldm_vae.codec.contexts import Contexts, decode_symbols, encode_symbols, slots_of
from ldm_vae.codec.fit_contexts import fit_contexts
from ldm_vae.codec.loops import TOTAL
from ldm_vae.errors import CorruptError

CHANNELS = 5


def natural(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Symbols as an autoencoder makes them: a smooth channel, and others that are large where one is large."""
    activity = np.exp(3 * gaussian_filter(rng.normal(size=(height, width)), 3) / 0.1 * 0.3 - 1)
    values = rng.laplace(size=(CHANNELS, height, width)) * activity * np.linspace(1.5, 0.3, CHANNELS)[:, None, None]
    values[0] += 40 * gaussian_filter(rng.normal(size=(height, width)), 2)
    return np.rint(values).astype(np.int32)


@pytest.fixture(scope="module")
def fitted() -> Contexts:
    rng = np.random.default_rng(0)
    return fit_contexts([natural(rng, 30, 40) for _ in range(30)])


@pytest.fixture(scope="module")
def static() -> Contexts:
    rng = np.random.default_rng(0)
    return fit_contexts([natural(rng, 30, 40) for _ in range(30)], taps=False)


def adversarial() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    shape = (CHANNELS, 9, 13)
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    alternating = np.where(np.indices(shape).sum(axis=0) % 2, low, high)
    one = np.zeros(shape)
    one[2, 4, 6] = low
    return {
        "random": rng.integers(low, high, size=shape, endpoint=True),
        "small": rng.integers(-3, 4, size=shape),
        "zero": np.zeros(shape),
        "lowest": np.full(shape, low),
        "highest": np.full(shape, high),
        "alternating": alternating,
        "a single one": one,
        "powers of two": 2 ** rng.integers(0, 31, size=shape) * rng.choice([-1, 1], size=shape),
        "one column": rng.integers(-9, 9, size=(CHANNELS, 40, 1)),
        "one row": rng.integers(-9, 9, size=(CHANNELS, 1, 40)),
        "one place": rng.integers(-9, 9, size=(CHANNELS, 1, 1)),
    }


@pytest.mark.parametrize("name", list(adversarial()))
def test_any_int32_symbols_come_back(name: str, fitted: Contexts, static: Contexts) -> None:
    symbols = adversarial()[name].astype(np.int32)
    for contexts in (fitted, static):
        payload = encode_symbols(symbols, contexts)
        assert np.array_equal(decode_symbols(payload, symbols.shape, contexts), symbols)


def test_contexts_save_at_least_15_percent_on_symbols_with_structure(fitted: Contexts, static: Contexts) -> None:
    symbols = natural(np.random.default_rng(9), 64, 96)
    with_contexts, without = (len(encode_symbols(symbols, c)) for c in (fitted, static))
    assert with_contexts < 0.85 * without


def test_the_bytes_are_those_of_the_tables_probabilities(fitted: Contexts) -> None:
    symbols = natural(np.random.default_rng(9), 64, 96)
    ideal = -np.log2((slots_of(symbols, fitted) & 0xFFFF) / TOTAL).sum() / 8
    assert ideal < len(encode_symbols(symbols, fitted)) < ideal * 1.0005 + 5


class Reader:
    """rANS as docs/file-format.md has it, in Python's integers."""

    def __init__(self, payload: bytes) -> None:
        (self.x,) = struct.unpack_from("<I", payload)
        self.words = iter(struct.unpack_from(f"<{(len(payload) - 4) // 2}H", payload, 4))

    def advance(self, start: int, frequency: int) -> None:
        self.x = frequency * (self.x // 16384) + self.x % 16384 - start
        if self.x < 65536:
            self.x = 65536 * self.x + next(self.words)

    def index(self, frequencies: list[int]) -> int:
        i = start = 0
        while self.x % 16384 >= start + frequencies[i]:
            start, i = start + frequencies[i], i + 1
        self.advance(start, frequencies[i])
        return i

    def bits(self, n: int) -> int:
        value = self.x % 16384 // 2 ** (14 - n)
        self.advance(value * 2 ** (14 - n), 2 ** (14 - n))
        return value


def features_of(
    value: Callable[[int, int, int], int], error: Callable[[int, int], int], contexts: Contexts, c: int, y: int, x: int
) -> tuple[list[int], int, int]:
    """Features, prediction and sign: the section "A symbol" of docs/file-format.md."""
    mean = activity = 0
    weights = contexts.weights[:, c].T.tolist()
    for (dc, dy, dx), (a, b) in zip(contexts.taps[c].tolist(), weights, strict=True):
        if a or b:
            mean += a * value(dc, dy, dx)
            activity += b * abs(value(dc, dy, dx))
    prediction = (mean + 2048) // 4096
    off = mean - 4096 * prediction
    sign = -1 if off < 0 else 1
    around = [error(*at) for at in ((0, -1), (-1, 0), (-1, -1), (-1, 1), (0, -2), (-2, 0))]
    features = [activity // 16, abs(off), sum(map(abs, around)), abs(prediction)]
    features += [sign * (value(0, -1, 0) - value(0, -1, -1)), sign * (value(0, 0, -1) - value(0, -1, -1))]
    return [*features, sign * error(-1, 0), sign * error(0, -1), y, x], prediction, sign


def decode_as_specified(payload: bytes, shape: tuple[int, int, int], contexts: Contexts) -> np.ndarray:
    """A tile, symbol by symbol, as docs/file-format.md describes it."""
    reader, (_, height, width) = Reader(payload), shape
    symbols, errors = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for c, y, x in np.ndindex(shape):

        def inside(values: np.ndarray, dc: int, dy: int, dx: int) -> int:
            place = (c + dc, y + dy, x + dx)  # noqa: B023
            within = 0 <= place[1] < height and 0 <= place[2] < width
            return max(-32767, min(32767, int(values[place]))) if within else 0

        features, prediction, sign = features_of(
            lambda *at: inside(symbols, *at), lambda *at: inside(errors, 0, *at), contexts, c, y, x
        )
        feature, threshold, above = contexts.nodes[node := int(contexts.roots[c])].tolist()
        while feature >= 0:
            node = node + 1 if features[feature] <= threshold else above
            feature, threshold, above = contexts.nodes[node].tolist()
        frequencies = contexts.frequencies[threshold].tolist()
        i = reader.index(frequencies)
        if i == len(frequencies) - 1:
            symbol = sum(reader.bits(8) << 8 * k for k in range(4))
            symbol -= (symbol >= 2**31) * 2**32
        else:
            if i >= 32:
                n = 4 + (i - 32) // 2
                i = (2 + i % 2) * 2**n + reader.bits(n)
            symbol = prediction + sign * (i // 2 if i % 2 == 0 else -(i + 1) // 2)
        symbols[c, y, x], errors[c, y, x] = symbol, symbol - prediction
    assert reader.x == 65536
    assert next(reader.words, None) is None
    return symbols


@pytest.mark.parametrize("name", ["natural", "alternating", "powers of two", "one row", "one place"])
def test_a_decoder_written_from_the_specification_reads_the_same(name: str, fitted: Contexts) -> None:
    symbols = natural(np.random.default_rng(3), 11, 13) if name == "natural" else adversarial()[name].astype(np.int32)
    payload = encode_symbols(symbols, fitted)
    assert np.array_equal(decode_as_specified(payload, symbols.shape, fitted), symbols)


def test_a_tap_that_is_not_decoded_yet_is_refused(fitted: Contexts) -> None:
    for tap in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (-1, 0, -1), (0, -3, 0)):
        taps = fitted.taps.copy()
        taps[0, 0] = tap  # channel 0 has none before it
        weights = np.ones_like(fitted.weights)
        with pytest.raises(ValueError, match="tap"):
            dataclasses.replace(fitted, taps=taps, weights=weights)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([[10, 0, 2], [-1, 0, 0], [-1, 0, 0]], "feature"),
        ([[-2, 0, 2], [-1, 0, 0], [-1, 0, 0]], "feature"),
        ([[0, 0, 2], [0, 0, 1], [-1, 0, 0]], "leads back"),  # a cycle
        ([[0, 0, 0], [-1, 0, 0]], "leads back"),
        ([[0, 0, 3], [-1, 0, 0], [-1, 0, 0]], "node"),
        ([[-1, 10**6, 0]], "table"),
        ([[-1, -1, 0]], "table"),
        ([[0, 0, i + 2] for i in range(40)] + [[-1, 0, 0]] * 2, "deeper"),
    ],
)
def test_a_tree_that_cannot_be_walked_is_refused(nodes: list[list[int]], said: str, fitted: Contexts) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(fitted, nodes=np.array(nodes, np.int32), roots=np.zeros_like(fitted.roots))


def test_roots_and_weights_that_cannot_be_are_refused(fitted: Contexts) -> None:
    for roots in (fitted.roots - 1, fitted.roots + len(fitted.nodes), fitted.roots[:-1]):
        with pytest.raises(ValueError, match="tree"):
            dataclasses.replace(fitted, roots=roots)
    used = (fitted.weights != 0).any(axis=0)
    for weight in (-1, 32767):
        weights = np.where(used, weight, np.zeros_like(fitted.weights))
        with pytest.raises(ValueError, match="weights"):
            dataclasses.replace(fitted, weights=weights)


def test_damaged_payloads_are_found_or_decode_to_something_else(fitted: Contexts) -> None:
    """Without the CRC of the file around them: nothing but CorruptError, and no more work than the shape asks for."""
    symbols = natural(np.random.default_rng(4), 12, 12)
    symbols[1, 2, 3] = 10**9
    payload = encode_symbols(symbols, fitted)
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(300):
        damaged = bytearray(payload)
        match rng.integers(3):
            case 0:
                damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
            case 1:
                del damaged[int(rng.integers(len(damaged))) :]
            case 2:
                damaged[int(rng.integers(len(damaged))) :] = rng.bytes(int(rng.integers(40)))
        try:
            decoded = decode_symbols(bytes(damaged), symbols.shape, fitted)
            assert bytes(damaged) == payload or not np.array_equal(decoded, symbols)
        except CorruptError:
            found += 1
    assert found > 250  # the ends of words, escapes and states seldom meet by chance


def test_wrong_shapes_and_values_are_refused(fitted: Contexts) -> None:
    with pytest.raises(ValueError, match="shape"):
        encode_symbols(np.zeros((CHANNELS + 1, 2, 2), np.int32), fitted)
    with pytest.raises(ValueError, match="32 bits"):
        encode_symbols(np.full((CHANNELS, 2, 2), 2**31), fitted)
