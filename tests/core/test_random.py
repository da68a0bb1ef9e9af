"""Laws of counter-based randomness, against SplitMix64 written in plain Python integers.

Symbols: z standard errors (a law allows 4); n draws; k bins of a chi-square.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random as stdlib_random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taciturn.core import random

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
STREAM = 0xD1B54A32D192ED03
SEEDS = st.integers(-(2**63), 2**64 - 1)
quick = settings(max_examples=50, deadline=None)


def signed(pattern: int) -> int:
    return pattern - (1 << 64) if pattern >> 63 else pattern


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def splitmix(state: int, n: int) -> list[int]:
    """The first n outputs of SplitMix64 from a state."""
    return [mix((state + (i + 1) * GOLDEN) & MASK) for i in range(n)]


def folded(key: int, *parts: int | str) -> int:
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "big")
        key = mix(((key ^ (part * GOLDEN & MASK)) + GOLDEN) & MASK)
    return key


def unsigned(tensor: torch.Tensor) -> list[int]:
    return [value & MASK for value in tensor.reshape(-1).tolist()]


def z_chi_square(counts: torch.Tensor) -> float:
    """Standard errors between the chi-square of counts that should be equal and its mean."""
    counts = counts.double()
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    return abs(float((counts - expected).square().sum() / expected) - freedom) / math.sqrt(2 * freedom)


def z_mean(values: torch.Tensor, mean: float, variance: float) -> float:
    return abs(float(values.double().mean()) - mean) / math.sqrt(variance / values.numel())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many of the 64 bits agree, for each pair of words."""
    return torch.tensor([64 - (x ^ y).bit_count() for x, y in zip(unsigned(a), unsigned(b), strict=True)])


# ------------------------------------------------------------------------------------------------ known answers


