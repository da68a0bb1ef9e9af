"""How thresholds move: slopes, fixed points, scale, guards.

Symbols: V = c n^p the variance after n blocks; M most blocks; rho cost of a round's messages in blocks.
"""

from __future__ import annotations

import math

import pytest
import torch

from taciturn.core.errors import ConfigError
from taciturn.sync.thresholds import adaptive, ema, fixed, plain, power

M, C = 20, 0.3


def next_n(rule, n: float, p: float, c: float = C, theta: float | None = None) -> float:
    """Blocks of the next round, real-valued: where V passes the new Theta."""
    state = {"theta": torch.tensor(c * n**p if theta is None else theta, dtype=torch.float64)}
    state = rule.update(state, [], n, c * n**p, M, 10.0)
    return (float(state["theta"]) / c) ** (1 / p)


@pytest.mark.parametrize("p", [0.4, 0.7, 1.0, 1.6])
@pytest.mark.parametrize(
    ("rule", "slope"),
    [
        (plain(), lambda p: 1 - 1 / p),
        (power(0.5), lambda p: 1 - 0.5 / p),
        (power(1 / 3), lambda p: 1 - 1 / (3 * p)),
        (ema(0.5), lambda p: 1 - 0.5 / p),
        (ema(0.3), lambda p: 1 - 0.3 / p),
    ],
    ids=["plain", "power(1/2)", "power(1/3)", "ema(1/2)", "ema(0.3)"],
)
def test_slope_and_fixed_point(rule, slope, p):
    low, high = next_n(rule, 6.0, p), next_n(rule, 12.0, p)
    assert math.log(high / low) / math.log(2) == pytest.approx(slope(p), abs=1e-9)
    assert next_n(rule, M / 2, p) == pytest.approx(M / 2)


@pytest.mark.parametrize("rule", [plain(), power(0.5), ema(0.5)], ids=["plain", "power", "ema"])
def test_scale_of_the_drifts_does_not_matter(rule):
    assert next_n(rule, 7.0, 0.8, c=C) == pytest.approx(next_n(rule, 7.0, 0.8, c=1e-12 * C))


@pytest.mark.parametrize("rule", [plain(), power(0.5), ema(0.5), adaptive()], ids=["plain", "power", "ema", "adaptive"])
@pytest.mark.parametrize("v", [math.nan, math.inf])
def test_theta_stays_where_the_variance_is_not_finite(rule, v):
    state = rule.init() | {"theta": torch.tensor(0.7, dtype=torch.float64)}
    assert rule.update(state, [(1.0, 1.0)], 1.0, v, M, 10.0) is state


@pytest.mark.parametrize("rule", [plain(), ema(0.5), power(0.5)], ids=["plain", "ema", "power"])
def test_no_variance_gives_theta_zero_and_the_way_back(rule):
    """V = 0 ends the next round at its first look; Theta recovers from 0 and from the start, where it is -inf."""
    state = rule.update(rule.init(), [], 1.0, 0.0, M, 10.0)
    assert float(state["theta"]) == 0.0
    assert float(rule.update(state, [], 1.0, 0.5, M, 10.0)["theta"]) > 0
    assert float(rule.init()["theta"]) == -math.inf
    assert math.isfinite(float(rule.update(rule.init(), [], 1.0, 0.5, M, 10.0)["theta"]))


def test_fixed_stays():
    rule = fixed(0.5)
    state = rule.init()
    assert rule.update(state, [(1.0, 2.0)], 1.0, 2.0, M, 10.0) is state and rule.at([(1.0, 2.0)], 10.0, state) == 0.5


# ------------------------------------------------------------------------------------------------------------ adaptive


def a_round(rule: adaptive, state, rho: float, v):
    """One round on a law of the variance -> (blocks, looks, next state)."""
    n, looks = rule.first(rho, state), []
    while True:
        looks.append((n, v(n)))
        if looks[-1][1] > rule.at(looks, rho, state) or n >= rule.most:
            return n, looks, rule.update(state, looks, n, looks[-1][1], rule.most, rho)
        n = max(rule.after(looks, rho, state), n * 1.01)


def rounds(rule: adaptive, rho: float, v, count: int = 12) -> list[float]:
    state, blocks = rule.init(), []
    for _ in range(count):
        n, _, state = a_round(rule, state, rho, v)
        blocks.append(n)
    return blocks


