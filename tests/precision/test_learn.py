"""What rounds teach: the regression is ridge regression, and no rule makes a round longer."""

from __future__ import annotations

import pytest
import torch

from taciturn.core import random
from taciturn.core.errors import ConfigError
from taciturn.precision import learn
from taciturn.precision.allocate import coarse, objective


def drawn(name: str, *shape: int) -> torch.Tensor:
    return random.normal(random.fold(random.key(3), name), *shape).double()


def taught(x, y, **options):
    state = learn.fresh(x.shape[1])
    for row, value in zip(x, y, strict=True):
        state = learn.learn(state, row, value, **options)
    return state


def test_without_forgetting_it_is_batch_ridge():
    x = drawn("x", 60, 11)
    y = x @ drawn("theta", 11) + 0.1 * drawn("noise", 60)
    state = taught(x, y, forget=1.0)
    inverse = torch.linalg.inv(x.mT @ x + 0.1 * torch.eye(11, dtype=torch.float64))
    theta = inverse @ x.mT @ y
    torch.testing.assert_close(state["theta"], theta)
    torch.testing.assert_close(state["P"], inverse)
    rss = (y - x @ theta).square().sum() + 0.1 * theta.square().sum()
    torch.testing.assert_close(state["rss"], rss + 1)
    mean, width = learn.predict(state, x)
    torch.testing.assert_close(mean, x @ theta)
    torch.testing.assert_close(width, 2 * ((rss + 1) / 61 * (x @ inverse * x).sum(1)).sqrt())
    assert bool((width < learn.predict(learn.fresh(11), x)[1]).all())


def test_it_follows_what_changes():
    x = drawn("x", 400, 3)
    y = torch.cat([x[:200] @ torch.ones(3).double(), x[200:] @ -torch.ones(3).double()])
    assert (taught(x, y)["theta"] + 1).abs().max() < 0.1 < (taught(x, y, forget=1.0)["theta"] + 1).abs().min()


def test_features_have_names():
    known = dict.fromkeys(learn.FEATURES[1:], 2.0) | {"skew": torch.arange(3.0)}
    found = learn.features(**known)
    assert found.shape == (3, 11) and found[:, 0].tolist() == [1, 1, 1] and found[:, 1].tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match="got skew"):
        learn.features(skew=1.0)


def test_modes_change_only_for_a_gain():
    times = torch.tensor([[1.0, 1.01], [1.0, 3.0]])
    penalties = torch.tensor([[1.0, 0.99], [1.0, 0.9]])
    best, before = coarse(times, penalties, 1.0, 1.0), torch.tensor([0, 0])
    assert torch.equal(learn.settled(before, best, times, penalties, 1.0, 1.0).modes, before)
    stuck = torch.where(torch.tensor([[True, False], [False, False]]), torch.inf, times)
    best = coarse(stuck, penalties, 1.0, 1.0)
    assert torch.equal(learn.settled(before, best, stuck, penalties, 1.0, 1.0).modes, best.modes)


def test_exploration_never_moves_the_makespan():
    tried = 0
    for seed in range(100):
        key = random.key(seed)
        times = random.uniform(random.fold(key, "t"), 40, 4).double()
        penalties, widths = (random.uniform(random.fold(key, name), 40, 4).double() for name in "dw")
        weights = random.uniform(random.fold(key, "a"), 40) + 0.5
        found = coarse(times, penalties, 1.0, 1.0)
        upper = times * 1.2
        tau = float(upper.gather(1, found.modes.unsqueeze(1)).max())
        modes = learn.explore(found.modes, upper, widths, weights, tau)
        changed = modes != found.modes
        assert objective(upper, penalties, modes, 1.0, 1.0).makespan <= tau
        assert weights[changed].sum() <= 0.05 * weights.sum() + 1e-6
        tried += int(changed.sum())
    assert tried > 50
    alone = learn.explore(found.modes, torch.full_like(times, torch.inf), widths, weights, tau)
    assert torch.equal(alone, found.modes)


def test_lam_rises_when_the_deployed_model_falls_and_sinks_when_rounds_are_late():
    state = learn.watchful(1.0)
    for accuracy in (0.9, 0.9, 0.5, 0.5):
        state = learn.guarded(state, accuracy, 1.0, 1.0)
    assert float(state["lam"]) == 1.0 and float(state["below"]) == 2
    state = learn.guarded(state, 0.5, 1.0, 1.0)
    assert float(state["lam"]) == 2.0 and float(state["below"]) == 0
    assert float(learn.guarded(state, 0.9, 1.2, 1.0)["lam"]) == 1.0
