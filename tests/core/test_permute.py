import hashlib

import numpy as np
import pytest

from mixer.core.permute import NUM_ROUNDS, key_of, mix, scramble, shuffle, unscramble

MASK = (1 << 64) - 1


def full(value: int, length: int) -> np.ndarray:
    return np.full(length, value, dtype=np.int64)


def keys(value: int, length: int) -> np.ndarray:
    return np.full(length, value, dtype=np.uint64)


def scrambled(size: int, key: int) -> list[int]:
    return scramble(np.arange(size), full(size, size), keys(key, size)).tolist()


def shuffled(size: int, key: int, block: int, group: int) -> list[int]:
    """A whole pass."""
    places = np.arange(size)
    streams = np.zeros(size, dtype=np.int64)
    return shuffle(places, streams, full(size, 1), keys(key, 1), block, group).tolist()


# ---- the same things said once more, number by number, in whole numbers of Python -----------------


def plain_mix(key: int, salt: int) -> int:
    x = (key + (salt + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def plain_scramble(place: int, size: int, key: int) -> int:
    base = next(b for b in range(int(size**0.5), size + 2) if b * b >= size)
    tall = -(-size // base)
    while True:
        high, low = divmod(place, base)
        for r in range(NUM_ROUNDS):
            digit, modulus = (high, base) if r % 2 == 0 else (low, tall)
            x = (((digit ^ key) + 0xD1B54A32D192ED03 * (2 * r + 1)) * 0xBF58476D1CE4E5B9) & MASK
            x = ((x ^ (x >> 29)) * 0x94D049BB133111EB) & MASK
            noise = ((x >> 32) * modulus) >> 32
            if r % 2 == 0:
                low = (low + noise) % base
            else:
                high = (high + noise) % tall
        place = high * base + low
        if place < size:
            return place


def plain_shuffle(size: int, key: int, block: int, group: int) -> list[int]:
    """Deal the blocks, cut them into groups, shuffle each group's rows; what may be short counts as last."""
    outer = plain_mix(key, 0)
    num_blocks = -(-size // block)
    dealt = [plain_scramble(i, num_blocks, outer) for i in range(num_blocks)]
    order: list[int] = []
    for number, first in enumerate(range(0, num_blocks, group)):
        members = dealt[first : first + group]
        if num_blocks - 1 in members:  # whether short or not
            place = members.index(num_blocks - 1)
            members[place], members[-1] = members[-1], members[place]
        rows = [row for b in members for row in range(b * block, min((b + 1) * block, size))]
        order += [rows[plain_scramble(i, len(rows), plain_mix(outer, number + 1))] for i in range(len(rows))]
    return order


# ---- keys ------------------------------------------------------------------------------------------


def test_keys_are_the_blake2b_of_their_parts() -> None:
    digest = hashlib.blake2b(b"domain\x1fweb", digest_size=8).digest()
    assert key_of("domain", "web") == int.from_bytes(digest, "little") == 0x2DFD60D9B98C201F
    assert len({key_of("a", "b"), key_of("ab"), key_of("b", "a"), key_of("a", "b", ""), key_of("a"), key_of()}) == 6


def test_mixing_a_number_into_keys() -> None:
    assert mix(keys(0, 1), 0).tolist() == [0xE220A8397B1DCDAF]  # the first number of splitmix64 from seed 0
    assert mix(keys(0, 1), 1).tolist() == [0x6E789E6AA1B965F4]  # and the second
    several = mix(keys(MASK, 4), np.array([0, 7, -1, -(1 << 62)]))
    assert several.tolist() == [plain_mix(MASK, salt) for salt in (0, 7, -1, -(1 << 62))]


# ---- scramble ----------------------------------------------------------------------------------------


def test_every_size_up_to_300_is_permuted() -> None:
    for size in range(1, 301):
        assert sorted(scrambled(size, key_of("k", size))) == list(range(size)), f"size {size}"


def test_scramble_is_the_network_it_says_it_is() -> None:
    for size in (1, 2, 3, 4, 5, 10, 16, 17, 99, 100, 101, 1000):
        key = key_of("plain", size)
        assert scrambled(size, key) == [plain_scramble(i, size, key) for i in range(size)], f"size {size}"


@pytest.mark.parametrize(
    "size", [10**6, 10**9, 10**12, (1 << 47) - 1, 1 << 48, (1 << 24) ** 2 - 1, 94_906_265**2 % (1 << 48)]
)
def test_far_places_of_large_sizes(size: int) -> None:
    places = np.unique(
        np.concatenate([np.arange(50), size - 1 - np.arange(50), np.linspace(0, size - 1, 50).astype(int)])
    )
    found = scramble(places, full(size, len(places)), keys(11, len(places)))
    assert found.tolist() == [plain_scramble(place, size, 11) for place in places.tolist()]
    assert unscramble(found, full(size, len(places)), keys(11, len(places))).tolist() == places.tolist()


def test_unscramble_undoes_every_place() -> None:
    for size in (1, 2, 3, 7, 64, 65, 1000, 4097):
        places = np.arange(size)
        there = scramble(places, full(size, size), keys(3, size))
        assert unscramble(there, full(size, size), keys(3, size)).tolist() == places.tolist(), f"size {size}"


def test_each_place_may_have_its_own_size_and_key() -> None:
    sizes, key = np.array([1, 5, 1 << 48, 5]), np.array([1, 2, 3, 4], dtype=np.uint64)
    found = scramble(np.array([0, 4, 1 << 47, 4]), sizes, key)
    assert found.tolist() == [
        plain_scramble(place, size, k) for place, size, k in [(0, 1, 1), (4, 5, 2), (1 << 47, 1 << 48, 3), (4, 5, 4)]
    ]


def test_arguments_are_left_as_they_were() -> None:
    places, sizes, key = np.arange(100), full(100, 100), keys(1, 100)
    scramble(places, sizes, key)
    shuffle(places, np.zeros(100, dtype=np.int64), sizes[:1], key[:1], 8, 2)
    assert places.tolist() == list(range(100))
    assert set(sizes.tolist()) == {100}
    assert set(key.tolist()) == {1}


# ---- shuffle -----------------------------------------------------------------------------------------

SIZES = [1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 95, 96, 97, 100, 255, 256, 257]


@pytest.mark.parametrize(("block", "group"), [(1, 1), (1, 64), (8, 1), (8, 4), (7, 3), (64, 64), (1000, 1000)])
def test_a_pass_deals_blocks_and_shuffles_groups_of_them(block: int, group: int) -> None:
    for size in SIZES:
        key = key_of("pass", size)
        found = shuffled(size, key, block, group)
        assert sorted(found) == list(range(size)), f"size {size}"
        assert found == plain_shuffle(size, key, block, group), f"size {size}"


def test_the_short_block_in_every_group_it_can_fall_into() -> None:
    seen = set()
    for key in range(200):
        found = shuffled(45, key, 4, 3)  # 12 blocks in 4 groups; the last block has 1 row
        assert sorted(found) == list(range(45)), f"key {key}"
        seen.add(min(found.index(44) // 12, 3))
    assert seen == {0, 1, 2, 3}


def test_a_group_of_one_block_keeps_neighbours_together() -> None:
    found = shuffled(1000, 5, 10, 1)
    for begin in range(0, 1000, 10):
        assert len({row // 10 for row in found[begin : begin + 10]}) == 1


def test_streams_asked_together_answer_as_if_asked_alone() -> None:
    sizes, key = [1, 45, 1000, 7, 1 << 40], [1, 2, 3, 4, 5]
    alone = [shuffled(size, k, 4, 3) for size, k in zip(sizes[:4], key[:4], strict=True)]
    place = np.concatenate([np.arange(size) for size in sizes[:4]])
    stream = np.repeat(np.arange(4), sizes[:4])
    mixed = np.random.default_rng(0).permutation(len(place))
    found = shuffle(place[mixed], stream[mixed], np.array(sizes), np.array(key, dtype=np.uint64), 4, 3)
    assert found.tolist() == np.concatenate(alone)[mixed].tolist()


def test_the_last_rows_of_the_largest_domain() -> None:
    size = 1 << 48
    places = np.concatenate([np.arange(size - 5000, size), np.arange(size // 2, size // 2 + 5000)])
    streams = np.zeros(len(places), dtype=np.int64)
    found = shuffle(places, streams, full(size, 1), keys(9, 1), 64, 64)
    assert len(np.unique(found)) == len(places)
    assert found.min() >= 0
    assert found.max() < size


def test_other_keys_give_other_orders() -> None:
    orders = {tuple(shuffled(50, key, 4, 4)) for key in range(100)}
    assert len(orders) == 100
