"""The laws of codecs: one table, one row a codec; a codec that is added brings its row.

Symbols: u [d] a vector; C(u) = decode(encode(u)); omega a bound of E|C(u) - u|^2 / |u|^2; n draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taciturn import codecs
from taciturn.core import kernel, random
from taciturn.core.errors import ConfigError, MethodError, WireError
from taciturn.core.state import clone, equal, row, stack
from taciturn.core.types import Codec
from taciturn.core.vector import Layout
from taciturn.wire.format import FRAME, Frame, Schema, nbytes, pack, unpack


@dataclass(frozen=True)
class Row:
    """What is asked of a codec. exact: message_bits is no expectation; close: vmap may differ from a loop in last bits.

    packed: the size is known by packing only, and message_bits is a bound.
    """

    codec: Codec
    exact: bool = True
    close: bool = False
    packed: bool = False


C = codecs
ROWS = {
    "identity": Row(C.identity()),
    "float16": Row(C.cast()),
    "bfloat16": Row(C.cast("bfloat16")),
    "quantize": Row(C.quantize()),
    "bits1": Row(C.quantize(bits=1)),
    "bits3-l2": Row(C.quantize(bits=3, norm="l2")),
    "levels5": Row(C.quantize(levels=5)),
    "block": Row(C.quantize(bits=4, scale="block", block=8)),
    "channel": Row(C.quantize(bits=2, scale="channel")),
    "nearest": Row(C.quantize(rounding="nearest")),
    "quantize8": Row(C.quantize8()),
    "quantize4": Row(C.quantize4()),
    "quantize2": Row(C.quantize2()),
    "qsgd": Row(C.qsgd()),
    "qsgd16": Row(C.qsgd(16)),
    "ternary": Row(C.ternary()),
    "sign": Row(C.sign()),
    "rotated": Row(C.rotated(C.quantize4(), block=16)),
    "rotated-qsgd": Row(C.rotated(C.qsgd())),
    "sparsify": Row(C.sparsify(), exact=False),
    "sparsify-tenth": Row(C.sparsify(p=0.1), exact=False),
    "sparsify-all": Row(C.sparsify(p=1.0)),
    "rand_k": Row(C.rand_k(share=0.3)),
    "rand_1": Row(C.rand_k(k=1)),
    "top_k": Row(C.top_k(share=0.3)),
    "top_1": Row(C.top_k(k=1)),
    "top_k-least": Row(C.top_k(share=0.01, least=7)),
    "sketch": Row(C.sketch(), close=True),
    "sketch-all": Row(C.sketch(share=1.0), close=True),
    "lowrank": Row(C.lowrank(rank=1), close=True),
    "lowrank-cold": Row(C.lowrank(rank=1, turns=2, warm=False), close=True),
    "lowrank-quantized": Row(C.chain(C.lowrank(rank=1), C.quantize4()), close=True),
    "partial": Row(C.partial(), exact=False),
    "clip": Row(C.clip(C.quantize4(), norm=0.5)),
    "clip-noise": Row(C.clip(norm=2.0, noise=1.0, count=4)),
    "error_feedback": Row(C.error_feedback(C.top_k(share=0.2))),
    "error_feedback-sign": Row(C.error_feedback(C.sign())),
    "ef21": Row(C.ef21(C.top_k(share=0.2))),
    "difference": Row(C.difference(C.quantize4())),
    "difference-mean": Row(C.difference(C.quantize4(), alpha=0.3, memory="mean")),
    "chain": Row(C.chain(C.top_k(share=0.5), C.quantize4())),
    "chain-unbiased": Row(C.chain(C.rand_k(share=0.5), C.quantize(bits=3))),
    "per_tensor": Row(C.per_tensor(C.quantize4())),
    "lossless": Row(C.lossless(), packed=True),
    "lossless-rans": Row(C.lossless(C.rotated(C.ternary()), "rans"), packed=True),
    "per_tensor-small": Row(C.per_tensor(C.rand_k(share=0.5), least=20)),
}
PRESETS = {"quantize8", "quantize4", "quantize2", "qsgd", "ternary", "sign", "ef21"}
each = pytest.mark.parametrize("row_", ROWS.values(), ids=ROWS)
loud = {name: row_ for name, row_ in ROWS.items() if not getattr(row_.codec, "silent", False)}
each_loud = pytest.mark.parametrize("row_", loud.values(), ids=loud)  # all but clip with noise (tests/laws/test_privacy.py)
unbiased = {name: row_ for name, row_ in ROWS.items() if row_.codec.unbiased}
each_unbiased = pytest.mark.parametrize("name", unbiased)
quick = settings(max_examples=25, deadline=None)
finite = st.floats(width=32, min_value=-(2.0**99), max_value=2.0**99)
vectors = st.lists(finite, min_size=1, max_size=40).map(lambda values: torch.tensor(values, dtype=torch.float32))
SAMPLES = {
    "gaussian": random.normal(random.key(1), 9),
    "unlike": torch.tensor([10.0, -1.0, 0.1, 0.0, 3.0]),
    "equal": torch.full((4,), -2.0),
    "one": torch.tensor([0.7]),
    "twelve": random.normal(random.key(2), 12) * torch.arange(12),
    "zeros": torch.zeros(6),
}


def layout_of(d: int) -> Layout:
    return Layout(("w",), ((d,),))


MATRICES = Layout(("w", "b", "v"), ((6, 9), (7,), (3, 4, 5)))


def encode(codec: Codec, u: torch.Tensor, key: int = 0, layout: Layout | None = None):
    """-> (payload, tx)."""
    layout = layout or layout_of(u.shape[-1])
    return codec.encode(u, codec.init(layout)[0], random.key(key), layout=layout, knobs={})


def through(codec: Codec, u: torch.Tensor, key: int = 0, layout: Layout | None = None) -> torch.Tensor:
    """C(u), by way of bytes."""
    layout = layout or layout_of(len(u))
    payload, _ = encode(codec, u, key, layout)
    schema = Schema.of(payload)
    arrived = unpack(pack(Frame("update", payload)), {schema.id: schema}).payload
    return codec.decode(arrived, codec.init(layout)[1], layout=layout)[0]


def draws(codec: Codec, u: torch.Tensor, n: int, seed: int = 0) -> torch.Tensor:
    """C(u) for n keys [n, d] float64. On torch alone all keys are one call; the bits are those of the compiled kernels."""
    layout = layout_of(len(u))
    tx, rx = codec.init(layout)

    def one(key):
        payload, _ = codec.encode(u, tx, key, layout=layout, knobs={})
        return codec.decode(payload, rx, layout=layout)[0]

    with kernel.without_library():
        keys = random.fold(random.key(seed), torch.arange(n))
        return torch.cat([torch.vmap(one)(part) for part in keys.split(50_000)]).double()


def spread(d: int, seed: int = 0) -> torch.Tensor:
    """Values of all magnitudes that training meets: 1e-8 to 1e3, both signs."""
    key = random.key(seed)
    return random.normal(key, d) * 10.0 ** (11 * random.uniform(random.fold(key, "scale"), d) - 8)


def test_every_codec_has_a_row():
    assert {type(row_.codec).__name__ for row_ in ROWS.values()} | PRESETS == set(codecs.__all__)


# ------------------------------------------------------------------------------------------------------ any vector


@each
@quick
@given(vectors)
def test_finite_in_finite_out(row_, u):
    got = through(row_.codec, u)
    assert got.shape == u.shape and got.dtype == torch.float32 and torch.isfinite(got).all()
    if not row_.codec.lossy:
        assert equal(got, u)
    omega = row_.codec.omega(len(u))
    if not row_.codec.unbiased and math.isfinite(omega) and u.abs().max() < 6e4:  # not random: it holds for each vector
        error, length = float((got.double() - u.double()).norm()), float(u.double().norm())
        rounding = (2**-22 * length) ** 2  # of float32: one value of two levels is c h with h = u / c
        assert error**2 <= omega * length**2 * (1 + 1e-4) + rounding + 1e-38


@each
@pytest.mark.parametrize(
    "layout", [layout_of(1), layout_of(50), layout_of(300), MATRICES], ids=["1", "50", "300", "matrices"]
)
def test_bytes(row_, layout):
    """Length of the packed body = nbytes, and what message_bits says: exactly, or on average over many keys."""
    sizes = []
    for seed in range(1 if row_.exact else 400):
        payload, _ = encode(row_.codec, spread(layout.d), seed, layout)
        sizes.append(size_of(row_, payload))
        if seed < 3:
            assert len(pack(Frame("update", payload))) - FRAME == sizes[-1]
    said = row_.codec.message_bits(layout.d) / 8
    if layout is MATRICES:
        assert 0 < sum(sizes) / len(sizes) <= 4 * layout.d + 60
    elif row_.packed:
        assert sizes[0] <= said + 1
    elif row_.exact:
        assert abs(sizes[0] - said) <= 1 + 0.02 * said, (sizes[0], said)
    else:
        deviation = torch.tensor(sizes, dtype=torch.float64).std() / len(sizes) ** 0.5
        assert abs(sum(sizes) / len(sizes) - said) <= 4 * deviation + 1


@each
def test_shapes_do_not_depend_on_the_values(row_):
    inputs = [spread(50), torch.zeros(50), torch.ones(50), torch.full((50,), 3e38), -spread(50, seed=1)]
    assert len({Schema.of(encode(row_.codec, u)[0]) for u in inputs}) == 1


@each
@pytest.mark.parametrize("layout", [layout_of(33), MATRICES], ids=["vector", "matrices"])
def test_vmap_is_a_loop(row_, layout):
    m, codec = 5, row_.codec
    us = torch.stack([spread(layout.d, seed=i) for i in range(m)])
    keys = random.fold(random.key(0), torch.arange(m))
    tx, rx = (stack([state] * m) for state in codec.init(layout))
    payloads, tx_new = torch.vmap(lambda u, s, k: codec.encode(u, s, k, layout=layout, knobs={}))(us, tx, keys)
    decoded, rx_new = torch.vmap(lambda p, s: codec.decode(p, s, layout=layout))(payloads, rx)
    sizes = torch.tensor([size_of(row_, row(payloads, i)) for i in range(m)])
    if not row_.packed:
        assert torch.equal(torch.vmap(nbytes)(payloads), sizes)
    same = near if row_.close else equal
    for i in range(m):
        payload, tx_one = codec.encode(us[i], row(tx, i), keys[i], layout=layout, knobs={})
        got, rx_one = codec.decode(payload, row(rx, i), layout=layout)
        assert same(payload, row(payloads, i)) and same({"u": got}, {"u": decoded[i]})
        assert int(sizes[i]) == size_of(row_, payload) == len(pack(Frame("update", row(payloads, i)))) - FRAME
        assert same(tx_one, row(tx_new, i)) and same(rx_one, row(rx_new, i))


def size_of(row_: Row, payload) -> int:
    """Bytes of the packed body."""
    return len(pack(Frame("update", payload))) - FRAME if row_.packed else int(nbytes(payload))


def near(a, b) -> bool:
    """Equal up to the last bits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[name], b[name]) for name in a)
    return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-4 * float(a.double().abs().max() if a.numel() else 0))


