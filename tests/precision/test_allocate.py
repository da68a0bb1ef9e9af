"""The sweep is exact: it finds what brute force finds."""

from __future__ import annotations

import itertools

import pytest
import torch

from taciturn.core import random
from taciturn.core.errors import ConfigError
from taciturn.precision.allocate import coarse


def instance(seed: int):
    """Small, with masks; every third of whole numbers, so that there are ties."""
    key = random.key(seed)
    u = random.uniform(random.fold(key, "size"), 3)
    clients, modes = 1 + int(u[0] * 6), 1 + int(u[1] * 4)
    times = random.uniform(random.fold(key, "t"), clients, modes).double()
    penalties = random.uniform(random.fold(key, "d"), clients, modes).double()
    if seed % 3 == 0:
        times, penalties = (times * 4).ceil(), (penalties * 3).ceil()
    masked = random.uniform(random.fold(key, "mask"), clients, modes) < 0.3
    masked[torch.arange(clients), (random.uniform(random.fold(key, "free"), clients) * modes).long()] = False
    return torch.where(masked, torch.inf, times), penalties, float(4 * u[2])


def brute(times, penalties, lam):
    """The least J of all assignments, one row each."""
    clients, modes = times.shape
    every = torch.tensor(list(itertools.product(range(modes), repeat=clients)))
    return float((times.mT.gather(0, every).max(1).values + lam * penalties.mT.gather(0, every).sum(1)).min())


def test_it_is_brute_force():
    for seed in range(300):
        times, penalties, lam = instance(seed)
        found = coarse(times, penalties, lam, 1.0)
        assert torch.isfinite(times.gather(1, found.modes.unsqueeze(1))).all()
        assert found.objective == pytest.approx(brute(times, penalties, lam), abs=1e-12), seed


def test_the_ends_of_lam():
    for seed in range(30):
        times, penalties, _ = instance(seed)
        fast, exact = coarse(times, penalties, 0.0, 1.0), coarse(times, penalties, 1e9, 1.0)
        assert fast.makespan == float(times.min(1).values.max())
        least = torch.where(torch.isfinite(times), penalties, torch.inf).min(1).values.sum()
        assert exact.penalty == pytest.approx(float(least))


def test_equal_penalties_take_the_fastest_mode():
    times, _, _ = instance(7)
    found = coarse(times, torch.ones_like(times), 3.0, 1.0)
    assert torch.equal(times.gather(1, found.modes.unsqueeze(1)).squeeze(1), times.min(1).values)


def test_what_cannot_be_allocated_is_refused():
    times = torch.tensor([[1.0, 2.0], [torch.inf, torch.inf]])
    with pytest.raises(ConfigError, match="client 1 can run no mode"):
        coarse(times, torch.zeros(2, 2), 1.0, 1.0)
    with pytest.raises(ConfigError, match=r"got \(2, 2\) and \(2, 1\)"):
        coarse(times, torch.zeros(2, 1), 1.0, 1.0)
    with pytest.raises(ConfigError, match="lam at least 0"):
        coarse(times[:1], torch.zeros(1, 2), -1.0, 1.0)
