"""The AMS sketch: its hashes and sums by a plain loop, linear, and an honest estimate of the squared norm.

Symbols: d values; m rows; b columns; F [6, m] coefficients; sk [.., m, b].
"""

from __future__ import annotations

import pytest
import torch

from taciturn.core import eager, kernel, random
from taciturn.core.errors import ConfigError
from taciturn.core.state import equal
from taciturn.sync import sketch as ams

P = 2**31 - 1
SHAPES = [(1, 1), (2, 7), (3, 500), (5, 250), (3, 32768)]
SEEDS = 60


def fold(r: int) -> int:
    return (r ^ (r >> 31)) & P


def place(f: list[int], i: int, b: int) -> tuple[int, int]:
    """(bucket, sign) of position i under the six coefficients of a row."""
    sign = 2 * (fold(fold(fold(f[2] * i + f[3]) * i + f[4]) * i + f[5]) >> 15 & 1) - 1
    return fold(f[0] * i + f[1]) % b, sign


def read(table: torch.Tensor) -> list[list[tuple[int, int]]]:
    return [[(entry & 0x7FFF, -1 if entry < 0 else 1) for entry in row] for row in table.tolist()]


def gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return random.normal(random.key(seed), *shape)


def heavy(d: int) -> torch.Tensor:
    """Gaussian with a log-normal scale: kurtosis 3 e^4 = 164."""
    return gauss(d) * gauss(d, seed=1).exp()


@pytest.mark.parametrize("m, b", SHAPES)
def test_table_and_sketch_are_those_of_a_plain_loop(m, b):
    d = 300
    u, f = gauss(d), ams.coefficients(3, m)
    places = [[place(row, i, b) for i in range(d)] for row in f.T.tolist()]
    table = ams.table(3, d, m, b)
    assert read(table) == places
    sums = [[0.0] * b for _ in range(m)]
    for i, value in enumerate(u.tolist()):
        for j in range(m):
            bucket, sign = places[j][i]
            sums[j][bucket] += sign * value
    assert equal(ams.sketch(u, table, b), torch.tensor(sums, dtype=torch.float64).float())


@pytest.mark.parametrize("first", [0, 2**16 - 20, 2**30, 2**31 - 40])
@pytest.mark.parametrize("native", [True, False])
def test_hashes_are_exact_up_to_the_last_position(first, native):
    f = torch.cat([ams.coefficients(0, 3), torch.full((6, 1), P - 1), torch.zeros(6, 1, dtype=torch.int64)], 1)
    make = kernel.ams_table if native else eager.ams_table
    for b in (1, 2, 499, 500, 32768):
        assert read(make(f, first, 40, b)) == [[place(row, first + i, b) for i in range(40)] for row in f.T.tolist()]


def test_a_table_hashed_in_parts_is_the_same_table():
    f, whole = ams.coefficients(0, 3), ams.table(0, 1000, 3, 500)
    parts = [kernel.ams_table(f, at, min(300, 1000 - at), 500) for at in range(0, 1000, 300)]
    assert equal(torch.cat(parts, -1), whole)


def test_coefficients_are_in_their_range_and_rows_do_not_depend_on_their_number():
    f = ams.coefficients(0, 2000)
    assert f.shape == (6, 2000) and f.dtype == torch.int64 and int(f.min()) >= 0 and int(f.max()) < P
    assert abs(float(f.double().mean()) / P - 0.5) < 0.02 and len(f.unique()) > 11_990
    assert equal(ams.coefficients(0, 3), f[:, :3])


def test_same_seed_same_bytes_and_another_seed_another_sketch():
    u = gauss(5000)
    one = ams.table(7, 5000, 3, 500)
    assert ams.table(7, 5000, 3, 500) is one, "kept"
    first = ams.sketch(u, one, 500)
    ams.table.cache_clear()
    assert equal(ams.table(7, 5000, 3, 500), one) and equal(ams.sketch(u, ams.table(7, 5000, 3, 500), 500), first)
    other = ams.table(8, 5000, 3, 500)
    assert float((other == one).double().mean()) < 0.01 and not equal(ams.sketch(u, other, 500), first)
    with kernel.without_library():
        ams.table.cache_clear()
        assert equal(ams.table(7, 5000, 3, 500), one) and equal(ams.sketch(u, one, 500), first), "on every engine"
    assert len({ams.table(seed, 100, 1, 500).numpy().tobytes() for seed in range(50)}) == 50


def test_linear():
    d = 20_000
    table, u, v = ams.table(0, d, 3, 500), gauss(d), heavy(d)
    sk_u, sk_v = ams.sketch(u, table, 500), ams.sketch(v, table, 500)
    mixed = ams.sketch(2.5 * u - 0.3 * v, table, 500)
    assert float((mixed - (2.5 * sk_u - 0.3 * sk_v)).abs().max()) < 1e-5 * float(mixed.abs().max())
    assert equal(ams.sketch(-4 * u, table, 500), -4 * sk_u), "powers of two and signs change no bit"


def test_mean_of_the_clients_sketches_is_the_sketch_of_their_mean():
    us, table = gauss(8, 10_000) * torch.logspace(-3, 2, 8)[:, None], ams.table(0, 10_000, 5, 250)
    of_mean, mean = ams.sketch(us.mean(0), table, 250), ams.sketch(us, table, 250).mean(0)
    assert float((of_mean - mean).abs().max()) < 1e-5 * float(of_mean.abs().max())
    foreign = torch.stack([ams.sketch(u, ams.table(k, 10_000, 5, 250), 250) for k, u in enumerate(us)]).mean(0)
    assert float((of_mean - foreign).abs().max()) > 0.1 * float(of_mean.abs().max()), "with seeds of their own they are not"


