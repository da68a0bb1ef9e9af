"""What monitors say of drifts, and what the server makes of it.

Symbols: u [K, d] drifts; weights [K]; H the estimate of the weighted variance of the models.
"""

from __future__ import annotations

import math

import pytest
import torch

from taciturn.core import random
from taciturn.sync.monitors import MONITORS, Sizes, directions, estimate

SIZES = Sizes(3, 500, 0)
K, D = 5, 400
BYTES = {"naive": 4, "linear": 8, "sketch": 4 + 4 * 3 * 500, "exact": 4 * D, "local": 4}


def say(name: str, u: torch.Tensor, xi: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    xi = directions(0, u.shape[-1]) if xi is None else xi
    return torch.vmap(lambda one: MONITORS[name].say(one, {"xi": xi}, SIZES))(u)


def variance(u: torch.Tensor, weights: torch.Tensor) -> float:
    """Of the models x + u_k around their weighted mean, in float64."""
    share = weights.double() / weights.double().sum()
    return float(share @ (u.double() - share @ u.double()).square().sum(1))


@pytest.fixture(params=["equal", "unlike"])
def weights(request) -> torch.Tensor:
    return torch.ones(K) if request.param == "equal" else torch.tensor([1.0, 20.0, 3.0, 7.0, 0.5])


@pytest.fixture(params=["apart", "together"])
def u(request) -> torch.Tensor:
    key = random.key(4)
    own = random.normal(random.fold(key, "own"), K, D)
    return own if request.param == "apart" else 0.1 * own + random.normal(key, D)


@pytest.mark.parametrize("name", BYTES)
def test_bytes(name, u):
    assert sum(t[0].numel() * t.element_size() for t in say(name, u).values()) == BYTES[name]


def test_the_variance_is_the_mean_square_less_the_square_of_the_mean(u, weights):
    h = float(estimate(MONITORS["exact"], say("exact", u), weights, SIZES))
    assert h == pytest.approx(variance(u, weights), rel=1e-10)


def test_naive_is_at_least_linear_is_at_least_the_variance(u, weights):
    share = weights.double() / weights.double().sum()
    mean = share @ u.double()
    naive, linear = (float(estimate(MONITORS[name], say(name, u), weights, SIZES)) for name in ("naive", "linear"))
    assert naive == pytest.approx(float(share @ u.double().square().sum(1)), rel=1e-6)
    assert naive >= linear >= variance(u, weights) * (1 - 1e-6)
    signed = float(estimate(MONITORS["linear"], say("linear", u, mean > 0), weights, SIZES))
    along = float(mean.abs().sum()) ** 2 / D  # what the signs of the mean catch of it
    assert naive - signed == pytest.approx(along, rel=1e-4)


def test_linear_is_tight_where_the_mean_drift_is_parallel_to_xi(weights):
    """xi has entries of one size: so has the mean drift, and what differs is orthogonal to it."""
    xi = directions(1, D)
    flat = torch.where(xi, 1.0, -1.0)
    own = random.normal(random.key(2), K, D)
    share = weights / weights.sum()
    own -= share @ own
    u = flat + own
    h = float(estimate(MONITORS["linear"], say("linear", u, xi), weights, SIZES))
    assert h == pytest.approx(variance(u, weights), rel=1e-5)


def test_sketch_is_near_the_variance_and_mostly_above(weights):
    ratios = []
    for seed in range(20):
        own = random.normal(random.key(seed), K, D)
        u = 0.5 * own + random.normal(random.fold(random.key(seed), "mean"), D)
        sizes = Sizes(3, 500, seed)
        payload = torch.vmap(lambda one, sizes=sizes: MONITORS["sketch"].say(one, {}, sizes))(u)
        total = float(estimate(MONITORS["naive"], {"norm": payload["norm"]}, weights, sizes))
        h, var = float(estimate(MONITORS["sketch"], payload, weights, sizes)), variance(u, weights)
        ratios.append((h - var) / (total - var))  # in units of |mean u|^2
    ratios = torch.tensor(ratios)
    assert float(ratios.mean()) == pytest.approx(0.0447 / 1.0447, abs=0.05)
    assert float(ratios.abs().max()) < 0.25


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_who_is_not_finite_or_not_heard_drops_out_of_both_terms(name, bad):
    u = random.normal(random.key(7), K, D)
    spoilt = u.clone()
    spoilt[1, 3] = bad
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0, 1.0])  # the fourth was not heard
    kept = [0, 2, 4]
    got = float(estimate(MONITORS[name], say(name, spoilt), weights, SIZES))
    want = float(estimate(MONITORS[name], say(name, u[kept]), weights[kept], SIZES))
    assert got == pytest.approx(want, rel=1e-6)


def test_none_is_finite():
    payload = {"norm": torch.tensor([math.nan, math.inf])}
    assert math.isnan(float(estimate(MONITORS["naive"], payload, torch.ones(2), SIZES)))


def test_never_negative():
    """Aligned drifts: the sketch's estimate of |mean u|^2 may exceed S."""
    u = random.normal(random.key(0), D).expand(2, D).contiguous()
    for seed in range(10):
        sizes = Sizes(1, 8, seed)
        payload = torch.vmap(lambda one, sizes=sizes: MONITORS["sketch"].say(one, {}, sizes))(u)
        assert float(estimate(MONITORS["sketch"], payload, torch.ones(2), sizes)) >= 0