def test_the_reference_is_splitmix64():
    """Published first outputs of the generator (its authors' C code, seeds 1234567 and 0)."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert splitmix(1234567, 5) == published
    assert unsigned(random.bits(torch.tensor(1234567) ^ signed(STREAM), 5)) == published
    assert unsigned(random.key(0)) == splitmix(0, 1) == [0xE220A8397B1DCDAF]


@quick
@given(SEEDS, st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.text(max_size=8)), max_size=4), st.integers(0, 9))
def test_key_fold_and_bits_are_the_reference(seed, parts, n):
    key = random.fold(random.key(seed), *parts)
    expected = folded(mix((seed + GOLDEN) & MASK), *parts)
    assert unsigned(key) == [expected]
    assert unsigned(random.bits(key, n)) == splitmix(expected ^ STREAM, n)
    assert unsigned(random.bits(key, 1)) != unsigned(random.fold(key, 0).reshape(1)), "draws are not children"


@quick
@given(SEEDS)
def test_uniform_and_normal_are_the_reference(seed):
    words = splitmix(unsigned(random.key(seed))[0] ^ STREAM, 12)
    u = [(word >> 40) / 2**24 for word in words]
    assert random.uniform(random.key(seed), 3, 4).flatten().tolist() == u
    expected = [math.sqrt(-2 * math.log1p(-a)) * math.cos(2 * math.pi * b) for a, b in zip(u[:6], u[6:], strict=True)]
    assert random.normal(random.key(seed), 2, 3).flatten().tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@quick
@given(SEEDS, st.integers(0, 20))
def test_permutation_is_the_order_of_the_words(seed, n):
    words = [word >> 1 for word in splitmix(unsigned(random.key(seed))[0] ^ STREAM, n)]
    assert random.permutation(random.key(seed), n).tolist() == sorted(range(n), key=words.__getitem__)


# ----------------------------------------------------------------------------------------- keys and counters


def test_same_key_same_draws_and_nothing_else_matters():
    key = random.fold(random.key(3), "round", 7)
    draws = (random.bits, random.uniform, random.normal, random.permutation, lambda k, n: random.choice(k, 100, n))
    for draw in draws:
        first = draw(key, 6)
        torch.rand(5), stdlib_random.random(), draw(random.key(9), 3)
        assert torch.equal(first, draw(key.clone(), 6))
        assert not torch.equal(first, draw(random.fold(key, 0), 6))


def test_fold_takes_one_part_after_the_other():
    key = random.key(1)
    assert torch.equal(random.fold(key, "a", 3, 5), random.fold(random.fold(random.fold(key, "a"), 3), 5))
    assert torch.equal(random.fold(key), key)
    assert not torch.equal(random.fold(key, 3, 5), random.fold(key, 5, 3))
    assert not torch.equal(random.fold(key, "a", "b"), random.fold(key, "ab"))
    assert not torch.equal(random.fold(key, "1"), random.fold(key, 1))


def test_fold_of_tensors_is_fold_of_numbers_and_broadcasts():
    keys, ids = torch.stack([random.key(s) for s in range(3)]), torch.tensor([0, 1, -5, 2**62])
    table = random.fold(keys.unsqueeze(1), "client", ids, 9)
    assert table.shape == (3, 4) and table.dtype == torch.int64
    for i, j in itertools.product(range(3), range(4)):
        assert torch.equal(table[i, j], random.fold(random.key(i), "client", int(ids[j]), 9))


def test_keys_do_not_collide():
    keys = [random.fold(random.key(0), name, torch.arange(50_000)) for name in ("a", "b")]
    seeds = torch.stack([random.key(seed) for seed in range(1000)])
    every = torch.cat([*keys, random.fold(seeds, 0), random.fold(seeds, 1), seeds])
    assert len(torch.unique(every)) == len(every)


PAIRS = {
    "neighbor counters": lambda k: (random.bits(k, 4001)[:-1], random.bits(k, 4001)[1:]),
    "neighbor keys": lambda k: (random.fold(k, torch.arange(4000)), random.fold(k, torch.arange(1, 4001))),
    "first words of neighbor keys": lambda k: tuple(
        random.bits(random.fold(k, torch.arange(a, a + 4000)), 1) for a in (0, 1)
    ),
    "names": lambda k: (random.bits(random.fold(k, "a"), 4000), random.bits(random.fold(k, "b"), 4000)),
    "parent and child": lambda k: (random.bits(k, 4000), random.bits(random.fold(k, 1), 4000)),
    "neighbor seeds": lambda k: (random.bits(random.key(4), 4000), random.bits(random.key(5), 4000)),
    "one bit of the key": lambda k: tuple(random.fold(torch.arange(4000) * 2 + low, "x") for low in (0, 1)),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_streams_are_independent(pair):
    """Half of the bits of two streams agree, in sum and in spread: binomial(64, 1/2)."""
    same = same_bits(*pair(random.key(11)))
    assert z_mean(same, 32, 16) < 4
    assert z_mean((same - 32).double().square(), 16, 16 * 16 * 2) < 4


def test_each_bit_of_a_word_is_fair():
    words = random.bits(random.key(2), 20_000)
    for place in range(64):
        assert z_mean((words >> place) & 1, 0.5, 0.25) < 4.5


def test_seeds_of_64_bits():
    assert torch.equal(random.key(-1), random.key(2**64 - 1))
    assert not torch.equal(random.key(2**63), random.key(0))


# ------------------------------------------------------------------------------------------------- distributions


STREAMS = {
    "one key": lambda draw, n: draw(random.key(5), n),
    "many keys": lambda draw, n: draw(random.fold(random.key(6), torch.arange(n // 4)), 4).flatten(),
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_uniform_moments_and_chi_square(stream):
    u = stream(random.uniform, 400_000)
    assert u.dtype == torch.float32 and float(u.min()) >= 0 and float(u.max()) < 1
    assert z_mean(u, 1 / 2, 1 / 12) < 4
    assert z_mean((u - 0.5).square(), 1 / 12, 1 / 180) < 4
    assert z_chi_square(torch.bincount((u * 100).long(), minlength=100)) < 4
    pairs = (u[0::2] * 16).long() * 16 + (u[1::2] * 16).long()
    assert z_chi_square(torch.bincount(pairs, minlength=256)) < 4


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_normal_moments(stream):
    g = stream(random.normal, 400_000).double()
    assert torch.isfinite(g).all()
    assert z_mean(g, 0, 1) < 4 and z_mean(g.square(), 1, 2) < 4
    assert z_mean(g**3, 0, 15) < 4 and z_mean(g**4, 3, 96) < 4
    assert z_mean(g[0::2] * g[1::2], 0, 1) < 4
    cells = (torch.special.ndtr(g) * 50).long().clamp(max=49)
    assert z_chi_square(torch.bincount(cells, minlength=50)) < 4


def test_uniform_keeps_the_shapes():
    keys = random.fold(random.key(0), torch.arange(6).reshape(2, 3))
    assert random.uniform(keys, 4, 5).shape == (2, 3, 4, 5) and random.normal(keys).shape == (2, 3)
    assert random.uniform(random.key(0), 0, 3).shape == (0, 3) and random.bits(keys, 0).shape == (2, 3, 0)


# -------------------------------------------------------------------------------------- permutation and choice


@quick
@given(SEEDS, st.integers(1, 40), st.integers(0, 30))
def test_prefix_of_a_permutation_does_not_depend_on_n(seed, size, more):
    key = random.key(seed)
    wide = random.permutation(key, size + more, torch.tensor(size))
    assert wide[:size].tolist() == random.permutation(key, size).tolist()
    assert sorted(wide.tolist()) == list(range(size + more))
    assert sorted(wide[:size].tolist()) == list(range(size))


def test_all_orders_are_equally_likely():
    keys = random.fold(random.key(3), torch.arange(24_000))
    for orders in (
        random.permutation(keys, 4),
        random.permutation(keys, 7, torch.full((24_000,), 4))[:, :4],
    ):
        code = (orders * torch.tensor([64, 16, 4, 1])).sum(1)
        _, counts = torch.unique(code, return_counts=True)
        assert len(counts) == 24 and z_chi_square(counts) < 4


@quick
@given(SEEDS, st.integers(1, 60), st.data())
def test_choice_draws_no_number_twice(seed, n, data):
    count = data.draw(st.integers(0, n))
    drawn = random.choice(random.key(seed), n, count)
    assert drawn.shape == (count,) and drawn.dtype == torch.int64
    assert len(set(drawn.tolist())) == count and all(0 <= value < n for value in drawn.tolist())


@pytest.mark.parametrize(("n", "count"), [(5, 2), (12, 3)], ids=["dense", "sparse"])
def test_choice_is_uniform_in_order(n, count):
    """Both ways to draw: every ordered pair that leads is equally likely, and every number at the last place."""
    drawn = torch.stack([random.choice(random.fold(random.key(8), i), n, count) for i in range(4000)])
    pairs = torch.bincount(drawn[:, 0] * n + drawn[:, 1], minlength=n * n).reshape(n, n)
    assert not pairs.diagonal().any()
    assert z_chi_square(pairs[~torch.eye(n, dtype=torch.bool)]) < 4
    assert z_chi_square(torch.bincount(drawn[:, -1], minlength=n)) < 4


def test_cost_of_a_small_choice_does_not_grow_with_n():
    """10^12 candidates: a permutation of them would need terabytes."""
    start = time.perf_counter()
    drawn = torch.cat([random.choice(random.fold(random.key(0), i), 10**12, 50) for i in range(20)])
    assert time.perf_counter() - start < 5
    assert len(torch.unique(drawn)) == 1000 and z_mean(drawn / 10**12, 1 / 2, 1 / 12) < 4


# ---------------------------------------------------------------------------------------------------- engines


def test_vmap_is_a_loop():
    keys = random.fold(random.key(1), torch.arange(6))
    sizes = torch.tensor([1, 9, 4, 7, 2, 9])
    for fn, rest in (
        (lambda k: random.fold(k, "step", 3), ()),
        (lambda k, s: random.fold(k, s), (sizes,)),
        (lambda k: random.bits(k, 5), ()),
        (lambda k: random.uniform(k, 2, 3), ()),
        (lambda k: random.normal(k, 2, 3), ()),
        (lambda k: random.permutation(k, 9), ()),
        (lambda k, s: random.permutation(k, 9, s), (sizes,)),
    ):
        loop = torch.stack([fn(*row) for row in zip(keys, *rest, strict=True)])
        assert torch.equal(torch.vmap(fn)(keys, *rest), loop)
        assert torch.equal(fn(keys, *rest), loop), "a leading axis of keys is a loop too"


# ----------------------------------------------------------------------------------------------------- seeded


def test_seeded_draws_follow_the_key_and_leave_no_trace():
    def draws():
        return torch.rand(3).tolist(), stdlib_random.random()

    def inside(key):
        with random.seeded(key):
            return draws()

    torch.manual_seed(7), stdlib_random.seed(7)
    expected = draws(), draws()
    torch.manual_seed(7), stdlib_random.seed(7)
    first = draws()
    a, b, other = inside(random.key(1)), inside(random.key(1)), inside(random.key(2))
    with pytest.raises(KeyError), random.seeded(random.key(3)):
        draws()
        raise KeyError
    assert (first, draws()) == expected, "the generators outside moved"
    assert a == b and a[0] != other[0] and a[1] != other[1]


def test_seeded_nests():
    with random.seeded(random.key(1)):
        plain = torch.rand(2), torch.rand(2)
    with random.seeded(random.key(1)):
        first = torch.rand(2)
        with random.seeded(random.key(2)):
            torch.rand(5)
        assert torch.equal(first, plain[0]) and torch.equal(torch.rand(2), plain[1])
