"""Who takes part: laws that hold for every rule, and the frequencies of each.

Symbols: N clients; M of a round; available [N] bool; z standard errors (a law allows 4).
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taciturn import participation
from taciturn.core import random
from taciturn.core.errors import ConfigError
from taciturn.participation import all as everyone
from taciturn.participation import available, cyclic, poisson, uniform

RULES = {
    "all": everyone(),
    "uniform count": uniform(count=3),
    "uniform fraction": uniform(fraction=0.4),
    "cyclic count": cyclic(count=3),
    "cyclic fraction": cyclic(fraction=0.3, seed=5),
    "poisson": poisson(rate=0.4),
    "poisson rare": poisson(rate=1e-3),
    "available": available(count=3),
    "available day": available(fraction=0.5, probability=0.5, swing=1.0, period=4),
    "available rare": available(count=2, probability=1e-9),
}
each = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
masks = st.lists(st.booleans(), min_size=1, max_size=20).filter(any).map(torch.tensor)
quick = settings(max_examples=60, deadline=None)


def draw(rule, round=0, seed=0, mask=None, n=10):
    mask = torch.ones(n, dtype=torch.bool) if mask is None else mask
    return rule.draw(round, random.fold(random.key(seed), round), mask)


def counts(rule, rounds: int, n: int, seed: int = 0) -> torch.Tensor:
    return sum(torch.bincount(draw(rule, r, seed, n=n), minlength=n) for r in range(rounds))


def test_every_rule_has_a_row():
    assert {type(rule).__name__ for rule in RULES.values()} == set(participation.__all__)


@each
@quick
@given(masks, st.integers(0, 50), st.integers(0, 100))
def test_only_clients_that_can_be_reached_each_once_and_at_least_one(rule, mask, round, seed):
    kept = mask.clone()
    ids = draw(rule, round, seed, mask)
    assert ids.dtype == torch.int64 and ids.dim() == 1 and len(ids) >= 1
    assert len(set(ids.tolist())) == len(ids) and mask[ids].all()
    assert torch.equal(ids, draw(rule, round, seed, mask)) and torch.equal(mask, kept)


@pytest.mark.parametrize(
    ("options", "n", "m"),
    [
        ({"count": 3}, 10, 3), ({"count": 10}, 10, 10), ({"count": 99}, 10, 10), ({"fraction": 1}, 10, 10),
        ({"fraction": 0.35}, 20, 7), ({"fraction": 0.38}, 20, 8), ({"fraction": 0.001}, 10, 1), ({"fraction": 0.1}, 1, 1),
    ],
)  # fmt: skip
def test_sizes_of_cohorts(options, n, m):
    for kind in (uniform, cyclic, available):
        rule = kind(**options, probability=1.0) if kind is available else kind(**options)
        assert len(draw(rule, n=n)) == m


def test_a_fraction_is_of_all_clients_not_of_those_available():
    mask = torch.tensor([True] * 6 + [False] * 14)
    assert len(draw(uniform(fraction=0.25), mask=mask)) == 5
    assert sorted(draw(uniform(fraction=0.5), mask=mask).tolist()) == list(range(6))


def test_all_takes_everyone_in_order():
    mask = torch.tensor([False, True, True, False, True])
    assert draw(everyone(), mask=mask).tolist() == [1, 2, 4]


def test_uniform_is_uniform():
    """Each client in M/N of the rounds, each pair in M(M-1)/(N(N-1)), and each order alike."""
    n, m, rounds = 8, 3, 3000
    draws = torch.stack([draw(uniform(count=m), r, n=n) for r in range(rounds)])
    rate = m / n
    assert (
        (torch.bincount(draws.flatten(), minlength=n) - rounds * rate).abs() < 4 * (rounds * rate * (1 - rate)) ** 0.5
    ).all()
    together = torch.zeros(rounds, n).scatter_(1, draws, 1.0)
    pairs = (together.T @ together)[torch.triu(torch.ones(n, n), 1).bool()]
    rate = m * (m - 1) / (n * (n - 1))
    assert ((pairs - rounds * rate).abs() < 4 * (rounds * rate * (1 - rate)) ** 0.5).all()
    first = torch.bincount(draws[:, 0], minlength=n)
    assert ((first - rounds / n).abs() < 4 * (rounds / n * (1 - 1 / n)) ** 0.5).all()


@pytest.mark.parametrize("kind", [uniform, available])
def test_the_key_decides(kind):
    rule = kind(count=5)
    draws = {tuple(draw(rule, 0, seed, n=50).tolist()) for seed in range(20)}
    assert len(draws) == 20


@quick
@given(st.integers(1, 15), st.integers(1, 15), st.integers(0, 5))
def test_cyclic_gives_everyone_one_turn_a_pass(n, count, passes):
    rule = cyclic(count=count, seed=1)
    size = min(n, count)
    groups = math.ceil(n / size)
    turns = [draw(rule, passes * groups + g, n=n).tolist() for g in range(groups)]
    assert sorted(client for turn in turns for client in turn) == list(range(n))
    assert [len(turn) for turn in turns[:-1]] == [size] * (groups - 1) and len(turns[-1]) == n - size * (groups - 1)


def test_cyclic_takes_a_fresh_order_for_each_pass_and_seed():
    orders = {tuple(draw(cyclic(count=12, seed=seed), r, n=12).tolist()) for seed in (0, 1) for r in range(5)}
    assert len(orders) == 10
    assert torch.equal(draw(cyclic(count=3), 2, seed=0), draw(cyclic(count=3), 2, seed=9)), "the round's key plays no part"


def test_cyclic_leaves_out_who_is_away_unless_all_are():
    rule, n = cyclic(count=3), 9
    group = draw(rule, 1, n=n)
    mask = torch.ones(n, dtype=torch.bool)
    mask[group[0]] = False
    assert draw(rule, 1, mask=mask).tolist() == group[1:].tolist()
    mask[group] = False
    others = draw(rule, 1, mask=mask)
    assert len(others) == 3 and not set(others.tolist()) & set(group.tolist())


def test_available_wakes_each_client_as_often_as_it_says():
    n, rounds, rate = 6, 2500, 0.3
    seen = counts(available(fraction=1, probability=rate), rounds, n)
    nobody = (1 - rate) ** n / n  # then one is taken all the same
    expected = rounds * (rate + nobody)
    assert ((seen - expected).abs() < 4 * (rounds * rate * (1 - rate)) ** 0.5).all()


def test_available_follows_the_time_of_day():
    """Client i of N = 4 with a period of 4 rounds: a quarter of a day apart; at swing 1 some never wake, some always."""
    rule = available(fraction=1, probability=0.5, swing=1.0, period=4)
    seen = torch.zeros(4, 4)
    for r in range(1600):
        seen[r % 4] += torch.bincount(draw(rule, r, n=4), minlength=4) / 400
    for r in range(4):
        for i in range(4):
            rate = 0.5 * (1 + math.sin(2 * math.pi * (r / 4 + i / 4)))
            assert abs(float(seen[r, i]) - rate) < 4 * (0.25 / 400) ** 0.5 + 1e-6


def test_available_never_sleeps_at_all():
    seen = counts(RULES["available rare"], 300, 5)
    assert int(seen.sum()) == 300 and (seen > 30).all(), "one client a round, any of them"


BAD = {
    "give count or fraction, not both or neither; got count=None, fraction=None": {},
    "give count or fraction, not both or neither; got count=1, fraction=0.5": {"count": 1, "fraction": 0.5},
    "count: at least 1 client a round; got 0": {"count": 0},
    r"fraction: in \(0, 1\]; got 0": {"fraction": 0},
    r"fraction: in \(0, 1\]; got 1.5": {"fraction": 1.5},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_sizes(message):
    for kind in (uniform, cyclic, available):
        with pytest.raises(ConfigError, match=message):
            kind(**BAD[message])


def test_bad_days():
    for options, message in (
        ({"probability": 0}, r"probability: in \(0, 1\]; got 0"),
        ({"probability": 1.1}, r"probability: in \(0, 1\]; got 1.1"),
        ({"swing": -0.1}, r"swing: in \[0, 1\]; got -0.1"),
        ({"swing": 2}, r"swing: in \[0, 1\]; got 2"),
        ({"period": 0}, "period: at least 1 round; got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            available(count=1, **options)
