"""The compiled kernels and their twins in torch give the same bits, row by row and under vmap.

Symbols: d values; m rows; runs: (count, size ..) of segments.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from taciturn.core import eager, kernel, random
from taciturn.core.errors import WireError
from taciturn.core.state import equal

SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 100, 1000, 1023, 1024, 1025, 2049, 5000]
compiled = pytest.mark.skipif(kernel.library() is None, reason="the kernels were not compiled here")


def vector(d: int, seed: int = 0) -> torch.Tensor:
    """Values of many magnitudes, both signs, some zeros."""
    key = random.key(seed)
    u = random.normal(key, d) * 10.0 ** (6 * random.uniform(random.fold(key, "scale"), d) - 4)
    return torch.where(random.uniform(random.fold(key, "zero"), d) < 0.1, 0.0, u)


ODD = {
    "zeros": torch.zeros(40),
    "nan": torch.tensor([1.0, float("nan"), -2.0] * 7),
    "infinite": torch.tensor([1.0, float("inf"), -float("inf"), 0.0] * 5),
    "huge": torch.full((33,), 3.4e38),
    "tiny": torch.tensor([1e-45, -1e-45, 1e-40, 0.0] * 5),
    "minus zero": torch.tensor([-0.0, 0.0, -1.0]),
}


def both(call):
    """(compiled, torch); compiled without what only some machines have gives the same too."""
    first, native = call(), kernel.library()
    if native is not None:
        native.tc_portable(1)
        try:
            assert same(first, call())
        finally:
            native.tc_portable(0)
    with kernel.without_library():
        return first, call()


def same(a, b) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)) if a.is_floating_point() else equal(a, b)


def test_the_kernels_were_compiled():
    if kernel.library() is None:
        pytest.skip("no compiler, or TACITURN_KERNELS=torch: the twins in torch do the work")


@compiled
@pytest.mark.parametrize("d", SIZES)
def test_words(d):
    keys = random.fold(random.key(0), torch.arange(3))
    a, b = both(lambda: kernel.words(keys, d))
    assert equal(a, b) and equal(a, eager.words(keys, d)) and equal(random.bits(keys, d), a)


@compiled
@pytest.mark.parametrize("brain", [False, True])
def test_narrow(brain):
    """Every sign, exponent and last place: all patterns of the upper 20 bits, with low bits around the ties."""
    high = torch.arange(1 << 20, dtype=torch.int64) << 12
    for low in (0, 1, 0x7FF, 0x800, 0x801, 0xFFF):
        u = (high + low).to(torch.int32).view(torch.float32)
        a, b = both(lambda u=u: kernel.narrow(u, brain))
        assert torch.equal(a.isnan(), u.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        assert torch.equal(a.isinf(), u.isinf())
        kernel.library().tc_portable(1)
        portable = kernel.narrow(u, brain)
        kernel.library().tc_portable(0)
        assert torch.equal(a.view(torch.int16), portable.view(torch.int16)), "NaN too"


def runs_of(d: int):
    yield [1, d]
    yield [d, 1]
    if d > 3:
        yield [1, 1, 1, d - 3, 2, 1]
        yield [d // 3, 3, 1, d % 3]


@compiled
@pytest.mark.parametrize("norm, nearest", [*itertools.product(kernel.NORMS, [False, True])])
@pytest.mark.parametrize("q", [1, 2, 3, 4, 7, 15, 16, 255, 256])
def test_quantize(norm, nearest, q):
    radix = torch.tensor(q - 1, dtype=torch.uint8)
    for u in [*(vector(d) for d in SIZES), *ODD.values()]:
        for runs in runs_of(len(u)):
            a, b = both(lambda u=u, runs=runs: kernel.quantize(u, random.key(3), radix, runs, norm, nearest))
            assert same(a, b), (len(u), runs)
            c, e = both(lambda a=a, runs=runs: kernel.dequantize(*a, radix, runs))
            assert same(c, e)


@compiled
@pytest.mark.parametrize("d", SIZES)
def test_select(d):
    u, key = vector(d), random.key(7)
    for k in sorted({1, d // 3 or 1, d}):
        edge, other = both(lambda k=k: kernel.threshold(key, d, k))
        assert equal(edge, other)
        for room in {k, d}:
            a, b = both(lambda room=room, edge=edge: kernel.keep(u, key, edge, 1.7, room))
            assert same(a, b) and int(a[1]) == k
            c, e = both(lambda a=a, edge=edge: kernel.spread(a[0], key, edge, a[1], d))
            assert same(c, e)
            chosen = eager.shift(eager.words(key, d), 1) <= edge
            assert torch.equal(c, torch.where(chosen, u * 1.7, 0.0)) and int(chosen.sum()) == k
            with pytest.raises(WireError, match="the seed of this message says"):
                kernel.spread(a[0], key, edge, a[1] + (1 if k + 1 < d else -1), d)
        a, b = both(lambda k=k: kernel.largest(u, k))
        assert same(a, b)
        assert torch.equal(a[0], u[a[1]]) and float(a[0].abs().min()) >= float(u.abs().sort(descending=True).values[k - 1])


@compiled
def test_threshold_far_from_where_it_is_expected():
    """The window around k / d misses now and then for small d; then all words are looked at."""
    for seed in range(300):
        key = random.key(seed)
        for d, k in [(30, 1), (30, 29), (200, 100)]:
            assert int(kernel.threshold(key, d, k)) == int(eager.threshold(key, d, k))


@compiled
@pytest.mark.parametrize("name", ODD)
def test_select_odd_values(name):
    u, key = ODD[name], random.key(1)
    assert same(*both(lambda: kernel.largest(u, 3)))
    assert same(*both(lambda: kernel.keep(u, key, torch.tensor(kernel.fraction(0.5)), 2.0, len(u))))


def test_largest_takes_the_first_of_equals_and_sees_what_is_not_a_number():
    u = torch.tensor([1.0, -2.0, 2.0, 2.0, float("nan"), 0.0])
    for values, places in both(lambda: kernel.largest(u, 3)):
        assert places.tolist() == [1, 2, 4] and values[:2].tolist() == [-2.0, 2.0] and values[2].isnan()


@compiled
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("block", [1, 16, 1024, 4096])
def test_rotate(d, block):
    u, key = vector(d), random.key(2)
    a, b = both(lambda: kernel.rotate(u, key, block, False))
    assert same(a, b)
    c, e = both(lambda: kernel.rotate(a, key, block, True))
    assert same(c, e)
    assert float((c - u).norm()) <= 1e-5 * float(u.norm()) + 1e-12
    assert abs(float(a.norm() / u.norm()) - 1) < 1e-5 or not u.any()


def test_rotate_spreads_one_value_evenly():
    for block, d in [(4096, 1024), (256, 512)]:
        u = torch.zeros(d)
        u[5] = 3.0
        a = kernel.rotate(u, random.key(0), block, False)
        touched = a[:block]
        assert torch.allclose(touched.abs(), torch.full_like(touched, 3.0 / min(block, d) ** 0.5))


def coefficients(m: int, seed: int = 0) -> torch.Tensor:
    """[6, m] of 0..2^31 - 2, the smallest and the largest among them."""
    drawn = eager.shift(random.bits(random.key(seed), 6 * m), 1) % (2**31 - 1)
    return torch.where(drawn % 5 == 0, drawn % 2 * (2**31 - 2), drawn).view(6, m)


@compiled
@pytest.mark.parametrize("d", [0, *SIZES])
@pytest.mark.parametrize("m, columns", [(1, 1), (2, 2), (3, 500), (4, 12345), (5, 250), (7, 32768)])
def test_ams(d, m, columns):
    for first in (0, 2**31 - d):
        table, other = both(lambda first=first: kernel.ams_table(coefficients(m, d), first, d, columns))
        assert equal(table, other) and table.shape == (m, d) and table.dtype == torch.int16
        for u in (vector(d), torch.stack([vector(d, i) for i in range(6)]).view(2, 3, d)):
            a, b = both(lambda u=u, table=table: kernel.ams(u, table, columns))
            assert same(a, b) and a.shape == (*u.shape[:-1], m, columns)


@compiled
def test_ams_table_takes_leading_axes_and_long_stretches():
    sets = torch.stack([coefficients(2, i) for i in range(3)])
    a, b = both(lambda: kernel.ams_table(sets, 5, 300_000, 77))
    assert equal(a, b) and equal(a[1], kernel.ams_table(sets[1], 5, 300_000, 77))
    assert equal(a, torch.vmap(lambda f: kernel.ams_table(f, 5, 300_000, 77))(sets))


@compiled
@pytest.mark.parametrize("name", ODD)
def test_ams_odd_values(name):
    u = ODD[name]
    for columns in (1, 3, 500):
        table = kernel.ams_table(coefficients(3), 0, len(u), columns)
        assert same(*both(lambda table=table, columns=columns: kernel.ams(u, table, columns)))


@compiled
def test_ams_leaves_out_what_no_column_is_there_for():
    u = vector(1000)
    table = kernel.ams_table(coefficients(4), 0, 1000, 32768)
    a, b = both(lambda: kernel.ams(u.expand(2, 1000), table, 9))
    assert same(a, b)


@pytest.mark.parametrize("native", [True, False])
def test_vmap_is_a_loop(native):
    if native and kernel.library() is None:
        pytest.skip("the kernels were not compiled here")
    m, d = 4, 37
    us, keys = torch.stack([vector(d, i) for i in range(m)]), random.fold(random.key(0), torch.arange(m))
    radix = torch.tensor([2, 6, 14, 254], dtype=torch.uint8)

    def through(u, key, radix):
        codes, steps = kernel.quantize(u, key, radix, [1, d], "l2", False)
        edge = kernel.threshold(key, d, 5)
        kept, count = kernel.keep(u, key, edge, 1.0, 5)
        values, places = kernel.largest(u, 5)
        return (
            codes, kernel.dequantize(codes, steps, radix, [1, d]), count, kernel.spread(kept, key, edge, count, d),
            kernel.put(values, places, d), kernel.rotate(u, key, 16, False),
        )  # fmt: skip

    def run():
        stacked = torch.vmap(through)(us, keys, radix)
        nested = torch.vmap(torch.vmap(through))(us.view(2, 2, d), keys.view(2, 2), radix.view(2, 2))
        for i in range(m):
            one = through(us[i], keys[i], radix[i])
            assert same(one, tuple(t[i] for t in stacked)) and same(one, tuple(t.flatten(0, 1)[i] for t in nested))
        shared = torch.vmap(lambda key: kernel.rotate(us[0], key, 16, False))(keys)
        assert same(shared[2], kernel.rotate(us[0], keys[2], 16, False))

    if native:
        run()
    else:
        with kernel.without_library():
            run()


def test_inputs_need_not_be_contiguous():
    wide = torch.stack([vector(50), vector(50, 1)], 1)
    key = random.key(0)
    assert same(kernel.rotate(wide[:, 1], key, 16, False), kernel.rotate(wide[:, 1].clone(), key, 16, False))
    assert same(kernel.largest(wide.T, 4), kernel.largest(wide.T.contiguous(), 4))


def test_put_refuses_places_that_are_not_there():
    values = torch.ones(2)
    assert kernel.put(values, torch.tensor([0, 4]), 5).tolist() == [1, 0, 0, 0, 1]
    for places in ([0, 5], [-1, 2], [3, 3], [2, 1]):
        with pytest.raises(WireError, match="indices"):
            kernel.put(values, torch.tensor(places), 5)


@pytest.mark.parametrize("p", [0.0, 0.25, 1 / 3, 1.0])
def test_fraction(p):
    edge = kernel.fraction(p)
    assert abs((edge + 1) / 2**63 - p) < 2**-52 and -1 <= edge < 2**63