@each
def test_encoding_is_pure_and_the_key_decides(row_):
    u = spread(40)
    kept, layout = u.clone(), layout_of(40)
    tx, rx = row_.codec.init(layout)
    state = clone(tx)
    first, second = (row_.codec.encode(u, tx, random.key(3), layout=layout, knobs={}) for _ in range(2))
    assert equal(first[0], second[0]) and equal(first[1], second[1]) and equal(tx, state) and torch.equal(u, kept)
    payload, known = clone(first[0]), clone(rx)
    row_.codec.decode(first[0], rx, layout=layout)
    assert equal(first[0], payload) and equal(rx, known)


@each
def test_the_compiled_kernels_change_no_bit(row_):
    if kernel.library() is None:
        pytest.skip("the kernels were not compiled here")
    for layout in (layout_of(70), MATRICES):
        u = spread(layout.d)
        one = encode(row_.codec, u, layout=layout), through(row_.codec, u, layout=layout)
        with kernel.without_library():
            other = encode(row_.codec, u, layout=layout), through(row_.codec, u, layout=layout)
        assert equal(one[0][0], other[0][0]) and equal(one[0][1], other[0][1]) and equal(one[1], other[1])


@each_loud
@pytest.mark.parametrize(
    "layout", [layout_of(1), layout_of(31), layout_of(64), MATRICES], ids=["1", "31", "64", "matrices"]
)
def test_zeros_stay_zeros(row_, layout):
    assert not through(row_.codec, torch.zeros(layout.d), layout=layout).any()