@pytest.mark.parametrize("rho", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("p", [0.3, 0.7, 1.0, 1.5])
def test_rounds_settle_at_the_goal(p, rho):
    rule = adaptive()
    r = p / (2 - p)
    want = (rule.horizon * r * rho**2) ** (1 / 3)
    assert rule.goal(p, rho) == pytest.approx(want)
    assert rounds(rule, rho, lambda n: C * n**p)[-1] == pytest.approx(want, rel=0.11)


@pytest.mark.parametrize("p", [0.4, 0.7, 1.0, 1.5])
def test_the_law_of_the_drift_alone_is_where_a_block_gains_less_than_the_mean(p):
    """trust = 1: n* maximizes n^(p/2) / (n + rho)."""
    rho = 10.0
    n = adaptive(trust=1.0).goal(p, rho)
    grid = torch.linspace(0.2 * n, 5 * n, 4001, dtype=torch.float64)
    best = float(grid[(grid ** (p / 2) / (grid + rho)).argmax()])
    assert n == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("h", [0.5, 1.5, 10.0])
def test_the_saturating_law_alone(h):
    """trust = 0: n* maximizes n / (n + h) / (n + rho)."""
    rho = 10.0
    n = adaptive(trust=0.0, horizon=h).goal(0.7, rho)
    grid = torch.linspace(0.2 * n, 5 * n, 4001, dtype=torch.float64)
    best = float(grid[(grid / (grid + h) / (grid + rho)).argmax()])
    assert n == pytest.approx(best, rel=2e-3)


def test_longer_where_clients_move_straight_and_shorter_where_they_turn():
    straight, wander, done = (rounds(adaptive(), 10.0, lambda n, p=p: n**p)[-1] for p in (1.9, 1.0, 0.1))
    assert straight > 1.5 * wander > 2 * done


def test_few_looks_a_round():
    """Two once the exponent is known; a handful while it is learnt."""
    rule, state = adaptive(), adaptive().init()
    for number in range(6):
        _, looks, state = a_round(rule, state, 10.0, lambda n: n**0.6)
        assert len(looks) <= (5 if number < 2 else 2)


def test_scale_of_the_variance_does_not_matter():
    one, other = (rounds(adaptive(), 10.0, lambda n, c=c: c * n**0.8) for c in (1.0, 1e-10))
    assert one == pytest.approx(other)


def test_threshold_is_the_variance_expected_at_the_goal():
    rule = adaptive(start=5.0)
    state = rule.init()
    looks = [(2.0, 0.8), (4.0, 1.6)]  # p = 1, as remembered
    assert rule.aim(1.0, 10.0, state) == 5.0 < rule.goal(1.0, 10.0)
    assert rule.at(looks, 10.0, state) == pytest.approx(0.4 * 0.9 * 5.0)
    assert rule.at(looks, 1.0, state) == pytest.approx(0.4 * 0.9 * rule.goal(1.0, 1.0))


def test_only_the_first_round_is_held_back():
    found = rounds(adaptive(start=5.0), 1000.0, lambda n: n**1.5)
    assert found[0] <= 5.0 and found[1] > 60


@pytest.mark.parametrize("looks", [[(1.0, 0.0), (2.0, 0.0)], [(1.0, 0.5), (2.0, 0.0)], [(1.0, 0.5), (2.0, math.inf)]])
def test_no_growth_that_can_be_measured_leaves_what_was_known(looks):
    assert adaptive().exponent(looks, adaptive().init()) == 1.0


def test_a_client_that_stops_itself_has_a_limit():
    rule = adaptive(start=5.0)
    assert rule.alone(200, 10.0, rule.init()) == 10.0, "twice the start"
    assert rule.alone(200, 1.0, rule.init()) == pytest.approx(2 * rule.goal(1.0, 1.0))
    assert rule.alone(3, 10.0, rule.init()) == 3.0 and rule.alone(200, 1e-6, rule.init()) == 1.0
    assert plain().alone(10, 10.0, {}) == 10.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fixed(-1.0), "at least 0; got -1.0"),
        (lambda: power(0.0), "gamma: above 0, at most 1; got 0.0"),
        (lambda: ema(1.5), "beta: above 0, at most 1; got 1.5"),
        (lambda: adaptive(horizon=0.0), "horizon: blocks, above 0; got 0.0"),
        (lambda: adaptive(start=0.0), "start: blocks, above 0; got 0.0"),
        (lambda: adaptive(trust=2.0), "trust: between 0 and 1; got 2.0"),
        (lambda: adaptive(memory=-0.1), "memory: between 0 and 1; got -0.1"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