@pytest.mark.parametrize("native", [True, False])
def test_vmap_is_a_loop_over_one_table(native, monkeypatch):
    if native and kernel.library() is None:
        pytest.skip("the kernels were not compiled here")
    us, table = gauss(4, 700), ams.table(0, 700, 3, 50)
    one = torch.stack([ams.sketch(u, table, 50) for u in us])

    def run():
        assert equal(torch.vmap(lambda u: ams.sketch(u, table, 50))(us), one)
        assert equal(torch.vmap(lambda u: ams.sketch(u, table, 50), in_dims=1)(us.T), one)
        nested = torch.vmap(torch.vmap(lambda u: ams.sketch(u, table, 50)))(us.view(2, 2, 700))
        assert equal(nested.flatten(0, 1), one) and equal(ams.sketch(us.view(2, 2, 700), table, 50), nested)
        assert equal(torch.vmap(ams.energy)(one), ams.energy(one))
        tables = torch.stack([ams.table(seed, 700, 3, 50) for seed in range(4)])
        each = torch.stack([ams.sketch(u, t, 50) for u, t in zip(us, tables, strict=True)])
        assert equal(torch.vmap(lambda u, t: ams.sketch(u, t, 50))(us, tables), each)
        assert equal(torch.vmap(lambda t: ams.sketch(us[0], t, 50))(tables)[2], ams.sketch(us[0], tables[2], 50))

    if native:
        return run()
    with kernel.without_library():
        run()
        seen = []
        inner = eager.ams
        monkeypatch.setattr(eager, "ams", lambda u, t, b: seen.append((len(u), t.data_ptr(), t.shape)) or inner(u, t, b))
        torch.vmap(lambda u: ams.sketch(u, table, 50))(us)
        assert seen == [(4, table.data_ptr(), table.shape)], "one call, and no copy of the table"


@pytest.mark.parametrize("kind", ["Gauss", "heavy tails"])
def test_energy_estimates_the_squared_norm(kind):
    d = 20_000
    v = gauss(d) if kind == "Gauss" else heavy(d)
    true = float(v.double().square().sum())
    sk = torch.stack([ams.sketch(v, ams.table(seed, d, 3, 500), 500) for seed in range(SEEDS)])
    rows, estimate = sk.double().square().sum(-1) / true - 1, ams.energy(sk) / true - 1
    assert abs(float(rows.mean())) < 0.015 and 0.85 < float(rows.std()) / (2 / 500) ** 0.5 < 1.15
    assert abs(float(estimate.mean())) < 0.02 and 0.03 < float(estimate.std()) < 0.055


def test_energy_is_the_lower_median_in_float64():
    sk = torch.tensor([[[3.0, 0.0], [1.0, 1.0], [5.0, 0.0], [0.0, 2.0]], [[1e30, 0.0]] * 4])
    assert ams.energy(sk).tolist() == [4.0, float(torch.tensor(1e30)) ** 2] and ams.energy(sk).dtype == torch.float64
    assert float(ams.energy(sk[0, :3])) == 9.0 and ams.energy(sk[0]).shape == ()


def test_what_is_not_finite_propagates():
    table = ams.table(0, 100, 3, 5)
    for bad in (float("nan"), float("inf")):
        sk = ams.sketch(gauss(100).index_fill(0, torch.tensor([17]), bad), table, 5)
        assert (~torch.isfinite(sk)).sum(-1).tolist() == [1, 1, 1] and not torch.isfinite(ams.energy(sk))


def test_nothing_to_sketch():
    assert equal(ams.sketch(torch.zeros(2, 0), ams.table(0, 0, 3, 5), 5), torch.zeros(2, 3, 5))
    assert ams.sketch(torch.zeros(0, 9), ams.table(0, 9, 3, 5), 5).shape == (0, 3, 5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ams.coefficients(0, 0), "rows: at least 1; got 0"),
        (lambda: ams.table(0, 5, 0, 3), "rows: at least 1; got 0"),
        (lambda: ams.table(0, 5, 3, 0), "columns: 1 to 32768; got 0"),
        (lambda: ams.table(0, 5, 3, 32769), "columns: 1 to 32768; got 32769"),
        (lambda: ams.table(0, 2**31, 1, 5), "up to 2,147,483,647 values; got 2,147,483,648"),
        (lambda: ams.table(0, -1, 1, 5), "got -1"),
        (
            lambda: ams.sketch(torch.zeros(6), ams.table(0, 5, 3, 4), 4),
            r"u \[6\] torch.float32, table \[3, 5\] torch.int16; wanted",
        ),
        (lambda: ams.sketch(torch.zeros(5).double(), ams.table(0, 5, 3, 4), 4), "float64"),
        (lambda: ams.sketch(torch.zeros(5), torch.zeros(3, 5), 4), r"table \[3, 5\] torch.float32"),
        (lambda: ams.sketch(torch.zeros(5), ams.table(0, 5, 3, 4), 0), "columns"),
    ],
)
def test_errors_say_what_is_allowed(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
