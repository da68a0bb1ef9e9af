"""The laws of codecs: one table, one row a codec; a codec that is added brings its row.

Symbols: u [d] a vector; C(u) = decode(encode(u)); r the relative error of a normal value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taciturn import codecs
from taciturn.core import random
from taciturn.core.state import clone, equal, row, stack
from taciturn.core.types import Codec
from taciturn.core.vector import Layout
from taciturn.wire.format import FRAME, Frame, Schema, nbytes, pack, unpack


@dataclass(frozen=True)
class Row:
    """What a codec promises. bound: u [d] -> largest |C(u) - u| of each value (zeros: lossless).

    size: d -> bytes; largest: finite values beyond it are sent as it; passes: NaN and infinity reach the other side;
    exact: values that come back in every bit.
    """

    codec: Codec
    bound: Callable[[torch.Tensor], torch.Tensor]
    size: Callable[[int], int]
    largest: float = math.inf
    passes: bool = True
    exact: tuple[float, ...] = (0.0, -0.0, 1.0, -2.0, 0.5)


def rounding(relative: float, smallest: float, largest: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Half a unit in the last place, or half the smallest subnormal; beyond the largest value what is cut off."""
    return lambda u: torch.maximum(u.abs() * relative, torch.tensor(smallest)) + (u.abs() - largest).clamp(min=0)


F32 = float(torch.finfo(torch.float32).max)
F16, BF16 = 65504.0, float(torch.finfo(torch.bfloat16).max)
ROWS = {
    "identity": Row(codecs.identity(), torch.zeros_like, lambda d: 4 * d),
    "float16": Row(codecs.cast(), rounding(2**-11, 2**-25, F16), lambda d: 2 * d, largest=F16),
    "bfloat16": Row(codecs.cast("bfloat16"), rounding(2**-8, 2**-134, BF16), lambda d: 2 * d, largest=BF16),
}
each = pytest.mark.parametrize("row_", ROWS.values(), ids=ROWS)
quick = settings(max_examples=60, deadline=None)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = st.lists(finite, min_size=1, max_size=12).map(lambda values: torch.tensor(values, dtype=torch.float32))


def layout_of(d: int) -> Layout:
    return Layout(("w",), ((d,),))


def encode(codec: Codec, u: torch.Tensor, key: int = 0):
    """-> (payload, tx)."""
    layout = layout_of(u.shape[-1])
    return codec.encode(u, codec.init(layout)[0], random.key(key), layout=layout, knobs={})


def through(codec: Codec, u: torch.Tensor, key: int = 0) -> torch.Tensor:
    """C(u), by way of bytes."""
    payload, _ = encode(codec, u, key)
    schema = Schema.of(payload)
    arrived = unpack(pack(Frame("update", payload)), {schema.id: schema}).payload
    layout = layout_of(len(u))
    return codec.decode(arrived, codec.init(layout)[1], layout=layout)[0]


def spread(d: int, seed: int = 0) -> torch.Tensor:
    """Values of all magnitudes that training meets: 1e-8 to 1e3, both signs."""
    key = random.key(seed)
    return random.normal(key, d) * 10.0 ** (11 * random.uniform(random.fold(key, "scale"), d) - 8)


def test_every_codec_has_a_row():
    assert {type(row_.codec).__name__ for row_ in ROWS.values()} == set(codecs.__all__)


@each
@quick
@given(vectors)
def test_finite_in_near_out(row_, u):
    got = through(row_.codec, u)
    assert got.shape == u.shape and got.dtype == torch.float32
    assert torch.isfinite(got).all()
    assert ((got.double() - u.double()).abs() <= row_.bound(u.double()) * (1 + 1e-6)).all()


@each
def test_the_bound_is_not_idle(row_):
    """Over many values the worst error comes near its bound, so that the law above could fail."""
    u = spread(20_000).double()
    error, bound = (through(row_.codec, u.float()).double() - u.float().double()).abs(), row_.bound(u.float().double())
    assert (error <= bound * (1 + 1e-6)).all()
    assert row_.codec.lossy == bool(bound.any()) == bool(error.any())
    if row_.codec.lossy:
        assert float((error / bound).max()) > 0.95


@each
@quick
@given(st.integers(1, 300))
def test_bytes(row_, d):
    payload, _ = encode(row_.codec, spread(d))
    assert int(nbytes(payload)) == len(pack(Frame("update", payload))) - FRAME == row_.size(d)


@each
def test_shapes_and_bytes_do_not_depend_on_the_values(row_):
    inputs = [spread(50), torch.zeros(50), torch.ones(50), torch.full((50,), F32), -spread(50, seed=1)]
    assert len({Schema.of(encode(row_.codec, u)[0]) for u in inputs}) == 1


