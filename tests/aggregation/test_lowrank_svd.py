"""Three ways to the leading singular triplets of X Y. Symbols: X [m, K], Y [K, n], s_k; r the rank asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aggregation.layers import KEY, best
from taciturn.aggregation import lowrank_svd
from taciturn.aggregation.lowrank_svd import core, product_norm, rsvd, triplets
from taciturn.core import random


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(random.normal(random.key(seed), rows, columns).double())[0]


def with_spectrum(s: Tensor, m: int = 60, n: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """X [m, K], Y [K, n] in a random gauge, X Y of singular values s [K]."""
    gauge = orthonormal(len(s), len(s), seed + 2) * (1 + torch.arange(len(s)) / len(s))
    x, y = orthonormal(m, len(s), seed) * s.sqrt(), s.sqrt().unsqueeze(1) * orthonormal(n, len(s), seed + 1).mT
    return x @ gauge, torch.linalg.inv(gauge) @ y


def tail(*leading: float, of: float, count: int = 30) -> Tensor:
    return torch.cat([torch.tensor(leading).double(), torch.full((count - len(leading),), of).double()])


def distance(found, want: Tensor) -> float:
    return float(((found.u.double() * found.s) @ found.vt.double() - want).norm() / want.norm())


SPECTRA = {
    "a gap": (tail(3.0, 2.0, 1.5, 1.0, of=0.01), 4),
    "few directions": (torch.tensor([2.0, 1.0, 0.5]).double(), 4),
    "as many as columns": (tail(3.0, 2.0, 1.0, 0.5, of=0.1, count=6), 4),
    "wide leading part": (tail(1.0, 1e-1, 1e-2, 1e-3, of=1e-6), 4),
    "flat": (tail(3.0, 2.0, 1.0, of=0.98), 3),
    "a long tail behind a gap": (tail(1.0, 1.0, 1.0, of=0.6), 3),
    "slow decay": (0.85 ** torch.arange(30).double(), 5),
    "equal values": (tail(1.0, 1.0, 1.0, 1.0, of=0.0), 4),
    "rank 1": (tail(3.0, of=0.1), 1),
}


@pytest.mark.parametrize("backend", ["core", "gram", "rsvd"])
@pytest.mark.parametrize("name", SPECTRA)
def test_dense(name, backend):
    """Law 6: the dense SVD on 60 x 40, in both precisions."""
    s, r = SPECTRA[name]
    x, y = with_spectrum(s)
    want = best(x @ y, r)
    loose = 2e-4 if backend == "rsvd" and name in ("slow decay", "a long tail behind a gap") else 0.0
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-5)):
        found = triplets(x.to(dtype), y.to(dtype), r, KEY, backend)
        assert found.u.shape == (60, r) and found.vt.shape == (r, 40) and found.u.dtype == found.vt.dtype == dtype
        assert distance(found, want) < max(tolerance, loose)
        live = int((found.s > 1e-5 * found.s[0]).sum())
        assert live == min(r, int((s > 1e-5).sum()))
        torch.testing.assert_close(found.s[:live], torch.linalg.svdvals(x @ y)[:live], rtol=1e-4, atol=1e-6)
        for columns in (found.u[:, :live].double(), found.vt[:live].mT.double()):
            assert (columns.mT @ columns - torch.eye(live)).norm() < (2e-3 if dtype == torch.float32 else 1e-7)
        largest = found.u.gather(0, found.u.abs().argmax(0, keepdim=True))
        assert (largest[0, :live] > 0).all()


@pytest.mark.parametrize("shape", [(60, 40, 100), (12, 40, 30), (40, 12, 30), (9, 9, 40)])
@pytest.mark.parametrize("backend", ["core", "gram", "rsvd"])
def test_more_columns_than_the_matrix_has(shape, backend):
    """K above m, n or both."""
    m, n, k = shape
    x, y = random.normal(random.key(1), m, k).double(), random.normal(random.key(2), k, n).double()
    found = triplets(x, y, 4, KEY, backend)
    want = best(x @ y, 4)
    assert ((x @ y) - (found.u * found.s) @ found.vt).norm() < (1 + 1e-4) * ((x @ y) - want).norm()


def test_rsvd_knows_when_it_may_not_be_trusted(monkeypatch):
    """It turns to core where the spectrum is flat at r, or its turns do not come to rest; not where s_r is rounding."""
    asked, to_core = [], ("few directions", "as many as columns", "flat", "a long tail behind a gap")
    monkeypatch.setattr(lowrank_svd, "core", lambda *of: asked.append(of) or core(*of))
    for name, (s, r) in SPECTRA.items():
        asked.clear()
        x, y = with_spectrum(s)
        rsvd(x.float(), y.float(), r, KEY)
        assert bool(asked) == (name in to_core), name
    asked.clear()
    x, y = with_spectrum(tail(1.0, 0.5, of=1e-9))
    rsvd(x.float(), y.float(), 4, KEY)
    assert not asked


def test_zero():
    for backend in ("core", "gram", "rsvd"):
        found = triplets(torch.zeros(60, 20), torch.zeros(20, 40), 4, KEY, backend)
        assert found.s.abs().max() == 0 and torch.isfinite(found.u).all() and torch.isfinite(found.vt).all()


@settings(max_examples=40)
@given(m=st.integers(1, 20), n=st.integers(1, 20), k=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_product_norm(m, n, k, seed):
    key = random.key(seed)
    x = random.normal(random.fold(key, "x"), m, k).double()
    y = random.normal(random.fold(key, "y"), k, n).double()
    torch.testing.assert_close(product_norm(x, y), (x @ y).norm(), rtol=1e-5, atol=1e-12)
    nothing = product_norm(torch.cat([x, -x], 1), torch.cat([y, y]))
    assert nothing <= 1e-13 * x.norm() * y.norm()
    assert product_norm(x[:, :0], y[:0]) == 0
