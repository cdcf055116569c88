"""The loops over symbols, compiled by numba: what a symbol's neighbours say of it, and rANS.

docs/file-format.md specifies them, in integers only; `rate_slopes`, which serves encoders, has floats. Whatever is
compiled is in this file, with the constants that it uses: numba's cache on disk notices a change in a function's own
file alone. Nothing here imports torch.

rANS is Duda 2014 ("Asymmetric numeral systems", arXiv:1311.2540, section 3) with one 32-bit state and 16-bit words.
The trees are meta-adaptive ones, as in FLIF (Sneyers & Wuille 2016) and JPEG XL's modular mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

Integers = np.ndarray[Any, Any]

PRECISION = 14
TOTAL = 1 << PRECISION
"""A table's frequencies have this sum."""
LOW = 1 << 16
"""The least state, and the one that a coder starts from."""
BORDER = 2
"""Zeros around each channel: how far a tap may reach within a row or a column."""
MAGNITUDE = (1 << 15) - 1
"""Neighbours and errors are clipped to this either way: no sum overflows, whatever the symbols are."""
WEIGHT_BITS = 12
ACTIVITY_SHIFT = 4
NUM_FEATURES = 10
"""What a tree may ask for: see `context`."""
DIRECT = 32
"""Tokens below stand for one value each; each other for a range, and the place in it follows in plain bits."""
MAX_TOKENS = 52
LN2 = 0.6931471805599453


def compiled(function: Callable[..., Any]) -> Any:
    """By numba at its first call, and then without the interpreter's lock; kept on disk where a folder is writable."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba finds no folder for its cache
        return njit(nogil=True)(function)


@compiled
def own_taps(taps: Integers, weights: Integers) -> tuple[int, int]:
    """The weights of the two taps in a symbol's own row, W and WW, from those (K,) of its channel."""
    west, west2 = 0, 0
    for k in range(len(taps)):
        if taps[k, 0] == 0 and taps[k, 1] == 0:
            if taps[k, 2] == -1:
                west += weights[k]
            elif taps[k, 2] == -2:
                west2 += weights[k]
    return west, west2


@compiled
def add_taps(
    near: Integers, c: int, y: int, taps: Integers, weights: Integers, mean: Integers, activity: Integers
) -> None:
    """Sums (w,) for a row of channel c over the taps that are decoded before that row begins."""
    width = len(mean)
    mean[:] = 0
    activity[:] = 0
    for k in range(taps.shape[1]):
        dc, dy, dx = taps[c, k]
        a, b = np.int64(weights[0, c, k]), np.int64(weights[1, c, k])
        if (dc < 0 or dy < 0) and (a != 0 or b != 0):
            row = near[c + dc, BORDER + y + dy, BORDER + dx : BORDER + dx + width]
            for x in range(width):
                mean[x] += a * row[x]
                activity[x] += b * abs(row[x])


