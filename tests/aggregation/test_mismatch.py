"""The diagnostics equal their dense definitions. Symbols: B_i [m, r_i], A_i [r_i, n], w_i, M, (P, Q)."""

from __future__ import annotations

import math

import pytest
import torch

from aggregation.layers import KEY, best, cohort, dense, product, weights
from taciturn.aggregation import factors as lora
from taciturn.aggregation import mismatch as loss
from taciturn.core import random


@pytest.mark.parametrize("ranks", [(4,) * 6, (4, 2, 5, 1)], ids=["equal", "unequal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dense_definitions(ranks, dtype):
    f, w = cohort(ranks=ranks, eps=0.5, dtype=dtype), weights(len(ranks))
    p, q = lora.product_svd(f, w, KEY)
    found, m = loss.mismatch(f, w, (p, q)), product(f, w)
    assert found.product == pytest.approx(float((dense((p, q)) - m).norm() / m.norm()), rel=1e-6)
    gaps = [
        v * (dense(lora.leading((p, q), b.shape[1])) - dense((b, a))).norm() ** 2 for (b, a), v in zip(f, w, strict=True)
    ]
    assert found.clients == pytest.approx(float(sum(gaps)), rel=1e-6)
    assert found.truncation == pytest.approx(float((m - best(m, max(ranks))).norm()), rel=1e-6)
    assert found.imbalance < 1e-5
    for matrix, entropy, stable in ((dense((p, q)), found.entropy_sent, found.stable_sent),
                                    (m, found.entropy_mean, found.stable_mean)):  # fmt: skip
        s = torch.linalg.svdvals(matrix)
        share = s / s.sum()
        assert entropy == pytest.approx(float(torch.exp(-(share * share.clamp(min=1e-300).log()).sum())), rel=1e-4)
        assert stable == pytest.approx(float((matrix.norm() / s[0]) ** 2), rel=1e-6)
    if len(set(ranks)) > 1:
        assert math.isnan(found.raw) and math.isnan(found.gauge)
    else:
        raw = [v * ((p - b).double().norm() ** 2 + (q - a).double().norm() ** 2) for (b, a), v in zip(f, w, strict=True)]
        assert found.raw == pytest.approx(float(sum(raw)), rel=1e-5) and found.gauge < found.raw


def test_the_gauge_is_the_best_of_all_and_does_not_see_a_rotation():
    f, w = cohort(eps=0.3), weights(6)
    pair = lora.factor_mean(f, w)
    least = loss.factor_gaps(f, w, pair)
    assert least[0] == pytest.approx(least[1])  # the mean is where it should be
    for seed in range(4):
        o = torch.linalg.qr(random.normal(random.key(seed), 4, 4).double())[0]
        raw, gauge = loss.factor_gaps(f, w, (pair[0] @ o, o.mT @ pair[1]))
        assert gauge == pytest.approx(least[1]) and raw > gauge


def test_weak_gap_is_least_at_the_mean_product():
    """sum w_i ||P Q - B_i A_i||^2 = its least value + ||P Q - M||^2."""
    f, w = cohort(eps=0.5), weights(6)
    least = sum(v * (dense(pair) - product(f, w)).norm() ** 2 for pair, v in zip(f, w, strict=True))
    for pair in (lora.factor_mean(f, w), lora.tangent(f, w), f[0]):
        off = (dense(pair) - product(f, w)).norm() ** 2
        assert loss.client_gap(f, w, pair) == pytest.approx(float(least + off), rel=1e-9)


def test_ranks_of_known_spectra():
    for values, entropy, stable in (([2.0] * 5, 5, 5), ([3.0, 0, 0], 1, 1), ([0.0, 0.0], 0, 0)):
        s = torch.tensor(values).double()
        assert loss.entropy_rank(s) == pytest.approx(entropy) and loss.stable_rank(s) == pytest.approx(stable)
    zero = (torch.zeros(6, 2), torch.ones(2, 5))
    assert loss.product_mismatch([zero], [1.0], zero) == 0 and loss.mismatch([zero], [1.0], zero).entropy_mean == 0
    assert loss.imbalance(zero) == pytest.approx(10.0)
