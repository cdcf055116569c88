from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
import pytest

from ldm_vae.codec import rans
from ldm_vae.codec.bitstream import Header, pack
from ldm_vae.codec.codec import log2_lanes
from ldm_vae.errors import CorruptError


def random_tables(rng: np.random.Generator, tables: int, alphabet: int) -> np.ndarray:
    """Frequencies of every kind: even, steep, and with zeros."""
    shares = rng.dirichlet(np.full(alphabet, 0.2), size=tables)
    frequencies = np.floor(shares * (rans.TOTAL - alphabet)).astype(np.int64)
    frequencies[:, -1] += rans.TOTAL - frequencies.sum(axis=1)
    return frequencies


def draw(rng: np.random.Generator, frequencies: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """A symbol of each table, with its probability."""
    slots = rng.integers(rans.TOTAL, size=len(tables))
    return (np.cumsum(frequencies, axis=1)[tables] <= slots[:, None]).sum(axis=1)


def decode_all(payload: bytes, tables: np.ndarray, groups: np.ndarray, f: rans.Frequencies, lanes: int) -> np.ndarray:
    decoder = rans.RansDecoder(payload, lanes=lanes)
    parts = np.split(tables, np.cumsum(groups)[:-1])
    found = [decoder.decode(part, f) for part in parts]
    decoder.finish()
    return np.concatenate(found)


@pytest.mark.parametrize("lanes", [1, 3, 16, 64])
@pytest.mark.parametrize("alphabet", [1, 2, 17, 256])
def test_symbols_come_back_and_cost_what_their_probabilities_say(lanes: int, alphabet: int) -> None:
    rng = np.random.default_rng(alphabet)
    frequencies = random_tables(rng, 9, alphabet)
    f = rans.Frequencies(frequencies)
    groups = rng.integers(1, 200, size=60)
    tables = rng.integers(9, size=groups.sum())
    symbols = draw(rng, frequencies, tables)
    payload = rans.encode(symbols, tables, groups, f, lanes=lanes)
    assert np.array_equal(decode_all(payload, tables, groups, f, lanes), symbols)
    ideal = -np.log2(frequencies[tables, symbols] / rans.TOTAL).sum() / 8
    assert ideal <= len(payload) <= ideal * 1.0005 + 4 * lanes + 1


def decode_as_specified(
    payload: bytes, tables: np.ndarray, groups: np.ndarray, frequencies: np.ndarray, lanes: int
) -> list[int]:
    """Word by word what docs/file-format.md says under "Entropy coding", in Python's integers."""
    states = list(struct.unpack_from(f"<{lanes}I", payload))
    words = iter(struct.unpack_from(f"<{(len(payload) - 4 * lanes) // 2}H", payload, 4 * lanes))
    assert all(x >= 65536 for x in states)
    given, found = iter(tables.tolist()), []
    for size in groups.tolist():
        for begin in range(0, size, lanes):
            count = min(lanes, size - begin)
            for lane in range(count):
                f = frequencies[next(given)].tolist()
                slot, i = states[lane] % 4096, 0
                start = 0
                while not start <= slot < start + f[i]:
                    start, i = start + f[i], i + 1
                states[lane] = f[i] * (states[lane] // 4096) + slot - start
                found.append(i)
            for lane in range(count):
                if states[lane] < 65536:
                    states[lane] = 65536 * states[lane] + next(words)
    assert states == [65536] * lanes
    assert next(words, None) is None
    return found


@pytest.mark.parametrize("lanes", [1, 8, 32])
def test_a_decoder_written_from_the_specification_reads_the_same(lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    frequencies = random_tables(rng, 5, 30)
    groups = rng.integers(1, 100, size=30)
    tables = rng.integers(5, size=groups.sum())
    symbols = draw(rng, frequencies, tables)
    payload = rans.encode(symbols, tables, groups, rans.Frequencies(frequencies), lanes=lanes)
    assert decode_as_specified(payload, tables, groups, frequencies, lanes) == symbols.tolist()


@pytest.mark.parametrize(("channels", "rate"), [(8, 0.15), (64, 0.15), (64, 0.6)])
def test_a_kodak_image_costs_at_most_a_hundred_bytes_more_than_its_symbols(channels: int, rate: float) -> None:
    """768 x 512 pixels at stride 8: what the lanes cost, with the header and the table of contents."""
    rng = np.random.default_rng(0)
    count = channels * 64 * 96
    rare = rate * 768 * 512 / count / 12  # bits of a symbol; about 12 for one that is not 0
    frequencies = np.array([[rans.TOTAL - max(round(rare * rans.TOTAL), 1), max(round(rare * rans.TOTAL), 1)]])
    tables, groups = np.zeros(count, np.int64), np.full(count // 64, 64)
    symbols = draw(rng, frequencies, tables)
    payload = rans.encode(symbols, tables, groups, rans.Frequencies(frequencies), lanes=1 << log2_lanes(count))
    header = Header(
        **{"width": 768, "height": 512, "colours": 3, "depth": 8, "log2_stride": 3, "channels": channels},
        **{"log2_tile": 7, "log2_lanes": log2_lanes(count), "quality": 256, "tables": bytes(8), "weights": bytes(8)},
    )
    ideal = -np.log2(frequencies[tables, symbols] / rans.TOTAL).sum() / 8
    assert len(pack(header, {}, [b"\0" + payload])) - ideal <= 100


def test_the_rate_is_that_of_an_independent_coder() -> None:
    constriction = pytest.importorskip("constriction")
    rng = np.random.default_rng(1)
    frequencies = random_tables(rng, 1, 40)
    tables = np.zeros(50_000, np.int64)
    symbols = draw(rng, frequencies, tables)
    ours = len(rans.encode(symbols, tables, np.full(500, 100), rans.Frequencies(frequencies), lanes=16))
    coder = constriction.stream.stack.AnsCoder()
    shares = np.maximum(frequencies[0], 1e-9) / rans.TOTAL
    model = constriction.stream.model.Categorical(shares / shares.sum(), perfect=False)
    coder.encode_reverse(symbols.astype(np.int32), model)
    assert ours == pytest.approx(4 * len(coder.get_compressed()), rel=0.01)


def test_every_symbol_of_a_table_can_be_the_only_one_for_long() -> None:
    """The states grow and shrink as far as they can."""
    frequencies = np.array([[1, 4094, 1], [4096, 0, 0]])
    f = rans.Frequencies(frequencies)
    for symbols in (np.zeros(5000, np.int64), np.ones(5000, np.int64), np.arange(5000) % 3):
        tables = np.zeros(5000, np.int64)
        payload = rans.encode(symbols, tables, np.array([5000]), f, lanes=4)
        assert np.array_equal(decode_all(payload, tables, np.array([5000]), f, 4), symbols)
    certain = rans.encode(np.zeros(10**4, np.int64), np.ones(10**4, np.int64), np.array([10**4]), f, lanes=4)
    assert len(certain) == 16  # what is certain costs nothing


def test_a_symbol_without_frequency_is_refused() -> None:
    f = rans.Frequencies(np.array([[4096, 0]]))
    with pytest.raises(ValueError, match="frequency 0"):
        rans.encode(np.array([1]), np.array([0]), np.array([1]), f, lanes=1)


@pytest.mark.parametrize("frequencies", [[[4095]], [[4097, -1]], [[16] * 257], [4096]])
def test_tables_that_cannot_be_are_refused(frequencies: list) -> None:
    with pytest.raises(ValueError, match="frequencies"):
        rans.Frequencies(np.array(frequencies))


def test_damaged_words_are_found() -> None:
    rng = np.random.default_rng(2)
    frequencies = random_tables(rng, 4, 30)
    f = rans.Frequencies(frequencies)
    tables = rng.integers(4, size=3000)
    payload = rans.encode(draw(rng, frequencies, tables), tables, np.array([3000]), f, lanes=8)
    for damaged in (payload[:-2], payload + b"\0\0", payload[:-1], payload[:20], b"", bytes(len(payload))):
        with pytest.raises(CorruptError):
            decode_all(damaged, tables, np.array([3000]), f, 8)


def test_entropy_coding_needs_no_torch() -> None:
    code = (
        "import sys; import ldm_vae.codec.rans, ldm_vae.codec.bitstream, ldm_vae.codec.contexts, ldm_vae.codec.tables;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
