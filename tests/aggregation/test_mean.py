"""The mean against a naked loop in float64.

Symbols: u_i [d] updates; w_i weights; n_i samples; blocks of any size.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taciturn import aggregation
from taciturn.aggregation import mean, weighted
from taciturn.core import random
from taciturn.core.types import BAD_UPDATE, OK, Block
from taciturn.core.vector import Layout

D = 7
LAYOUT = Layout(("w",), ((D,),))
X = torch.zeros(D)
quick = settings(max_examples=60, deadline=None)


def updates(m: int, seed: int = 0) -> torch.Tensor:
    """Rows of unlike size, 1e-3 to 1e3."""
    key = random.key(seed)
    return random.normal(key, m, D) * 10 ** (6 * random.uniform(random.fold(key, 1), m, 1) - 3)


def block(u: torch.Tensor, w: torch.Tensor, status: torch.Tensor | None = None) -> Block:
    ids = torch.arange(len(u))
    return Block(ids, torch.zeros_like(u), u, w, LAYOUT, {}, torch.full((len(u),), OK) if status is None else status)


def average(u: torch.Tensor, w: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """The aggregate of blocks of these sizes."""
    rule = mean()
    acc = rule.start(rule.init(X, torch.ones(1)), X)
    for rows, weights in zip(torch.split(u, cuts), torch.split(w, cuts), strict=True):
        acc = rule.add(acc, block(rows, weights))
    change, state = rule.finish(acc)
    assert state == {} and change.merges == {} and change.update.dtype == torch.float64
    return change.update


def naked(u: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    total, weight = torch.zeros(D, dtype=torch.float64), 0.0
    for row, value in zip(u, w.tolist(), strict=True):
        total, weight = total + value * row.double(), weight + value
    return total / weight


weights_ = st.lists(st.integers(1, 10_000), min_size=1, max_size=12)


@quick
@given(weights_, st.data())
def test_equals_the_naked_loop_in_any_blocks(w, data):
    m, cuts = len(w), []
    while sum(cuts) < m:
        cuts.append(data.draw(st.integers(1, m - sum(cuts))))
    u, w = updates(m, seed=m), torch.tensor(w, dtype=torch.float32)
    scale = float(u.abs().max())
    assert (average(u, w, cuts) - naked(u, w)).abs().max() <= 2e-6 * scale


@quick
@given(weights_)
def test_one_client_at_a_time_is_exact_in_float64(w):
    u, w = updates(len(w), seed=1), torch.tensor(w, dtype=torch.float32)
    torch.testing.assert_close(average(u, w, [1] * len(w)), naked(u, w), rtol=1e-13, atol=1e-13)
    order = torch.arange(len(w)).flip(0)
    torch.testing.assert_close(average(u[order], w[order], [1] * len(w)), naked(u, w), rtol=1e-13, atol=1e-10)


def test_many_small_updates_are_not_lost():
    """10^4 clients, where a sum in float32 would be wrong in the fourth digit."""
    m = 10_000
    u = torch.full((m, D), 0.1)
    u[0] = 1e5
    assert (average(u, torch.ones(m), [1] * m) - naked(u, torch.ones(m))).abs().max() < 1e-9
    assert (average(u, torch.ones(m), [50] * 200) - naked(u, torch.ones(m))).abs().max() < 1e-5


@pytest.mark.parametrize("cuts", [[1] * 5, [5], [2, 3]], ids=str)
def test_clients_that_failed_weigh_nothing(cuts):
    """The engine zeroes their rows and weights; the mean is that of the others."""
    u, w = updates(5), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    good = torch.tensor([True, False, True, True, False])
    zeroed = torch.where(good.unsqueeze(1), u, 0.0)
    torch.testing.assert_close(average(zeroed, w * good, cuts), naked(u[good], w[good]), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("cuts", [[1, 1, 1], [3], [2, 1]], ids=str)
def test_the_mean_of_equals_is_each_of_them_and_scales(cuts):
    same, w = updates(1).expand(3, D), torch.tensor([3.0, 5.0, 0.5])
    torch.testing.assert_close(average(same, w, cuts), same[0].double(), rtol=1e-6, atol=0)
    u = updates(3)
    torch.testing.assert_close(average(u, 1000 * w, cuts), average(u, w, cuts), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(average(-2 * u, w, cuts), -2 * average(u, w, cuts), rtol=1e-12, atol=0)


def test_adding_changes_nothing_that_was_there():
    rule = mean()
    u, w = updates(4), torch.ones(4)
    acc = rule.start({}, X)
    for rows in (u[:1], u[1:]):
        kept, kept_rows = (acc[0].clone(), acc[1].clone()), rows.clone()
        new = rule.add(acc, block(rows, w[: len(rows)], torch.full((len(rows),), BAD_UPDATE)))
        assert torch.equal(acc[0], kept[0]) and torch.equal(acc[1], kept[1]) and torch.equal(rows, kept_rows)
        acc = new
    assert not X.any()


def test_weights():
    sizes = torch.tensor([1, 7, 60_000])
    assert mean().weigh(sizes).tolist() == [1.0, 1.0, 1.0]
    assert weighted().weigh(sizes).tolist() == [1.0, 7.0, 60_000.0]
    assert weighted() == mean(weights="samples") != mean() and mean.linear
    assert set(aggregation.__all__) == {"controlled", "low_rank", "mean", "nova", "private", "running", "weighted"}
