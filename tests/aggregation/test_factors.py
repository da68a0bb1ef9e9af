"""The laws of federated LoRA aggregation, method by method, on factors of one layer.

Symbols: B_i [m, r_i], A_i [r_i, n], w_i; M = sum w_i B_i A_i; (Bb, Ab) the means; (P, Q) the broadcast pair.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aggregation.layers import KEY, best, cohort, dense, product, weights
from taciturn.aggregation import factors as lora
from taciturn.aggregation.lowrank_svd import DEAD
from taciturn.aggregation.mismatch import factor_gaps, product_mismatch
from taciturn.core import random
from taciturn.core.errors import ConfigError, UnknownName

UNEQUAL = (4, 2, 5, 1)


def svd(f, w, **options):
    return lora.product_svd(f, w, KEY, **options)


BROADCASTS = {  # every method that sends a pair that clients go on from: (factors, weights) -> pair
    "factor_mean": lora.factor_mean,
    "factor_mean_rebalanced": lambda f, w: lora.factor_mean_rebalanced(f, w, KEY),
    "product_svd": svd,
    "product_svd core": lambda f, w: svd(f, w, backend="core"),
    "product_svd gram": lambda f, w: svd(f, w, backend="gram"),
    "product_svd left": lambda f, w: svd(f, w, split="left"),
    "product_svd align": lambda f, w: svd(f, w, align=True),
    "tangent": lora.tangent,
    "lora_fair_style": lora.lora_fair_style,
    "hetlora_style": lora.hetlora_style,
    "rbla": lora.rbla,
    "fedsvd": lambda f, w: lora.fedsvd(f, w, KEY),
}
EXACT = {  # (factors, weights) -> pair, residual with P Q + residual = M
    "fedex": lora.fedex,
    "fedex short": lambda f, w: lora.fedex(f, w, "short"),
    "fedex_trunc, all of it": lambda f, w: lora.fedex_trunc(f, w, 20),
    "product_svd_residual": lambda f, w: (svd(f, w), lora.residual_of(f, w, svd(f, w))),
    "product_svd_residual, rank 2": lambda f, w: (svd(f, w, rank=2), lora.residual_of(f, w, svd(f, w, rank=2))),
    "flora": lambda f, w: (tuple(0 * v for v in f[0]), lora.flora(f, w)),
}
ANY_RANKS = ("product_svd_residual", "product_svd_residual, rank 2", "flora")


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("ranks", [(4,) * 6, UNEQUAL], ids=["equal", "unequal"])
def test_exact_methods_lose_nothing(name, ranks):
    """Law 1."""
    f, w = cohort(ranks=ranks, eps=1.0), weights(len(ranks))
    if len(set(ranks)) > 1 and name not in ANY_RANKS:
        with pytest.raises(ConfigError, match=r"equal ranks; got \[1, 2, 4, 5\]"):
            EXACT[name](f, w)
        return
    pair, residual = EXACT[name](f, w)
    assert (dense(pair) + dense(residual) - product(f, w)).norm() < 1e-12
    assert product_mismatch(f, w, pair, residual) < 1e-12


@pytest.mark.parametrize("common", ["A", "B"])
def test_a_common_factor_makes_the_mean_exact(common):
    """Law 1 for ffa, rolora and fedsvd, and its condition: with both factors moving they are off like factor_mean."""
    w = weights(6)
    for f, exact in ((cohort(common=common), True), (cohort(), False)):
        for method in ("factor_mean", "factor_mean_rebalanced", "fedsvd"):
            error = (dense(BROADCASTS[method](f, w)) - product(f, w)).norm()
            assert error < 1e-12 if exact else error > 1e-3, method
        b, a = (lora.mean_of(tensors, w) for tensors in zip(*f, strict=True))
        assert torch.equal(b, lora.factor_mean(f, w)[0]) and torch.equal(a, lora.factor_mean(f, w)[1])


def test_fed_sb_is_exact():
    b, a = cohort()[0]
    cores, w = list(random.normal(KEY, 6, 4, 4).double()), weights(6)
    want = sum(v * b @ core @ a for core, v in zip(cores, w, strict=True))
    torch.testing.assert_close(b @ lora.fed_sb(cores, w) @ a, want, rtol=0, atol=1e-13)


def test_bias_of_the_mean_is_the_covariance():
    """Law 2, and the short form of R."""
    f, w = cohort(eps=1.0), weights(6)
    b, a = lora.factor_mean(f, w)
    covariance = sum(v * (bi - b) @ (ai - a) for (bi, ai), v in zip(f, w, strict=True))
    assert (b @ a - product(f, w) + covariance).norm() < 1e-12
    left, right = lora.spread(f, w)
    assert left.shape == (30, 20) and (left @ right - covariance).norm() < 1e-12


@settings(max_examples=60)
@given(
    m=st.integers(4, 24), n=st.integers(4, 24), r=st.integers(1, 4), clients=st.integers(1, 6),
    eps=st.sampled_from([1e-3, 0.1, 1.0, 10.0]), seed=st.integers(0, 2**32),
    backend=st.sampled_from(["core", "rsvd", "gram"]),
)  # fmt: skip
def test_truncation_never_exceeds_the_bias(m, n, r, clients, eps, seed, backend):
    """Law 3; a dead direction may cost DEAD."""
    f, w = cohort(m, n, (r,) * clients, eps, seed), weights(clients, seed)
    bias = product_mismatch(f, w, lora.factor_mean(f, w))
    assert product_mismatch(f, w, svd(f, w, backend=backend)) <= bias * (1 + 1e-6) + 2 * DEAD


def test_tangent_has_both_constants():
    """Law 4: the bias of the SVD and the strong gap of the mean, the closer the smaller eps."""
    off = []
    for eps in (0.3, 0.03, 0.003):
        f, w = cohort(eps=eps), weights(6)
        pairs = {name: BROADCASTS[name](f, w) for name in ("tangent", "factor_mean", "product_svd core")}
        bias = {name: product_mismatch(f, w, pair) for name, pair in pairs.items()}
        gap = {name: factor_gaps(f, w, pair)[0] for name, pair in pairs.items()}
        assert bias["factor_mean"] > 1.02 * bias["product_svd core"] and gap["product_svd core"] > 5 * gap["tangent"]
        off.append((bias["tangent"] / bias["product_svd core"] - 1, gap["tangent"] / gap["factor_mean"] - 1))
    assert off[0][0] < 0.1 and off[1][0] < 1e-3 and off[2][0] < 1e-5
    assert off[0][1] < 0.1 and off[1][1] < 2e-3 and off[2][1] < 2e-5


def test_tangent_from_a_zero_mean():
    """Bb = 0 adds nothing and removes nothing: Q = Ab, P = R Ap."""
    (b, _), *_ = f = cohort(ranks=(4, 4))
    w = [0.5, 0.5]
    for left in (b, 0 * b):
        g = [(left, f[0][1]), (-left, f[1][1])]
        p, q = lora.tangent(g, w)
        torch.testing.assert_close(q, lora.factor_mean(g, w)[1], rtol=1e-12, atol=0)
        torch.testing.assert_close(p, product(g, w) @ torch.linalg.pinv(q), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("clients", [1, 5])
@pytest.mark.parametrize("name", BROADCASTS)
def test_equal_clients_change_nothing(name, clients):
    """Law 5: up to the gauge."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        f = cohort(ranks=(4,), dtype=dtype) * clients
        pair = BROADCASTS[name](f, weights(clients))
        assert pair[0].dtype == pair[1].dtype == dtype and pair[0].shape == (30, 4) and pair[1].shape == (4, 20)
        assert product_mismatch(f, weights(clients), pair) < tolerance
        if name in ("factor_mean", "tangent", "lora_fair_style", "hetlora_style", "rbla"):
            assert factor_gaps(f, weights(clients), pair)[0] < (10 * tolerance) ** 2


