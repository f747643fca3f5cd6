"""Stateless shuffles: which row is the k-th of a pass, found without listing the others.

`scramble` is a keyed pseudo-random permutation of 0 .. size-1 for any size: a Feistel network over
the two digits of a number in base ~sqrt(size), with cycle walking for the few results that fall
outside (fewer than one in sqrt(size)). `shuffle` applies it twice for locality: first to blocks of
neighbouring rows, then to the rows inside each group of `group_blocks` shuffled blocks. So a run of
consecutive places touches few blocks, yet a group mixes rows from all over the domain.

Everything is vectorised over arrays of places that may each have their own size and key, costs the
same at 10 rows and at 10^12, and keeps no memory.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]

NUM_ROUNDS = 8
_ODD = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ROUND_KEYS = [np.uint64((0xD1B54A32D192ED03 * (2 * r + 1)) & 0xFFFFFFFFFFFFFFFF) for r in range(NUM_ROUNDS)]
_HALF = np.uint64(32)


def key_of(*parts: str | int) -> int:
    """A 64-bit key from names and numbers; different parts, different and unrelated keys."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(key_n: Keys, salt_n: Ints | int) -> Keys:
    """One more number into each key (the finaliser of splitmix64)."""
    salt = np.atleast_1d(np.asarray(salt_n, dtype=np.int64)).view(np.uint64)  # as an array, so that it may wrap
    x = key_n + (salt + np.uint64(1)) * _ODD
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def scramble(place_n: Ints, size_n: Ints, key_n: Keys) -> Ints:
    """Each place in 0 .. size-1 to its own place in 0 .. size-1, by key."""
    base_n = _base(size_n)
    value_n = _rounds(place_n, base_n, size_n, key_n, range(NUM_ROUNDS), 1)
    return _walk(value_n, base_n, size_n, key_n, range(NUM_ROUNDS), 1)


def unscramble(place_n: Ints, size_n: Ints, key_n: Keys) -> Ints:
    """The inverse of `scramble`."""
    base_n = _base(size_n)
    backwards = range(NUM_ROUNDS - 1, -1, -1)
    value_n = _rounds(place_n, base_n, size_n, key_n, backwards, -1)
    return _walk(value_n, base_n, size_n, key_n, backwards, -1)


def shuffle(place_n: Ints, stream_n: Ints, size_s: Ints, key_s: Keys, block_rows: int, group_blocks: int) -> Ints:
    """The row at each place of its stream: a pass over `size` rows, shuffled by blocks, then in groups.

    `stream_n` says for each place which of the streams (sizes, keys) it belongs to.
    """
    block, span = block_rows, block_rows * group_blocks
    blocks_s = -(-size_s // block)
    outer_s = mix(key_s, 0)
    short_s = blocks_s * block - size_s  # rows the last block lacks
    # The group that block was shuffled into is as many rows short, and all later groups begin earlier.
    short_group_s = unscramble(blocks_s - 1, blocks_s, outer_s) // group_blocks
    short_end_s = np.minimum((short_group_s + 1) * span, blocks_s * block) - short_s

    blocks_n, outer_n, short_n = blocks_s[stream_n], outer_s[stream_n], short_s[stream_n]
    short_group_n = short_group_s[stream_n]
    shift_n = np.where(place_n >= short_end_s[stream_n], short_n, 0)
    group_n = (place_n + shift_n) // span
    first_n = group_n * group_blocks
    num_blocks_n = np.minimum(group_blocks, blocks_n - first_n)
    is_short_n = group_n == short_group_n
    rows_n = num_blocks_n * block - np.where(is_short_n, short_n, 0)

    inner_n = scramble(place_n + shift_n - group_n * span, rows_n, mix(outer_n, group_n + 1))
    which_n = inner_n // block  # the block inside the group
    chosen_n = scramble(first_n + which_n, blocks_n, outer_n)
    # Inside its group the short block changes places with the last one, so that rows stay gapless.
    last_n = is_short_n & (which_n == num_blocks_n - 1)
    moved_n = is_short_n & ~last_n & (chosen_n == blocks_n - 1)
    if moved_n.any():
        end_n = first_n[moved_n] + num_blocks_n[moved_n] - 1
        chosen_n[moved_n] = scramble(end_n, blocks_n[moved_n], outer_n[moved_n])
    chosen_n = np.where(last_n, blocks_n - 1, chosen_n)
    return chosen_n * block + inner_n % block


def _base(size_n: Ints) -> Ints:
    """The least base whose square covers the size."""
    base_n = np.ceil(np.sqrt(size_n.astype(np.float64))).astype(np.int64)
    return np.where(base_n * base_n < size_n, base_n + 1, base_n)


def _rounds(place_n: Ints, base_n: Ints, size_n: Ints, key_n: Keys, rounds: range, sign: int) -> Ints:
    """The network: low digit += F(high), high digit += F(low), and so on, each modulo its base."""
    high_n = place_n // base_n
    low_n = place_n - high_n * base_n
    tall_n = -(-size_n // base_n)  # how many high digits there are
    for r in rounds:
        if r % 2 == 0:
            low_n = _add(low_n, sign, _noise(high_n, key_n, r, base_n), base_n)
        else:
            high_n = _add(high_n, sign, _noise(low_n, key_n, r, tall_n), tall_n)
    return high_n * base_n + low_n


def _add(digit_n: Ints, sign: int, noise_n: Ints, base_n: Ints) -> Ints:
    if sign > 0:
        digit_n = digit_n + noise_n
        return np.where(digit_n >= base_n, digit_n - base_n, digit_n)
    digit_n = digit_n - noise_n
    return np.where(digit_n < 0, digit_n + base_n, digit_n)


def _noise(digit_n: Ints, key_n: Keys, r: int, base_n: Ints) -> Ints:
    """A keyed hash of the digit, scaled to 0 .. base-1 by its top 32 bits."""
    x = ((digit_n.view(np.uint64) ^ key_n) + _ROUND_KEYS[r]) * _MIX_1
    x = (x ^ (x >> np.uint64(29))) * _MIX_2
    return (((x >> _HALF) * base_n.view(np.uint64)) >> _HALF).view(np.int64)


def _walk(value_n: Ints, base_n: Ints, size_n: Ints, key_n: Keys, rounds: range, sign: int) -> Ints:
    """Apply the network again wherever it left 0 .. size-1, until it is back inside."""
    (out,) = np.nonzero(value_n >= size_n)
    while len(out):
        value_n[out] = _rounds(value_n[out], base_n[out], size_n[out], key_n[out], rounds, sign)
        out = out[value_n[out] >= size_n[out]]
    return value_n
