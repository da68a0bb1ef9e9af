"""What a broadcast pair loses of its clients' factors, without any m x n matrix.

Symbols: as in `factors.py`: (B_i [m, r_i], A_i [r_i, n]), w_i, M = sum w_i B_i A_i, (Bb, Ab), the broadcast pair (P, Q).
Norms are Frobenius. All in float64, by K x K Grams and one K x K decomposition: as dear as the `core` backend, for
records and tests, not for every round of a large cohort.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taciturn.aggregation.factors import Factors, Pair, Weights, factor_mean, leading, procrustes, shares_of, stacked
from taciturn.aggregation.lowrank_svd import product_norm


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The diagnostics of one layer and round; each field is described at the function of its name.

    product: `product_mismatch`; clients: `client_gap`; raw, gauge: `factor_gaps` (nan with unequal ranks); truncation:
    `truncation` at the rank of P; imbalance; entropy_sent, stable_sent: `entropy_rank`, `stable_rank` of P Q;
    entropy_mean, stable_mean: of M.
    """

    product: float
    clients: float
    raw: float
    gauge: float
    truncation: float
    imbalance: float
    entropy_sent: float
    stable_sent: float
    entropy_mean: float
    stable_mean: float


def mismatch(factors: Factors, weights: Weights, pair: Pair, residual: Pair | None = None) -> Mismatch:
    """All diagnostics of a broadcast pair; `residual` is what W0 takes besides, and counts in `product` only."""
    sent, mean = spectrum(*pair), spectrum(*stacked(factors, weights))
    equal = all(b.shape == pair[0].shape for b, _ in factors)
    raw, gauge = factor_gaps(factors, weights, pair) if equal else (float("nan"), float("nan"))
    return Mismatch(
        product=product_mismatch(factors, weights, pair, residual),
        clients=client_gap(factors, weights, pair),
        raw=raw,
        gauge=gauge,
        truncation=truncation(mean, pair[0].shape[1]),
        imbalance=imbalance(pair),
        entropy_sent=entropy_rank(sent),
        stable_sent=stable_rank(sent),
        entropy_mean=entropy_rank(mean),
        stable_mean=stable_rank(mean),
    )


def product_mismatch(factors: Factors, weights: Weights, pair: Pair, residual: Pair | None = None) -> float:
    """||P Q + residual - M|| / ||M||; the plain norm where M = 0."""
    x, y = stacked([(b.double(), a.double()) for b, a in factors], weights)
    parts = [pair] if residual is None else [pair, residual]
    left = torch.cat([x, *(-p.double() for p, _ in parts)], 1)
    right = torch.cat([y, *(q.double() for _, q in parts)])
    size = float(product_norm(x, y))
    return float(product_norm(left, right)) / (size or 1.0)


def client_gap(factors: Factors, weights: Weights, pair: Pair) -> float:
    """sum w_i ||P_i Q_i - B_i A_i||^2, (P_i, Q_i) the first r_i slices: the weak condition. Least for P Q = M."""
    total = 0.0
    for (b, a), w in zip(factors, shares_of(weights, len(factors)), strict=True):
        p, q = leading(pair, b.shape[1])
        total += w * float(product_norm(torch.cat([p, -b], 1), torch.cat([q, a]))) ** 2
    return total


def factor_gaps(factors: Factors, weights: Weights, pair: Pair) -> tuple[float, float]:
    """sum w_i (||P - B_i||^2 + ||Q - A_i||^2), raw and least over (P O, O'Q): the strong condition. Equal ranks.

    One orthogonal O for all clients, the one that fits (Bb, Ab); plain SGD does not see it.
    """
    o = procrustes(pair, factor_mean([(b.double(), a.double()) for b, a in factors], weights))
    p, q = pair[0].double(), pair[1].double()
    raw, gauge = (
        sum(
            w * float((left - b).square().sum() + (right - a).square().sum())
            for (b, a), w in zip(factors, shares_of(weights, len(factors)), strict=True)
        )
        for left, right in ((p, q), (p @ o, o.mT @ q))
    )
    return raw, gauge


def imbalance(pair: Pair) -> float:
    """||P'P - QQ'||: 0 where gradients of both factors have one scale."""
    p, q = pair[0].double(), pair[1].double()
    return float((p.mT @ p - q @ q.mT).norm())


def spectrum(x: Tensor, y: Tensor) -> Tensor:
    """The singular values of X Y, falling: X [m, K], Y [K, n] -> [min(m, n, K)] float64."""
    r1, r2 = torch.linalg.qr(x.double())[1], torch.linalg.qr(y.double().mT)[1]
    values: Tensor = torch.linalg.svdvals(r1 @ r2.mT)
    return values


def truncation(singular: Tensor, rank: int) -> float:
    """||M - [M]_r|| = sqrt sum_{k > r} s_k^2: the least error of any pair of rank r."""
    return float(singular[rank:].norm())


def entropy_rank(singular: Tensor) -> float:
    """exp(- sum p_k log p_k), p_k = s_k / sum s: 1 .. rank; 0 for a zero matrix. Source: Roy & Vetterli 2007."""
    total = singular.sum()
    if not total > 0:
        return 0.0
    p = singular / total
    return float(torch.special.entr(p).sum().exp())


def stable_rank(singular: Tensor) -> float:
    """sum s_k^2 / s_1^2: 1 .. rank; 0 for a zero matrix."""
    first = float(singular[0])
    return float((singular / first).square().sum()) if first > 0 else 0.0