@pytest.mark.parametrize("name", BROADCASTS)
def test_the_order_of_clients_does_not_matter(name):
    """Law 11."""
    f, w = cohort(40, 30, (3,) * 7, dtype=torch.float32), weights(7)
    once, again = BROADCASTS[name](f, w), BROADCASTS[name](f, w)
    assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])
    order = random.permutation(KEY, 7)
    turned = BROADCASTS[name]([f[i] for i in order], w[order])
    for one, other in zip(once, turned, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    assert (dense(once) - dense(turned)).norm() < 2e-6 * dense(once).norm()


def test_unequal_ranks():
    """Law 7: who owns a slice, and who gets what."""
    equal, f, w = cohort(), cohort(ranks=UNEQUAL), weights(4)
    for one, other in zip(lora.rbla(equal, weights(6)), lora.factor_mean(equal, weights(6)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0)
    owned = torch.tensor([sum(float(v) for r, v in zip(UNEQUAL, w, strict=True) if r > j) for j in range(5)], dtype=w.dtype)
    (p, q), (pz, qz) = lora.rbla(f, w), lora.hetlora_style(f, w, sparsity=False)
    torch.testing.assert_close(pz, p * owned, rtol=1e-12, atol=0)
    torch.testing.assert_close(qz, q * owned.unsqueeze(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(p[:, 4], f[2][0][:, 4], rtol=1e-13, atol=0)
    pair = svd(f, w)
    assert (dense(pair) - best(product(f, w), 5)).norm() < 1e-9
    for r in UNEQUAL:
        part = lora.leading(pair, r)
        assert part[0].shape == (30, r) and (dense(part) - best(product(f, w), r)).norm() < 1e-9
    with pytest.raises(ConfigError, match="equal ranks"):
        svd(f, w, align=True)


def test_sparsity_weights():
    f, w = cohort(ranks=UNEQUAL), weights(4)
    size = torch.stack([v * (b @ a).norm() for (b, a), v in zip(f, w, strict=True)])
    want = lora.hetlora_style(f, size / size.sum(), sparsity=False)
    for one, other in zip(lora.hetlora_style(f, w), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    still = [(0 * b, a) for b, a in f]
    assert torch.equal(lora.hetlora_style(still, w)[1], lora.hetlora_style(still, w, sparsity=False)[1])


def test_lora_fair_style_is_the_minimizer():
    f, w = cohort(eps=1.0), weights(6)
    b, a = lora.factor_mean(f, w)
    for lam in (0.0, 0.01, 10.0):
        p, q = lora.lora_fair_style(f, w, lam)
        assert torch.equal(q, a)
        assert ((p @ a - product(f, w)) @ a.mT + lam * (p - b)).norm() < 1e-12
    torch.testing.assert_close(lora.lora_fair_style(f, w, 1e9)[0], b, rtol=0, atol=1e-6)


def test_fedex_trunc_leaves_the_tail():
    f, w = cohort(eps=1.0), weights(6)
    rest = product(f, w) - dense(lora.factor_mean(f, w))
    for rank in (1, 3):
        _, residual = lora.fedex_trunc(f, w, rank)
        assert residual[0].shape == (30, rank) and (dense(residual) - best(rest, rank)).norm() < 1e-12
    assert dense(lora.fedex_trunc(f[:1], [1.0], 2)[1]).abs().max() == 0


def momentless(pair, target: Tensor, steps: int) -> list[tuple[Tensor, float]]:
    """Plain SGD on (B, A) for batches of ||(B A - T) x||^2 / 2: the products B A and the losses."""
    b, a = (v.clone().requires_grad_() for v in pair)
    path = []
    for step in range(steps):
        x = random.normal(random.fold(KEY, step), target.shape[1], 8).to(target)
        loss = ((b @ a - target) @ x).square().sum() / 16
        slopes = torch.autograd.grad(loss, (b, a))
        with torch.no_grad():
            for v, slope in zip((b, a), slopes, strict=True):
                v -= 0.05 * slope
        path.append(((b @ a).detach(), float(loss.detach())))
    return path


def test_plain_sgd_does_not_see_the_alignment():
    """Law 9. It does see the split."""
    target = random.normal(KEY, 30, 20).double() / 5
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        f, w = cohort(dtype=dtype), weights(6)
        plain, turned, left = svd(f, w), svd(f, w, align=True), svd(f, w, split="left")
        assert (plain[0] - turned[0]).norm() > 0.1
        paths = [momentless(pair, target.to(dtype), 25) for pair in (plain, turned, left)]
        for (one, loss), (other, other_loss) in zip(*paths[:2], strict=True):
            assert (one - other).norm() < tolerance and abs(loss - other_loss) < tolerance * loss
        assert (paths[0][-1][0] - paths[2][-1][0]).norm() > 1e-3


def test_alignment_is_the_best_gauge():
    f, w = cohort(eps=0.1), weights(6)
    gaps = [factor_gaps(f, w, svd(f, w, align=align)) for align in (False, True)]
    assert gaps[1][0] < gaps[0][0] / 3
    assert gaps[1][0] == pytest.approx(gaps[1][1]) == pytest.approx(gaps[0][1])


def test_balanced_split():
    """Law 10."""
    f, w = cohort(eps=0.5), weights(6)
    for pair, matrix in (
        (svd(f, w, backend="core"), best(product(f, w), 4)),
        (lora.factor_mean_rebalanced(f, w, KEY), dense(lora.factor_mean(f, w))),
    ):
        s = torch.linalg.svdvals(matrix)[:4].diag()
        assert (pair[0].mT @ pair[0] - s).norm() < 1e-9 and (pair[1] @ pair[1].mT - s).norm() < 1e-9
        assert (dense(pair) - matrix).norm() < 1e-9
    for p, q in (svd(f, w, split="left"), lora.fedsvd(f, w, KEY)):
        assert (q @ q.mT - torch.eye(4)).norm() < 1e-9 and (p.mT @ p).diag().argsort(descending=True).tolist() == [
            0,
            1,
            2,
            3,
        ]


@pytest.mark.parametrize("split", ["balanced", "left"])
@pytest.mark.parametrize("backend", ["core", "gram", "rsvd"])
@pytest.mark.parametrize("alive", [0, 2])
def test_dead_directions_are_drawn_afresh(alive, backend, split):
    """s_k <= 1e-5 s_1: P's column is exactly 0, Q's row is the key's, and rounding does not decide anything."""
    f, w = [(b * (torch.arange(5) < alive), a) for b, a in cohort(60, 40, (5,) * 5, common="BA")], weights(5)
    p, q = svd(f, w, backend=backend, split=split)
    assert p[:, alive:].abs().max() == 0 and (p[:, :alive] != 0).all()
    assert (dense((p, q)) - product(f, w)).norm() < 1e-12
    size = 1.0 if split == "left" else 3**-0.5
    torch.testing.assert_close(q[alive:] @ q.mT, size**2 * torch.eye(5, dtype=q.dtype)[alive:], rtol=0, atol=1e-10)
    noisy = [(b + 1e-9 * random.normal(random.fold(KEY, i), *b.shape), a) for i, (b, a) in enumerate(f)]
    if alive:
        torch.testing.assert_close(svd(noisy, w, backend=backend, split=split)[1], q, rtol=0, atol=1e-6)
    other = lora.product_svd(f, w, random.key(9), backend=backend, split=split)[1]
    assert (other[alive:] - q[alive:]).norm() > 0.1


class Largest(TorchDispatchMode):
    """Remembers the most elements that an operation returned in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("name", [*BROADCASTS, *EXACT, "product_mismatch"])
def test_the_matrix_is_never_formed(name):
    """Law 12."""
    f, w = cohort(1500, 1200, (2,) * 5, dtype=torch.float32), weights(5)
    with Largest() as probe:
        if name == "product_mismatch":
            product_mismatch(f, w, f[0])
        else:
            (BROADCASTS | EXACT)[name](f, w)
    assert 1500 * 2 <= probe.numel <= 1500 * 22  # twelve columns, or twenty-two where the residual's rank is 20
    with Largest() as probe:
        dense(f[0])
    assert probe.numel == 1500 * 1200


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, w: lora.factor_mean([], []), ConfigError, "at least one client"),
        (lambda f, w: lora.factor_mean(f, w[:5]), ConfigError, r"one weight a client, 6; got \[5\]"),
        (lambda f, w: lora.factor_mean(f, 2 * w), ConfigError, "sum to 1; got a sum of 2"),
        (lambda f, w: lora.stacked([*f[:5], (f[5][0][1:], f[5][1])], w), ConfigError, r"client 5 has \[29, 4\]"),
        (lambda f, w: lora.rbla([*f[:5], (f[5][0].float(), f[5][1])], w), ConfigError, "torch.float32"),
        (lambda f, w: lora.tangent(cohort(ranks=(2, 3)), [0.5, 0.5]), ConfigError, r"got \[2, 3\]. Unequal ranks"),
        (lambda f, w: svd(f, w, rank=21), ConfigError, "from 1 to min.m, n. = 20; got 21"),
        (lambda f, w: svd(f, w, rank=0), ConfigError, "got 0"),
        (lambda f, w: svd(f, w, rank=3, align=True), ConfigError, "one shape to align"),
        (lambda f, w: svd(f, w, backend="gramm"), UnknownName, "did you mean 'gram'"),
        (lambda f, w: svd(f, w, split="balance"), UnknownName, "did you mean 'balanced'"),
        (lambda f, w: lora.fedex(f, w, "long"), UnknownName, "Allowed: full, short"),
        (lambda f, w: lora.fedex_trunc(f, w, 0), ConfigError, "rank at least 1"),
        (lambda f, w: lora.lora_fair_style(f, w, -1.0), ConfigError, "at least 0"),
        (lambda f, w: svd([(b.half(), a.half()) for b, a in f], w), ConfigError, "float32 or float64"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(cohort(), weights(6))