@compiled
def context(
    features: Integers,
    near: Integers,
    errors: Integers,
    place: tuple[int, int],
    sums: tuple[int, int],
    own: tuple[tuple[int, int], tuple[int, int]],
) -> tuple[int, int]:
    """The prediction of a symbol, and the sign of what it is off; fills the features, for which trees ask.

    `near` are the symbols of its channel and `errors` their distances from the predictions, both with borders.
    """
    y, x = place
    y2, x2 = y + BORDER, x + BORDER
    west, west2 = near[y2, x2 - 1], near[y2, x2 - 2]
    mean = sums[0] + own[0][0] * west + own[0][1] * west2
    activity = sums[1] + own[1][0] * abs(west) + own[1][1] * abs(west2)
    prediction = (mean + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS
    off = mean - (prediction << WEIGHT_BITS)
    sign = -1 if off < 0 else 1
    north, northwest = near[y2 - 1, x2], near[y2 - 1, x2 - 1]
    error_west, error_north = errors[y2, x2 - 1], errors[y2 - 1, x2]
    diagonal = abs(errors[y2 - 1, x2 - 1]) + abs(errors[y2 - 1, x2 + 1])
    farther = abs(errors[y2, x2 - 2]) + abs(errors[y2 - 2, x2])
    features[0] = activity >> ACTIVITY_SHIFT
    features[1] = abs(off)
    features[2] = abs(error_west) + abs(error_north) + diagonal + farther
    features[3] = abs(prediction)
    features[4] = sign * (north - northwest)
    features[5] = sign * (west - northwest)
    features[6] = sign * error_north
    features[7] = sign * error_west
    features[8] = y
    features[9] = x
    return prediction, sign


@compiled
def table_of(features: Integers, nodes: Integers, node: int) -> int:
    """From a tree's root to a leaf. A node is (feature, threshold, the node if above it) or (-1, table, 0)."""
    while nodes[node, 0] >= 0:
        node = node + 1 if features[nodes[node, 0]] <= nodes[node, 1] else nodes[node, 2]
    return nodes[node, 1]


@compiled
def clipped(value: int) -> int:
    return min(max(value, -MAGNITUDE), MAGNITUDE)


@compiled
def tokenise(rest: int) -> tuple[int, int, int]:
    """A rest -> its token, the number of plain bits that follow, and those; MAX_TOKENS for one without a token."""
    value = 2 * rest if rest >= 0 else -2 * rest - 1
    if value < DIRECT:
        return value, 0, 0
    bits = 4
    while value >> bits > 3 and bits < 14:
        bits += 1
    if bits > 13:
        return MAX_TOKENS, 0, 0
    return DIRECT + 2 * (bits - 4) + (value >> bits) - 2, bits, value & ((1 << bits) - 1)


@compiled
def measure(
    symbols: Integers,
    near: Integers,
    c: int,
    taps: Integers,
    weights: Integers,
    kept: Integers,
    features: Integers,
    tokens: Integers,
) -> None:
    """What channel c's tree is grown from, of the symbols that are `kept` (h, w): n of them.

    Fills features (n + 1, NUM_FEATURES), whose last row means nothing, and tokens (n,).
    """
    _, height, width = symbols.shape
    mean, activity = np.empty(width, np.int64), np.empty(width, np.int64)
    errors = np.zeros((height + 2 * BORDER, width + 2 * BORDER), np.int32)
    own = own_taps(taps[c], weights[0, c]), own_taps(taps[c], weights[1, c])
    i = 0
    for y in range(height):
        add_taps(near, c, y, taps, weights, mean, activity)
        for x in range(width):
            prediction, sign = context(features[i], near[c], errors, (y, x), (mean[x], activity[x]), own)
            error = symbols[c, y, x] - prediction
            errors[y + BORDER, x + BORDER] = clipped(error)
            if kept[y, x]:
                tokens[i] = tokenise(sign * error)[0]
                i += 1


@compiled
def encode(
    symbols: Integers,
    near: Integers,
    taps: Integers,
    weights: Integers,
    roots: Integers,
    nodes: Integers,
    starts: Integers,
    slots: Integers,
) -> int:
    """What rANS is to code of symbols (C, h, w): start and frequency, in 16 bits each, in the order of decoding.

    `starts` (T, S + 1) are the tables' cumulated frequencies. Writes into `slots`, and says how many.
    """
    channels, height, width = symbols.shape
    escape = starts.shape[1] - 2
    mean, activity = np.empty(width, np.int64), np.empty(width, np.int64)
    features = np.empty(NUM_FEATURES, np.int32)
    count = 0
    for c in range(channels):
        errors = np.zeros((height + 2 * BORDER, width + 2 * BORDER), np.int32)
        own = own_taps(taps[c], weights[0, c]), own_taps(taps[c], weights[1, c])
        for y in range(height):
            add_taps(near, c, y, taps, weights, mean, activity)
            for x in range(width):
                prediction, sign = context(features, near[c], errors, (y, x), (mean[x], activity[x]), own)
                error = symbols[c, y, x] - prediction
                errors[y + BORDER, x + BORDER] = clipped(error)
                table = starts[table_of(features, nodes, roots[c])]
                token, bits, rest = tokenise(sign * error)
                if token >= escape or table[token] == table[token + 1]:
                    slots[count] = table[escape] << 16 | (TOTAL - table[escape])
                    for i in range(4):
                        byte = np.int64(symbols[c, y, x]) >> 8 * i & 255
                        slots[count + 1 + i] = byte << (PRECISION + 8) | TOTAL >> 8
                    count += 5
                    continue
                slots[count] = table[token] << 16 | (table[token + 1] - table[token])
                count += 1
                if bits:
                    slots[count] = rest << (PRECISION - bits + 16) | TOTAL >> bits
                    count += 1
    return count


@compiled
def nats_of(nats: Integers, rest: int) -> float:
    """What a rest costs by a table's `nats` (S,), of which the last is the escape's."""
    token, bits, _ = tokenise(rest)
    return nats[token] + bits * LN2 if token < len(nats) - 1 else nats[-1]


@compiled
def rate_slopes(
    values: Integers,
    symbols: Integers,
    near: Integers,
    taps: Integers,
    weights: Integers,
    roots: Integers,
    nodes: Integers,
    nats: Integers,
    slopes: Integers,
) -> None:
    """Fills slopes (C, h, w): nats that each value costs more, the larger it is; in the contexts of the symbols.

    Between the differences to the symbols below and above, by where the value lies around its own.
    """
    channels, height, width = symbols.shape
    mean, activity = np.empty(width, np.int64), np.empty(width, np.int64)
    features = np.empty(NUM_FEATURES, np.int32)
    for c in range(channels):
        errors = np.zeros((height + 2 * BORDER, width + 2 * BORDER), np.int32)
        own = own_taps(taps[c], weights[0, c]), own_taps(taps[c], weights[1, c])
        for y in range(height):
            add_taps(near, c, y, taps, weights, mean, activity)
            for x in range(width):
                prediction, sign = context(features, near[c], errors, (y, x), (mean[x], activity[x]), own)
                error = symbols[c, y, x] - prediction
                errors[y + BORDER, x + BORDER] = clipped(error)
                table = nats[table_of(features, nodes, roots[c])]
                here = nats_of(table, sign * error)
                below, above = nats_of(table, sign * (error - 1)), nats_of(table, sign * (error + 1))
                share = values[c, y, x] - symbols[c, y, x] + 0.5
                slopes[c, y, x] = (here - below) * (1 - share) + (above - here) * share


@compiled
def push(slots: Integers, words: Integers) -> tuple[int, int]:
    """rANS: starts and frequencies -> the last state, and where in the buffer `words` the words begin."""
    state: Any = LOW
    begin = len(words)
    for i in range(len(slots) - 1, -1, -1):  # a decoder undoes the last step first
        start, frequency = np.int64(slots[i] >> 16), np.int64(slots[i] & 0xFFFF)
        if state >= frequency << (32 - PRECISION):
            begin -= 1
            words[begin] = state & 0xFFFF
            state >>= 16
        state = (state // frequency << PRECISION) + state % frequency + start
    return state, begin


@compiled
def pull(state: int, start: int, frequency: int, words: Integers, position: int) -> tuple[int, int]:
    """State and position after what lies at `start` was decoded; a position of -1 once the words have run out."""
    state = frequency * (state >> PRECISION) + (state & (TOTAL - 1)) - start
    if state < LOW and position >= 0:
        if position == len(words):
            return state, -1
        return state << 16 | words[position], position + 1
    return state, position


@compiled
def pull_bits(state: int, bits: int, words: Integers, position: int) -> tuple[int, int, int]:
    """Plain bits, and the state and position after them."""
    value = (state & (TOTAL - 1)) >> (PRECISION - bits)
    state, position = pull(state, value << (PRECISION - bits), TOTAL >> bits, words, position)
    return value, state, position


@compiled
def decode(
    symbols: Integers,
    near: Integers,
    taps: Integers,
    weights: Integers,
    roots: Integers,
    nodes: Integers,
    starts: Integers,
    state: int,
    words: Integers,
) -> tuple[int, int]:
    """Undoes `encode` and `push`: fills symbols and `near`. Last state and position, -1 where the words run out."""
    channels, height, width = symbols.shape
    escape = starts.shape[1] - 2
    mean, activity = np.empty(width, np.int64), np.empty(width, np.int64)
    features = np.empty(NUM_FEATURES, np.int32)
    position = 0
    for c in range(channels):
        errors = np.zeros((height + 2 * BORDER, width + 2 * BORDER), np.int32)
        own = own_taps(taps[c], weights[0, c]), own_taps(taps[c], weights[1, c])
        for y in range(height):
            add_taps(near, c, y, taps, weights, mean, activity)
            for x in range(width):
                prediction, sign = context(features, near[c], errors, (y, x), (mean[x], activity[x]), own)
                table = starts[table_of(features, nodes, roots[c])]
                token, slot = 0, state & (TOTAL - 1)
                while table[token + 1] <= slot:
                    token += 1
                state, position = pull(state, table[token], table[token + 1] - table[token], words, position)
                if token == escape:
                    symbol = np.int64(0)
                    for i in range(4):
                        byte, state, position = pull_bits(state, 8, words, position)
                        symbol |= byte << 8 * i
                    symbol -= (symbol >> 31) << 32
                else:
                    value = np.int64(token)
                    if token >= DIRECT:
                        bits = 4 + (token - DIRECT) // 2
                        rest, state, position = pull_bits(state, bits, words, position)
                        value = ((2 + (token & 1)) << bits) + rest
                    symbol = prediction + sign * (-((value + 1) >> 1) if value & 1 else value >> 1)
                if position < 0:
                    return state, position
                symbols[c, y, x] = symbol
                near[c, y + BORDER, x + BORDER] = clipped(symbol)
                errors[y + BORDER, x + BORDER] = clipped(symbol - prediction)
    return state, position