@each_loud
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_the_server(row_, bad):
    """A client that failed must be seen, whatever the draw."""
    for seed in range(20):
        u = random.normal(random.key(seed), 40)
        u[seed] = bad
        assert not torch.isfinite(through(row_.codec, u, seed)).all()


@each
def test_double_precision_goes_in(row_):
    u = spread(40).double()
    got, single = through(row_.codec, u), through(row_.codec, u.float())
    assert equal(got.float(), single)


@pytest.mark.slow
@each
def test_large_vectors(row_):
    d = 3_000_001
    u = random.normal(random.key(0), d)
    got = through(row_.codec, u)
    error = float((got - u).norm() / u.norm()) ** 2
    assert error <= row_.codec.omega(d) * 1.05 + 1e-6


# --------------------------------------------------------------------------------------------- mean and covariance


@each_unbiased
@pytest.mark.parametrize("sample", [*SAMPLES])
def test_unbiased(name, sample):
    """|z| < 4.5 of every value over 1e5 draws; values that never vary must be right to rounding."""
    codec, u = ROWS[name].codec, SAMPLES[sample]
    n = 20_000 if ROWS[name].close else 100_000
    got = draws(codec, u, n)
    error, deviation = (got.mean(0) - u.double()).abs(), got.std(0) / n**0.5
    assert (error <= 4.5 * deviation + 2e-6 * u.abs().max()).all(), (error / deviation).max()


