from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ldm_vae.codec import contexts as module
from ldm_vae.codec.contexts import Contexts, decode_symbols, encode_symbols, rests_of, wavefronts
from ldm_vae.codec.fit_contexts import fit_contexts
from ldm_vae.codec.rans import TOTAL
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


@pytest.mark.parametrize("lanes", [4, 16])
@pytest.mark.parametrize("name", list(adversarial()))
def test_any_int32_symbols_come_back(name: str, lanes: int, fitted: Contexts, static: Contexts) -> None:
    symbols = adversarial()[name].astype(np.int32)
    for contexts in (fitted, static):
        payload = encode_symbols(symbols, contexts, lanes=lanes)
        assert np.array_equal(decode_symbols(payload, symbols.shape, contexts, lanes=lanes), symbols)


def test_contexts_save_at_least_15_percent_on_symbols_with_structure(fitted: Contexts, static: Contexts) -> None:
    symbols = natural(np.random.default_rng(9), 64, 96)
    with_contexts, without = (len(encode_symbols(symbols, c, lanes=16)) for c in (fitted, static))
    assert with_contexts < 0.85 * without


def test_the_bytes_are_those_of_the_tables_probabilities(fitted: Contexts) -> None:
    symbols = natural(np.random.default_rng(9), 64, 96)
    rests, tables = rests_of(symbols, fitted)
    inside = np.abs(rests) <= fitted.reach
    coded = np.where(inside, rests + fitted.reach + 1, 0)
    frequency = fitted.frequencies.frequency[tables, coded]
    escaped = (frequency == 0) | ~inside
    frequency = np.where(escaped, fitted.frequencies.frequency[tables, 0], frequency)
    ideal = -np.log2(frequency / TOTAL).sum() / 8
    length = len(encode_symbols(symbols, fitted, lanes=16))
    assert ideal < length < ideal * 1.001 + 64 + 2 + 3 * escaped.sum()


def test_predictions_are_those_of_a_loop_over_symbols(fitted: Contexts) -> None:
    """An independent computation, symbol by symbol with Python's integers, as docs/file-format.md describes it."""
    symbols = natural(np.random.default_rng(3), 6, 7)
    rests, tables = rests_of(symbols, fitted)
    expected = []
    height, width = symbols.shape[1:]
    order = sorted((x + 2 * y + 4 * c, c, y, x) for c in range(CHANNELS) for y in range(height) for x in range(width))
    for _, c, y, x in order:
        mean = activity = 0
        for (dc, dy, dx), a, b in zip(
            fitted.taps[c].tolist(), fitted.mean_weights[c].tolist(), fitted.activity_weights[c].tolist(), strict=True
        ):
            inside = 0 <= y + dy < height and 0 <= x + dx < width
            value = int(symbols[c + dc, y + dy, x + dx]) if inside else 0
            value = max(-32767, min(32767, value))
            mean += a * value
            activity += b * abs(value)
        prediction = (mean + 2048) // 4096
        off = mean - 4096 * prediction
        phase = (abs(off) >= 512) + (abs(off) >= 1536)
        bin_ = sum(activity >= t for t in fitted.thresholds[c].tolist())
        table = (c * fitted.num_activities + bin_) * 3 + phase
        rest = (int(symbols[c, y, x]) - prediction) * (-1 if off < 0 else 1)
        expected.append((rest, table))
    assert list(zip(rests.tolist(), tables.tolist(), strict=True)) == expected


def test_wavefronts_hold_every_symbol_once() -> None:
    places, channels, groups = wavefronts(3, 5, 7)
    assert len(set(places.tolist())) == groups.sum() == 3 * 5 * 7
    assert groups.size == 7 - 1 + 2 * (5 - 1) + 4 * (3 - 1) + 1
    assert set(channels.tolist()) == {0, 1, 2}


def test_a_tap_that_is_not_decoded_yet_is_refused(fitted: Contexts) -> None:
    for tap in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (-1, 0, -1), (0, -3, 0)):
        taps = fitted.taps.copy()
        taps[0, 0] = tap  # channel 0 has none before it
        weights = np.ones_like(fitted.mean_weights)
        with pytest.raises(ValueError, match="tap"):
            Contexts(
                taps=taps,
                mean_weights=weights,
                activity_weights=weights,
                thresholds=fitted.thresholds,
                frequencies=fitted.frequencies,
            )


def test_damaged_payloads_are_found_or_decode_to_something_else(fitted: Contexts) -> None:
    """Without the CRC of the file around them: nothing but CorruptError, and no more work than the shape asks for."""
    symbols = natural(np.random.default_rng(4), 12, 12)
    symbols[1, 2, 3] = 10**9
    payload = encode_symbols(symbols, fitted, lanes=4)
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
            decoded = decode_symbols(bytes(damaged), symbols.shape, fitted, lanes=4)
            assert bytes(damaged) == payload or not np.array_equal(decoded, symbols)
        except CorruptError:
            found += 1
    assert found > 250  # the ends of words, escapes and states seldom meet by chance


def test_wrong_shapes_and_values_are_refused(fitted: Contexts) -> None:
    with pytest.raises(ValueError, match="shape"):
        encode_symbols(np.zeros((CHANNELS + 1, 2, 2), np.int32), fitted, lanes=4)
    with pytest.raises(ValueError, match="32 bits"):
        encode_symbols(np.full((CHANNELS, 2, 2), 2**31), fitted, lanes=4)
    assert module.MAGNITUDE < 2**15