@each
def test_vmap_is_a_loop(row_):
    m, d = 5, 33
    codec, layout = row_.codec, layout_of(d)
    us, keys = torch.stack([spread(d, seed=i) for i in range(m)]), random.fold(random.key(0), torch.arange(m))
    tx, rx = (stack([state] * m) for state in codec.init(layout))
    payloads, tx_new = torch.vmap(lambda u, s, k: codec.encode(u, s, k, layout=layout, knobs={}))(us, tx, keys)
    decoded, rx_new = torch.vmap(lambda p, s: codec.decode(p, s, layout=layout))(payloads, rx)
    sizes = torch.vmap(nbytes)(payloads)
    for i in range(m):
        payload, tx_one = codec.encode(us[i], row(tx, i), keys[i], layout=layout, knobs={})
        got, rx_one = codec.decode(payload, row(rx, i), layout=layout)
        assert equal(payload, row(payloads, i)) and torch.equal(got, decoded[i]) and int(sizes[i]) == int(nbytes(payload))
        assert equal(tx_one, row(tx_new, i)) and equal(rx_one, row(rx_new, i))


@each
def test_encoding_is_pure_and_the_key_decides(row_):
    u = spread(40)
    kept, layout = u.clone(), layout_of(40)
    tx, rx = row_.codec.init(layout)
    state = clone(tx)
    first, second = (row_.codec.encode(u, tx, random.key(3), layout=layout, knobs={}) for _ in range(2))
    assert equal(first[0], second[0]) and equal(first[1], second[1]) and equal(tx, state) and torch.equal(u, kept)
    payload = clone(first[0])
    row_.codec.decode(first[0], rx, layout=layout)
    assert equal(first[0], payload)


@each
@pytest.mark.parametrize("d", [1, 2, 31, 64])
def test_zeros_stay_zeros(row_, d):
    assert not through(row_.codec, torch.zeros(d)).any()


@each
def test_one_element(row_):
    for value in row_.exact:
        u = torch.tensor([value])
        assert equal(through(row_.codec, u), u)


@each
def test_large_values_saturate(row_):
    """Beyond the largest value comes the largest value, never infinity; what is below is not touched by it."""
    u = torch.tensor([1.0, -3.0, min(row_.largest, F32), -1e5, 1e5, 1e30, -1e30, F32, -F32])
    got, beyond = through(row_.codec, u), u.abs() >= row_.largest
    assert torch.equal(got[beyond], u.sign()[beyond] * row_.largest)
    within = got[~beyond].double() - u[~beyond].double()
    assert (within.abs() <= row_.bound(u[~beyond].double())).all() and torch.isfinite(got).all()


@each
def test_what_is_not_finite_reaches_the_server(row_):
    u = torch.tensor([1.0, float("nan"), 2.0, float("inf"), -float("inf")])
    got = through(row_.codec, u)
    if row_.passes:
        assert got.isnan().tolist() == u.isnan().tolist()
        assert torch.equal(got[3:], u[3:]) and torch.equal(got[[0, 2]], u[[0, 2]])
    else:
        assert not torch.isfinite(got).all(), "a client that failed must be seen"


@pytest.mark.parametrize("name", [name for name, row_ in ROWS.items() if not row_.codec.lossy])
@quick
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
def test_lossless_codecs_keep_every_bit(name, words):
    u = torch.tensor(words, dtype=torch.int32).view(torch.float32)
    assert equal(through(ROWS[name].codec, u), u)
    u = torch.tensor(words, dtype=torch.int64).view(torch.float64)
    assert equal(through(ROWS[name].codec, u), u)


# ---------------------------------------------------------------------------------------------------- cast alone


def test_cast_rounds_to_nearest_even():
    between = {
        "float16": ([1 + 2**-11, 1 + 3 * 2**-11, 2049.0, 2051.0], [1.0, 1 + 2**-9, 2048.0, 2052.0]),
        "bfloat16": ([1 + 2**-8, 1 + 3 * 2**-8, 257.0, 259.0], [1.0, 1 + 2**-6, 256.0, 260.0]),
    }
    for name, (given_, expected) in between.items():
        u, rounded = torch.tensor(given_), torch.tensor(expected)
        assert torch.equal(through(codecs.cast(name), u), rounded)
        assert torch.equal(through(codecs.cast(name), -u), -rounded)


def test_cast_sends_the_narrow_type():
    assert encode(codecs.cast(), torch.ones(2))[0]["values"].dtype == torch.float16
    assert encode(codecs.cast("bfloat16"), torch.ones(2))[0]["values"].dtype == torch.bfloat16