@each_unbiased
@pytest.mark.parametrize("sample", ["unlike", "twelve"])
def test_error_is_within_omega(name, sample):
    """E|C(u) - u|^2 <= omega |u|^2, with equality where `linear_map` says so; the covariance is the one that is stated."""
    codec, u = ROWS[name].codec, SAMPLES[sample]
    d, n = len(u), 20_000 if ROWS[name].close else 60_000
    got = draws(codec, u, n, seed=1)
    square = ((got - u.double()) ** 2).sum(1)
    found, slack = float(square.mean()), float(4.5 * square.std() / n**0.5)
    limit = codec.omega(d) * float(u.double().square().sum())
    assert found <= limit * (1 + 1e-9) + slack + 1e-9
    linear = codec.linear_map(d) if hasattr(codec, "linear_map") else None
    if linear is not None:
        assert abs(found - limit) <= slack + 1e-6 * limit + 1e-11 * float(u.double().square().sum())
        a, b, c = linear
        v = u.double()
        expected = a * torch.outer(v, v) + b * torch.diag(v**2) + c * v @ v * torch.eye(d, dtype=torch.float64)
        products = got.unsqueeze(2) * got.unsqueeze(1)
        tolerance = 5 * products.std(0) / n**0.5 + 1e-5 * float(expected.abs().max())
        assert ((products.mean(0) - expected).abs() <= tolerance).all()
    if hasattr(codec, "variance"):
        noise = got - got.mean(0)
        covariance = noise.T @ noise / n
        expected = codec.variance(u)
        spread_ = (noise.unsqueeze(2) * noise.unsqueeze(1)).std(0)  # of rare values too small: they may not have come
        spread_ = torch.maximum(spread_, torch.outer(expected, expected).sqrt())
        assert ((covariance - torch.diag(expected)).abs() <= 5 * spread_ / n**0.5 + 1e-6).all()


