"""The linear algebra of federated LoRA: many factor pairs of one layer become one pair, and perhaps a residual.

Symbols: B_i [m, r_i], A_i [r_i, n] factors of client i, alpha_i / r_i already folded into B_i; w_i weights that sum to 1;
Bb, Ab the means of B_i, A_i; M = sum w_i B_i A_i [m, n] and R = M - Bb Ab, never formed; X = [w_1 B_1 .. w_N B_N] [m, K],
Y = [A_1; ..; A_N] [K, n], K = sum r_i, so M = X Y; (P [m, r], Q [r, n]) the pair sent to all; ' is transpose.

Every method is a pure function of `factors` (B_1, A_1), .., `weights` w and, where it draws, a key. A pair or a residual is
(left [m, k], right [k, n]) of the dtype of the factors, float32 or float64; means, Grams and small decompositions are in
float64. Three methods have no function of their own: `ffa` is `mean_of` the B_i (A frozen and common), `rolora` is
`mean_of` the factors that were trained this round, `fedsa` is `mean_of` the A_i (B_i stays on its client).
Errors: ConfigError for weights that do not sum to 1, no clients, shapes that disagree, unequal ranks where a method
needs equal ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from taciturn.aggregation.lowrank_svd import DEAD, Backend, Triplets, core, product_norm, triplets
from taciturn.core import random
from taciturn.core.errors import require, unknown
from taciturn.core.random import Key

Pair = tuple[Tensor, Tensor]
Factors = Sequence[Pair]
Weights = Sequence[float] | Tensor
Split = Literal["balanced", "left"]
_FLOOR = 1e-24  # added to a Gram: factors below 1e-12 count as zero


def shares_of(weights: Weights, clients: int) -> list[float]:
    """w [N], not below 0 and of sum 1 -> the same in float64, of sum 1 to the last bit but one."""
    w = torch.as_tensor(weights, dtype=torch.float64).cpu()
    require(clients >= 1, "lora: factors of at least one client; got none")
    require(tuple(w.shape) == (clients,), f"lora: one weight a client, {clients}; got {list(w.shape)}")
    total = float(w.sum())
    require(bool((w >= 0).all()) and abs(total - 1) < 1e-4, f"lora: weights >= 0 that sum to 1; got a sum of {total:.6g}")
    return [float(value) for value in w / total]


def mean_of(tensors: Sequence[Tensor], weights: Weights) -> Tensor:
    """sum w_i T_i of tensors of one shape: `ffa` (B_i), `rolora` (B_i or A_i), `fedsa` (A_i), `fed_sb` (R_i [r, r])."""
    return _mean(tensors, weights).to(tensors[0].dtype)


def fed_sb(cores: Sequence[Tensor], weights: Weights) -> Tensor:
    """sum w_i R_i [r, r] for W = W0 + B R_i A with B and A fixed and common: exact. Source: Fed-SB, LoRA-SB."""
    return mean_of(cores, weights)


def leading(pair: Pair, rank: int) -> Pair:
    """The first r_i columns of P and rows of Q: what a client of rank r_i gets where ranks are unequal."""
    return pair[0][:, :rank], pair[1][:rank]


def factor_mean(factors: Factors, weights: Weights) -> Pair:
    """P = Bb, Q = Ab. Equal ranks. P Q - M = - sum w_i (B_i - Bb)(A_i - Ab). Source: FedAvg on factors, FedIT."""
    _equal_ranks(factors, "factor_mean")
    left, right = zip(*factors, strict=True)
    return mean_of(left, weights), mean_of(right, weights)


def factor_mean_rebalanced(factors: Factors, weights: Weights, key: Key) -> Pair:
    """The product of `factor_mean` in balanced factors: SVD(Bb Ab) = U S V', P = U S^1/2, Q = S^1/2 V'.

    QR of Bb and of Ab', then an r x r SVD: O((m + n) r^2). Equal ranks. Dead directions: as in `product_svd`.
    """
    left, right = factor_mean(factors, weights)
    return split_of(triplets(left, right, left.shape[1], key, "core"), "balanced", key)


def product_svd(
    factors: Factors,
    weights: Weights,
    key: Key,
    *,
    rank: int | None = None,
    backend: Backend = "rsvd",
    split: Split = "balanced",
    align: bool = False,
) -> Pair:
    """P Q = [M]_r, the best approximation of rank r, by default the largest r_i. Unequal ranks: send `leading(.., r_i)`.

    split "balanced": P = U S^1/2, Q = S^1/2 V', so P'P = QQ' = S; "left", an ablation that is fragile under SGD: P = U S,
    Q = V'. A direction with s_k <= 1e-5 s_1 is dead: P's column is 0 and Q's row is drawn afresh, for S^1/2 would turn
    1e-8 into 1e-4. align (equal ranks): `aligned` with (Bb, Ab). The pair is in another gauge than the factors: reset or
    rotate the clients' optimizer states. With `residual_of`: product_svd_residual. Source: FlexLoRA, Bai et al. 2024.
    """
    x, y = stacked(factors, weights)
    rank = max(b.shape[1] for b, _ in factors) if rank is None else rank
    pair = split_of(triplets(x, y, rank, key, backend), split, key)
    return aligned(pair, factor_mean(factors, weights)) if align else pair


def split_of(found: Triplets, split: Split, key: Key) -> Pair:
    """U, S, V' -> (P, Q), with directions s_k <= 1e-5 s_1 dead: zeros in P, and in Q rows afresh.

    A fresh row is orthogonal to the rows before it; its norm is 3^-1/2, that of the usual start of LoRA, or 1 ("left").
    """
    if split not in get_args(Split):
        raise unknown("split", split, get_args(Split), "lora")
    live = int((found.s > DEAD * found.s[0]).sum())
    s = torch.where(found.s > DEAD * found.s[0], found.s, 0.0)
    p = (found.u * (s.sqrt() if split == "balanced" else s)).to(found.u)
    q = (found.vt * (s.sqrt() if split == "balanced" else torch.ones_like(s)).unsqueeze(1)).to(found.u)
    if live < len(s):
        rows = random.normal(random.fold(key, "rows"), *found.vt.shape)[live:].to(found.vt.device, torch.float64)
        known = found.vt[:live].double()
        basis, r = torch.linalg.qr((rows - (rows @ known.mT) @ known).mT)
        fresh = (basis * r.diagonal().sign()).mT * (3**-0.5 if split == "balanced" else 1.0)
        q = torch.cat([q[:live], fresh.to(q)])
    return p, q


def aligned(pair: Pair, target: Pair) -> Pair:
    """(P O, O'Q) with the orthogonal O that brings it closest to (Bb, Ab): SVD(P'Bb + Q Ab') = U S V', O = U V'.

    P Q stays as it is, and so does plain SGD from there.
    """
    o = procrustes(pair, target)
    return (pair[0].double() @ o).to(pair[0]), (o.mT @ pair[1].double()).to(pair[1])


def procrustes(pair: Pair, target: Pair) -> Tensor:
    """O [r, r] float64 = argmin ||P O - Bb||^2 + ||O'Q - Ab||^2 over orthogonal matrices."""
    (p, q), (b, a) = pair, target
    require(
        p.shape == b.shape and q.shape == a.shape,
        f"lora: pairs of one shape to align; got {list(p.shape)}, {list(q.shape)} and {list(b.shape)}, {list(a.shape)}",
    )
    u, _, vt = torch.linalg.svd(p.double().mT @ b.double() + q.double() @ a.double().mT)
    o: Tensor = u @ vt
    return o


def stacked(factors: Factors, weights: Weights) -> Pair:
    """X [m, K], Y [K, n] with X Y = M; w_i in X only. Any ranks."""
    _check(factors, "stacked")
    shares = shares_of(weights, len(factors))
    x = torch.cat([b for b, _ in factors], 1)
    widths = torch.tensor([b.shape[1] for b, _ in factors])
    x.mul_(torch.tensor(shares, dtype=x.dtype).repeat_interleave(widths).to(x.device))
    return x, torch.cat([a for _, a in factors])


def flora(factors: Factors, weights: Weights) -> Pair:
    """The residual [w_1 B_1 .. w_N B_N], [A_1; ..; A_N] that all merge into W0, to restart from B = 0 and random A.

    Exact, any ranks; the rank of W - W0 grows by up to K a round. Source: FLoRA, Wang et al. 2024.
    """
    return stacked(factors, weights)


def restart(factors: Factors, rank: int, key: Key) -> Pair:
    """B = 0 [m, r], and A [r, n] of variance 1 / (3 n) from the key, as LoRA starts."""
    b, a = factors[0]
    fresh = random.normal(key, rank, a.shape[1]) * (3 * a.shape[1]) ** -0.5
    return b.new_zeros(len(b), rank), fresh.to(a)


def residual_of(factors: Factors, weights: Weights, pair: Pair) -> Pair:
    """[X, -P] [m, K + r], [Y; Q]: what P Q lacks of M, for W0. With (Bb, Ab) `fedex`, with `product_svd` its residual."""
    x, y = stacked(factors, weights)
    return torch.cat([x, -pair[0]], 1), torch.cat([y, pair[1]])


def fedex(factors: Factors, weights: Weights, form: Literal["full", "short"] = "full") -> tuple[Pair, Pair]:
    """(Bb, Ab) and R as factors, for W0: exact. Equal ranks. Source: FedEx-LoRA, Singhal et al. 2025.

    form "full": [X, -Bb], [Y; Ab] of rank (N + 1) r; "short": (N - 1) r, as in `spread`.
    """
    pair = factor_mean(factors, weights)
    if form not in ("full", "short"):
        raise unknown("form", form, ("full", "short"), "lora.fedex")
    return pair, residual_of(factors, weights, pair) if form == "full" else spread(factors, weights)


def spread(factors: Factors, weights: Weights) -> Pair:
    """R = sum_{i<N} w_i (B_i - Bb)(A_i - A_N) as factors [m, (N - 1) r], [(N - 1) r, n]: sum w_i (B_i - Bb) = 0."""
    _equal_ranks(factors, "spread")
    shares, mean = shares_of(weights, len(factors)), _mean([b for b, _ in factors], weights)
    last = factors[-1][1]
    rest = list(zip(factors[:-1], shares, strict=False))
    left = [((b - mean) * w).to(b) for (b, _), w in rest]  # b - mean in float64
    right = [a - last for (_, a), _ in rest]
    if not rest:
        return factors[0][0][:, :0], last[:0]
    return torch.cat(left, 1), torch.cat(right)


def fedex_trunc(factors: Factors, weights: Weights, rank: int) -> tuple[Pair, Pair]:
    """(Bb, Ab) and the best approximation of R of rank r', in balanced factors [m, r'], [r', n]. Equal ranks.

    Zeros where R has fewer directions. The error is the tail of R.
    """
    pair, (x, y) = factor_mean(factors, weights), spread(factors, weights)
    require(rank >= 1, f"lora.fedex_trunc: rank at least 1; got {rank}")
    if not x.shape[1]:
        return pair, (pair[0].new_zeros(len(x), rank), pair[1].new_zeros(rank, y.shape[1]))
    found = core(x, y, rank)
    half = found.s.sqrt()
    return pair, ((found.u * half).to(x), (half.unsqueeze(1) * found.vt).to(y))


def tangent(factors: Factors, weights: Weights, ridge: float = 1e-6) -> Pair:
    """P = Bb + R Ap - Bb H / 2, Q = Ab + Bp R - H Ab / 2, H = Bp R Ap: the gauge of the mean, the product of the SVD.

    Ap = Ab' (Ab Ab')^-1, Bp = (Bb' Bb)^-1 Bb'. P Q = Bb Ab + (R projected on the tangent space of the matrices of rank r
    at Bb Ab) + O(||R||^2), so it is for ||R|| well below s_r(Bb Ab). Ridge: times the mean diagonal, in both inverses,
    and 1e-24, so that Bb = 0 gives P = R Ap and Q = Ab. Equal ranks. No SVD. R is taken from deviations (`spread`): as
    M Ap - Bb it would hold only for Ab Ap = I, which a ridge breaks.
    """
    left, right = spread(factors, weights)
    means = [_mean(tensors, weights) for tensors in zip(*factors, strict=True)]
    b, a = means
    ap = torch.linalg.solve(_ridged(a @ a.mT, ridge), a).mT
    bp = torch.linalg.solve(_ridged(b.mT @ b, ridge), b.mT)
    r_ap = (left @ (right @ ap.to(right))).double()
    bp_r = ((bp.to(left) @ left) @ right).double()
    h = bp @ r_ap
    return (b + r_ap - 0.5 * b @ h).to(left), (a + bp_r - 0.5 * h @ a).to(right)


def lora_fair_style(factors: Factors, weights: Weights, lam: float = 0.01) -> Pair:
    """Q = Ab, P = Bb + R Ab' (Ab Ab' + lam I)^-1, the minimizer of ||M - P Ab||^2 + lam ||P - Bb||^2. Equal ranks.

    Source: after LoRA-FAIR, Bian et al. 2024. Departure: a squared norm where the paper has a cosine-like distance.
    """
    require(lam >= 0, f"lora_fair_style.lam: at least 0; got {lam}")
    left, right = spread(factors, weights)
    b, a = (_mean(tensors, weights) for tensors in zip(*factors, strict=True))
    r_a = (left @ (right @ a.mT.to(right))).double()
    gram = a @ a.mT
    gram.diagonal().add_(lam + _FLOOR)
    return (b + torch.linalg.solve(gram, r_a.mT).mT).to(left), a.to(right)


def hetlora_style(factors: Factors, weights: Weights, sparsity: bool = True) -> Pair:
    """The mean of factors padded with zeros to the largest rank; client i takes `leading(.., r_i)`. Any ranks.

    sparsity: weights ~ w_i ||B_i A_i||, by r x r Grams; else w_i. Padding shrinks slice j to the share of the clients that
    own it. Source: after HetLoRA, Cho et al. 2024. Departure: w_i takes part, so who does not count has no say.
    """
    _check(factors, "hetlora_style")
    shares = shares_of(weights, len(factors))
    if sparsity:
        norms = [w * float(product_norm(b, a)) for (b, a), w in zip(factors, shares, strict=True)]
        shares = [value / sum(norms) for value in norms] if sum(norms) > 0 else shares
    p, q, _ = _padded(factors, shares)
    return p.to(factors[0][0]), q.to(factors[0][1])


def rbla(factors: Factors, weights: Weights) -> Pair:
    """Column j of B and row j of A, averaged over the clients that own it; client i takes `leading(.., r_i)`. Any ranks.

    With equal ranks `factor_mean`. A slice whose owners weigh nothing is zero. Source: RBLA, Chen et al. 2024.
    """
    _check(factors, "rbla")
    p, q, owned = _padded(factors, shares_of(weights, len(factors)))
    owned = torch.where(owned > 0, owned, 1.0)
    return (p / owned).to(factors[0][0]), (q / owned.unsqueeze(1)).to(factors[0][1])


def fedsvd(factors: Factors, weights: Weights, key: Key) -> Pair:
    """SVD(Bb A) = U S V' by QR of Bb and of A, then A <- V' (orthonormal rows), B <- U S. Exact if A was common and frozen.

    Equal ranks. Dead directions: as in `product_svd`. Source: FedSVD, Lee et al. 2025.
    """
    left, right = factor_mean(factors, weights)
    return split_of(triplets(left, right, left.shape[1], key, "core"), "left", key)


def _mean(tensors: Sequence[Tensor], weights: Weights) -> Tensor:
    """sum w_i T_i in float64."""
    shares = shares_of(weights, len(tensors))
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        require(tensor.shape == total.shape, f"lora: one shape; got {list(total.shape)} and {list(tensor.shape)}")
        total.add_(tensor, alpha=share)
    return total


def _padded(factors: Factors, shares: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of v_i B_i [m, r_max], of v_i A_i [r_max, n] and of v_i [r_max] over the clients that own a slice; float64."""
    rank = max(b.shape[1] for b, _ in factors)
    b0, a0 = factors[0]
    p = torch.zeros(len(b0), rank, dtype=torch.float64, device=b0.device)
    q = torch.zeros(rank, a0.shape[1], dtype=torch.float64, device=b0.device)
    owned = torch.zeros(rank, dtype=torch.float64, device=b0.device)
    for (b, a), share in zip(factors, shares, strict=True):
        p[:, : b.shape[1]].add_(b, alpha=share)
        q[: b.shape[1]].add_(a, alpha=share)
        owned[: b.shape[1]] += share
    return p, q, owned


def _ridged(gram: Tensor, ridge: float) -> Tensor:
    """G + (ridge x mean diagonal + floor) I."""
    gram.diagonal().add_(ridge * gram.diagonal().mean() + _FLOOR)
    return gram


def _check(factors: Factors, method: str) -> None:
    """Raise unless all B_i [m, r_i], A_i [r_i, n] have one m, one n and one dtype."""
    require(len(factors) >= 1, f"lora.{method}: factors of at least one client; got none")
    m, n, dtype = factors[0][0].shape[0], factors[0][1].shape[-1], factors[0][0].dtype
    for i, (b, a) in enumerate(factors):
        fits = b.ndim == a.ndim == 2 and b.shape[1] == a.shape[0] and (len(b), a.shape[1]) == (m, n)
        require(
            fits and b.dtype == a.dtype == dtype,
            f"lora.{method}: B [{m}, r] and A [r, {n}] of {dtype}; client {i} has {list(b.shape)} of {b.dtype} and "
            f"{list(a.shape)} of {a.dtype}",
        )


def _equal_ranks(factors: Factors, method: str) -> None:
    """Raise unless all clients have one rank."""
    _check(factors, method)
    ranks = sorted({b.shape[1] for b, _ in factors})
    require(
        len(ranks) == 1, f"lora.{method}: equal ranks; got {ranks}. Unequal ranks: product_svd, flora, hetlora_style, rbla"
    )
