"""Who takes part in a round.

Symbols: N clients in all; M clients of a round; available [N] bool, who can be reached; ids [M] int64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from taciturn.core import random, secret
from taciturn.core.errors import require
from taciturn.core.random import Key


def _check(count: int | None, fraction: float | None) -> None:
    require(
        (count is None) != (fraction is None), f"give count or fraction, not both or neither; got {count=}, {fraction=}"
    )
    require(count is None or count >= 1, f"count: at least 1 client a round; got {count}")
    require(fraction is None or 0 < fraction <= 1, f"fraction: in (0, 1]; got {fraction}")


def _cohort(count: int | None, fraction: float | None, n: int) -> int:
    return min(n, count) if count is not None else max(1, round((fraction or 0.0) * n))


def _some(key: Key, candidates: Tensor, count: int) -> Tensor:
    return candidates[random.choice(key, len(candidates), min(count, len(candidates)))]


@dataclass(frozen=True, slots=True)
class all:
    """Every available client takes part in every round."""

    def draw(self, round: int, key: Key, available: Tensor) -> Tensor:
        """-> ids of all available clients, ascending."""
        return available.nonzero().squeeze(1)


@dataclass(frozen=True, slots=True)
class uniform:
    """M available clients, uniform without replacement; `count` = M, or `fraction` of all N (at least one)."""

    count: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        _check(self.count, self.fraction)

    def draw(self, round: int, key: Key, available: Tensor) -> Tensor:
        """-> [M] ids in the order drawn."""
        return _some(key, available.nonzero().squeeze(1), _cohort(self.count, self.fraction, len(available)))


@dataclass(frozen=True, slots=True)
class poisson:
    """Each available client takes part with probability `rate`, whatever the others do.

    The sampling that amplifies differential privacy (docs/privacy.md). A round needs a client: where none is drawn, one is
    taken, uniform; the accountant knows how rare that is. secret: drawn by the operating system in place of the run's key,
    which all sites know; a deployed run sets it.
    """

    rate: float = 0.1
    secret: bool = False

    def __post_init__(self) -> None:
        require(0 < self.rate <= 1, f"poisson.rate: above 0, at most 1; got {self.rate}")

    def draw(self, round: int, key: Key, available: Tensor) -> Tensor:
        """-> ids, ascending."""
        n = len(available)
        drawn = secret.uniform(n) if self.secret else random.uniform(random.fold(key, "poisson"), n)
        ids = (available & (drawn < self.rate)).nonzero().squeeze(1)
        return ids if len(ids) else _some(key, available.nonzero().squeeze(1), 1)


@lru_cache(maxsize=4)
def _order(seed: int, turn: int, n: int) -> Tensor:
    """The order of a pass over all clients: sorted once a pass, not once a round."""
    return random.permutation(random.fold(random.key(seed), "cyclic", turn), n)


@dataclass(frozen=True, slots=True)
class cyclic:
    """All N clients in a random order, M a round, a fresh order when all have had their turn.

    Each client takes part exactly once in ceil(N / M) rounds; the last group of a pass may be smaller. The orders are
    drawn from `seed`. Clients of a group that are not available are left out (the whole group: any available take over).
    """

    count: int | None = None
    fraction: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.count, self.fraction)

    def draw(self, round: int, key: Key, available: Tensor) -> Tensor:
        """-> the ids of this round's group."""
        n = len(available)
        size = _cohort(self.count, self.fraction, n)
        groups = math.ceil(n / size)
        order = _order(self.seed, round // groups, n)
        group = order[(round % groups) * size :][:size]
        present = group[available[group]]
        return present if len(present) else _some(key, available.nonzero().squeeze(1), size)


@dataclass(frozen=True, slots=True)
class available:
    """M clients, uniform among those that are awake: client i is awake in a round with probability a_i(round).

    a_i = probability (1 + swing sin(2 pi (round / period + i / N))), clipped to [0, 1]: with `swing` > 0 and a `period`
    in rounds, time zones come and go. If nobody is awake, one available client is taken.
    """

    count: int | None = None
    fraction: float | None = None
    probability: float = 0.8
    swing: float = 0.0
    period: int = 24

    def __post_init__(self) -> None:
        _check(self.count, self.fraction)
        require(0 < self.probability <= 1, f"probability: in (0, 1]; got {self.probability}")
        require(0 <= self.swing <= 1, f"swing: in [0, 1]; got {self.swing}")
        require(self.period >= 1, f"period: at least 1 round; got {self.period}")

    def draw(self, round: int, key: Key, available: Tensor) -> Tensor:
        """-> [<= M] ids."""
        n = len(available)
        phase = round / self.period + torch.arange(n) / n
        chance = self.probability * (1 + self.swing * torch.sin(2 * math.pi * phase))
        awake = available & (random.uniform(random.fold(key, "awake"), n) < chance)
        if not awake.any():
            return _some(key, available.nonzero().squeeze(1), 1)
        return _some(key, awake.nonzero().squeeze(1), _cohort(self.count, self.fraction, n))