@pytest.mark.parametrize("d", [2, 5, 33, 400])
@pytest.mark.parametrize("levels", [1, 2, 7])
def test_omega_of_the_quantizer_is_reached(levels, d):
    """The supremum over u, looked for among vectors of one large value and d - 1 equal ones."""
    for norm in ("max", "l2"):
        codec, worst = codecs.quantize(levels=levels, norm=norm), 0.0
        for a in torch.cat([torch.linspace(1e-2, 1, 120), 10 ** torch.linspace(-3, 0, 60)]).tolist():
            for first in (1.0, a):
                u = torch.full((d,), a)
                u[0] = first
                worst = max(worst, float(codec.variance(u).sum() / u.double().square().sum()))
        assert worst <= codec.omega(d) * (1 + 1e-4)
        if norm == "max" or levels <= math.sqrt(d) / 2:
            assert worst >= codec.omega(d) * 0.97


def test_rotation_lowers_the_error_of_unlike_values():
    u = spread(4096)
    plain, turned = (float((through(codec, u) - u).norm()) for codec in (C.quantize4(), C.rotated(C.quantize4())))
    assert turned < 0.7 * plain


# -------------------------------------------------------------------------------------------------- one by one


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_are_what_is_sent(bits):
    payload, _ = encode(C.quantize(bits=bits), spread(8_000))
    sent = 8 * (int(nbytes(payload)) - 5) / 8_000
    assert math.log2(2**bits - 1 if bits > 1 else 2) <= sent <= (bits if bits > 2 else {1: 1.0, 2: 1.6}[bits])
    assert int(payload["codes"].max()) <= int(payload["codes.radix"])


def test_scales():
    """One step a tensor, a channel of it, or a block; each segment is as good as if it were alone."""
    u = random.normal(random.key(0), MATRICES.d)
    for scale, segments in (("tensor", [54, 7, 60]), ("channel", [9] * 6 + [7] + [20] * 3), ("block", [50, 50, 21])):
        codec = C.quantize(bits=8, scale=scale, block=50, rounding="nearest")
        payload, _ = encode(codec, u, layout=MATRICES)
        got = through(codec, u, layout=MATRICES)
        assert payload["steps"].shape == (len(segments),)
        for step, part, decoded in zip(payload["steps"], u.split(segments), got.split(segments), strict=True):
            assert abs(float(step) - float(part.abs().max()) / 127) < 1e-7
            assert float((part - decoded).abs().max()) <= float(step) / 2 * 1.0001


def test_sign_is_the_mean_magnitude_and_the_sign():
    u = torch.tensor([1.0, -3.0, 0.5, -0.5])
    assert torch.allclose(through(C.sign(), u), u.sign() * 1.25)


def test_top_k_takes_the_largest():
    u = torch.tensor([0.1, -5.0, 2.0, 5.0, 0.0, -2.0])
    assert through(C.top_k(k=3), u).tolist() == [0.0, -5.0, 2.0, 5.0, 0.0, 0.0]


@pytest.mark.parametrize(("d", "k"), [(5, 5), (64, 64), (1000, 64), (10_000, 100)])
def test_top_k_sends_no_fewer_than_asked(d, k):
    codec, u = C.top_k(share=0.01, least=64), random.normal(random.key(0), d)
    assert int((through(codec, u) != 0).sum()) == k and codec.omega(d) == pytest.approx(1 - k / d)
    assert torch.equal(through(codec, u), through(C.top_k(k=k), u))


