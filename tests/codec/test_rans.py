from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
import pytest

from ldm_vae.codec import loops
from ldm_vae.codec.contexts import check_frequencies, push
from ldm_vae.codec.loops import TOTAL


def random_tables(rng: np.random.Generator, tables: int, alphabet: int) -> np.ndarray:
    """Frequencies of every kind: even, steep, and with zeros."""
    shares = rng.dirichlet(np.full(alphabet, 0.2), size=tables)
    frequencies = np.floor(shares * (TOTAL - alphabet)).astype(np.int64)
    frequencies[:, -1] += TOTAL - frequencies.sum(axis=1)
    return frequencies


def draw(rng: np.random.Generator, frequencies: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """A token of each table, with its probability."""
    slots = rng.integers(TOTAL, size=len(tables))
    return (np.cumsum(frequencies, axis=1)[tables] <= slots[:, None]).sum(axis=1)


def coded(tokens: np.ndarray, tables: np.ndarray, frequencies: np.ndarray) -> bytes:
    starts = np.cumsum(frequencies, axis=1) - frequencies
    return push((starts[tables, tokens] << 16 | frequencies[tables, tokens]).astype(np.uint32))


def decode_as_specified(payload: bytes, tables: np.ndarray, frequencies: np.ndarray) -> list[int]:
    """Word by word what docs/file-format.md says under "Entropy coding", in Python's integers."""
    (x,) = struct.unpack_from("<I", payload)
    words = iter(struct.unpack_from(f"<{(len(payload) - 4) // 2}H", payload, 4))
    found = []
    for table in tables.tolist():
        f = frequencies[table].tolist()
        slot, start, i = x % 16384, 0, 0
        while not start <= slot < start + f[i]:
            start, i = start + f[i], i + 1
        x = f[i] * (x // 16384) + slot - start
        if x < 65536:
            x = 65536 * x + next(words)
        found.append(i)
    assert x == 65536
    assert next(words, None) is None
    return found


@pytest.mark.parametrize("alphabet", [1, 2, 17, 53])
def test_tokens_come_back_and_cost_what_their_probabilities_say(alphabet: int) -> None:
    rng = np.random.default_rng(alphabet)
    frequencies = random_tables(rng, 9, alphabet)
    tables = rng.integers(9, size=5000)
    tokens = draw(rng, frequencies, tables)
    payload = coded(tokens, tables, frequencies)
    assert decode_as_specified(payload, tables, frequencies) == tokens.tolist()
    ideal = -np.log2(frequencies[tables, tokens] / TOTAL).sum() / 8
    assert ideal <= len(payload) <= ideal * 1.0005 + 5


def test_the_rate_is_that_of_an_independent_coder() -> None:
    constriction = pytest.importorskip("constriction")
    rng = np.random.default_rng(1)
    frequencies = random_tables(rng, 1, 40)
    tables = np.zeros(50_000, np.int64)
    tokens = draw(rng, frequencies, tables)
    ours = len(coded(tokens, tables, frequencies))
    coder = constriction.stream.stack.AnsCoder()
    shares = np.maximum(frequencies[0], 1e-9) / TOTAL
    model = constriction.stream.model.Categorical(shares / shares.sum(), perfect=False)
    coder.encode_reverse(tokens.astype(np.int32), model)
    assert ours == pytest.approx(4 * len(coder.get_compressed()), rel=0.01)


def test_every_token_of_a_table_can_be_the_only_one_for_long() -> None:
    """The state grows and shrinks as far as it can."""
    frequencies = np.array([[1, TOTAL - 2, 1], [TOTAL, 0, 0]])
    for tokens in (np.zeros(5000, np.int64), np.ones(5000, np.int64), np.arange(5000) % 3):
        tables = np.zeros(5000, np.int64)
        assert decode_as_specified(coded(tokens, tables, frequencies), tables, frequencies) == tokens.tolist()
    certain = coded(np.zeros(10**4, np.int64), np.ones(10**4, np.int64), frequencies)
    assert len(certain) == 4  # what is certain costs nothing


@pytest.mark.parametrize("rest", [0, 1, -1, 15, -16, 16, -17, 300, -5000, 2**14 - 1, -(2**14)])
def test_tokens_and_plain_bits_say_a_rest_as_the_specification_has_it(rest: int) -> None:
    token, bits, plain = loops.tokenise(rest)
    value = token
    if token >= 32:
        assert bits == 4 + (token - 32) // 2
        value = (2 + token % 2) * 2**bits + plain
    assert token < 52
    assert rest == (value // 2 if value % 2 == 0 else -(value + 1) // 2)


@pytest.mark.parametrize("rest", [2**14, -(2**14) - 1, 2**31, -(2**32)])
def test_a_rest_beyond_the_tokens_has_none(rest: int) -> None:
    assert loops.tokenise(rest)[0] == 52


@pytest.mark.parametrize(
    "frequencies",
    [[[TOTAL - 1]], [[TOTAL + 1, -1]], [[TOTAL - 53] + [1] * 53], [TOTAL], [[TOTAL, 0]]],
)
def test_tables_that_cannot_be_are_refused(frequencies: list) -> None:
    with pytest.raises(ValueError, match="frequencies"):
        check_frequencies(np.array(frequencies))


def test_entropy_coding_needs_no_torch() -> None:
    code = (
        "import sys; import ldm_vae.codec.tiles, ldm_vae.codec.tables;"
        "sys.exit('torch' in sys.modules or 'scipy.linalg' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loops_are_compiled_where_no_folder_takes_numbas_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    def njit(*, nogil: bool, cache: bool = False):
        if cache:
            raise RuntimeError("no locator available")
        return lambda function: kept.append((function, nogil)) or function

    monkeypatch.setattr(loops, "njit", njit)
    assert loops.compiled(len) is len
    assert kept == [(len, True)]