@quick
@given(st.integers(1, 3000), st.floats(0.0005, 1.0), st.integers(0, 100))
def test_places_of_top_k(d, share, seed):
    u = random.normal(random.key(seed), d)
    got = through(C.top_k(share=share), u)
    k = max(1, math.floor(share * d))
    assert int((got != 0).sum()) == k and torch.equal(got[got != 0], u[got != 0])
    assert float(got[got != 0].abs().min()) >= float(u[got == 0].abs().max() if k < d else 0)


def test_places_cost_less_than_their_numbers():
    d = 1_000_000
    payload, _ = encode(C.top_k(share=0.01), random.normal(random.key(0), d))
    places = int(nbytes(payload)) - 4 * 10_000
    entropy = (math.lgamma(d + 1) - math.lgamma(10_001) - math.lgamma(d - 9_999)) / math.log(2)
    assert entropy <= 8 * places <= 1.1 * entropy and 8 * places < 9 * 10_000


@pytest.mark.parametrize("change", ["high", "low", "count", "more"])
def test_payloads_that_make_no_sense(change):
    """What the bytes cannot say wrongly, the codec checks: places that are not there, a count that the seed denies."""
    u, layout = random.normal(random.key(0), 100), layout_of(100)
    codec = C.sparsify(p=0.3) if change in ("count", "more") else C.top_k(share=0.1)
    payload, _ = encode(codec, u)
    if change == "high":
        payload["high"] = ~payload["high"]
    elif change == "low":
        payload["low"] = payload["low"].flip(0) * 0 + 7
        payload["high"] = torch.zeros_like(payload["high"]).index_fill(0, torch.arange(10), True)
    elif change == "count":
        payload["values.count"] = payload["values.count"] - 1
    else:
        payload["values.count"] = payload["values.count"] + 1
    with pytest.raises(WireError):
        codec.decode(payload, {}, layout=layout)


def test_a_lie_about_the_seed_moves_values_but_breaks_nothing():
    payload, _ = encode(C.rand_k(share=0.2), torch.ones(50))
    got, _ = C.rand_k(share=0.2).decode(payload | {"seed": payload["seed"] + 1}, {}, layout=layout_of(50))
    assert int((got != 0).sum()) == 10 and torch.isfinite(got).all()


def test_lowrank_finds_a_matrix_of_low_rank():
    layout = Layout(("w", "b"), ((12, 20), (3,)))
    a, b = random.normal(random.key(0), 12, 2), random.normal(random.key(1), 2, 20)
    u = torch.cat([(a @ b).flatten(), torch.ones(3)])
    codec = C.lowrank(rank=2)
    tx, rx = codec.init(layout)
    for seed in range(3):
        payload, tx = codec.encode(u, tx, random.key(seed), layout=layout, knobs={})
        got, _ = codec.decode(payload, rx, layout=layout)
    assert float((got - u).norm() / u.norm()) < 1e-5
    assert int(nbytes(payload)) == 4 * (2 * 32 + 3)


def test_quantized_factors_cost_bits_and_lose_little():
    """Both have one scale; without a state, three turns find the best approximation of rank 2 of what is near it."""
    layout = Layout(("w", "b"), ((40, 10), (3,)))
    a, b, noise = (
        random.normal(random.key(0), 40, 2),
        random.normal(random.key(1), 2, 10),
        random.normal(random.key(2), 40, 10),
    )
    w, rest = 100 * a @ b + 5 * noise, torch.ones(3)
    best = torch.linalg.svdvals(w)[2:].square().sum().sqrt()
    cold = C.lowrank(rank=2, turns=3, warm=False)
    assert cold.init(layout) == ({}, {})
    payload, state = cold.encode(torch.cat([w.flatten(), rest]), {}, random.key(3), layout=layout, knobs={})
    got, _ = cold.decode(payload, {}, layout=layout)
    assert state == {} and float((got[:400] - w.flatten()).norm()) < 1.01 * float(best)
    p, q = payload["values"][:80].view(40, 2), payload["values"][80:100].view(10, 2)
    assert torch.allclose(p.square().mean(0), q.square().mean(0), rtol=1e-4)
    small = C.chain(cold, C.quantize(bits=8, rounding="nearest", scale="block", block=100))
    payload, _ = small.encode(torch.cat([w.flatten(), rest]), {}, random.key(3), layout=layout, knobs={})
    assert int(nbytes(payload)) == 103 + 2 * 4 + 1
    lost = small.decode(payload, {}, layout=layout)[0][:400] - got[:400]
    assert 0 < float(lost.norm() / got[:400].norm()) < 0.01


def test_lowrank_goes_on_after_a_zero_update():
    layout = Layout(("w",), ((12, 20),))
    codec = C.lowrank(rank=2)
    tx, rx = codec.init(layout)
    _, tx = codec.encode(torch.zeros(240), tx, random.key(0), layout=layout, knobs={})
    u = random.normal(random.key(2), 240)
    payload, tx = codec.encode(u, tx, random.key(1), layout=layout, knobs={})
    assert float(codec.decode(payload, rx, layout=layout)[0].norm()) > 0.1 * float(u.norm())


def test_exact_and_fast_sketch():
    u = random.normal(random.key(3), 512)
    exact, fast = (encode(C.sketch(h=h), u)[0] for h in (64, 65))
    assert "rotation" not in exact and "rotation" in fast
    got = draws(C.sketch(h=65), u, 3_000)
    error, deviation = (got.mean(0) - u.double()).abs(), got.std(0) / 3_000**0.5
    assert (error <= 4.8 * deviation).all()
    square = ((got - u.double()) ** 2).sum(1)
    omega = C.sketch(h=65).omega(512)
    assert abs(float(square.mean()) / float(u.double() @ u.double()) - omega) <= 4 * float(square.std()) / 3_000**0.5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: C.quantize(bits=9), "quantize.bits: 1 to 8; got 9"),
        (lambda: C.quantize(bits=4, levels=3), "bits or levels, not both"),
        (lambda: C.quantize(levels=200), "quantize.levels: 1 to 127; got 200"),
        (lambda: C.quantize(norm="mean"), "stochastic rounding would be biased"),
        (lambda: C.sparsify(p=0.0), "sparsify.p: above 0"),
        (lambda: C.partial(p=1.5), "partial.p"),
        (lambda: C.rand_k(k=0), "rand_k.k: at least 1"),
        (lambda: C.top_k(share=2.0), "top_k.share"),
        (lambda: C.top_k(least=0), "top_k.least: at least 1 value; got 0"),
        (lambda: C.rotated(C.rotated()), "rotated already"),
        (lambda: C.rotated(block=100), "a power of two; got 100"),
        (lambda: C.difference(C.top_k()), "give it for a codec that is biased"),
        (lambda: C.difference(memory="mean"), "the same as aggregator.alpha"),
        (lambda: C.lowrank(rank=0), "lowrank.rank"),
    ],
)
def test_settings_that_make_no_sense(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


@pytest.mark.parametrize(
    ("codec", "says"),
    [
        (C.error_feedback(C.rand_k(share=0.1)), "its error would grow"),
        (C.error_feedback(C.difference()), "keeps state"),
        (C.difference(C.difference()), "keeps state"),
        (C.chain(C.sparsify(), C.quantize4()), "no fixed number"),
        (C.chain(C.quantize4(), C.quantize4()), "no fixed number"),
    ],
)
def test_parts_that_make_no_sense_together(codec, says):
    with pytest.raises(MethodError, match=says):
        codec.init(layout_of(50))


@quick
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
def test_identity_keeps_every_bit(words):
    u = torch.tensor(words, dtype=torch.int32).view(torch.float32)
    assert equal(through(C.identity(), u), u)
    u = torch.tensor(words, dtype=torch.int64).view(torch.float64)
    assert equal(through(C.identity(), u), u)


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
