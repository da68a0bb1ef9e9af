"""What threshold ends a round: Theta. Every exported name of `taciturn.sync.thresholds` is a part, `theta = ..` of fda.

Symbols: n blocks done in the round; H estimate of the models' variance at a look, the round ends when H > Theta; V the
variance at the end of a round; M most blocks; rho what the messages of a round cost, in blocks of local work; p growth
exponent of the variance, V ~ n^p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from taciturn.core.errors import require
from taciturn.core.state import State

__all__ = ["adaptive", "ema", "fixed", "plain", "power", "ratio"]

Look = tuple[float, float]  # (n, H) of a look at the clients in this round


class Threshold(Protocol):
    """How Theta moves, within a round and from one to the next. State: float64 scalars."""

    @property
    def most(self) -> int:
        """M where the user gives none."""
        ...

    def init(self) -> State:
        """Before the first round."""
        ...

    def first(self, rho: float, state: State) -> float:
        """Blocks before the first look."""
        ...

    def at(self, looks: Sequence[Look], rho: float, state: State) -> float:
        """Theta at the last of these looks."""
        ...

    def after(self, looks: Sequence[Look], rho: float, state: State) -> float:
        """Blocks done at the next look."""
        ...

    def alone(self, most: int, rho: float, state: State) -> float:
        """Most blocks of a client that stops itself: its drift may never pass Theta."""
        ...

    def update(self, state: State, looks: Sequence[Look], n: float, v: float, most: int, rho: float) -> State:
        """The state for the next round. n, v: how the round ended."""
        ...


_NEAR = 0.9


def _number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class fixed:
    """Theta = value in every round, tuned by hand. Source: FDA, arXiv 2405.20988."""

    most: ClassVar[int] = 10
    value: float = 1.0

    def __post_init__(self) -> None:
        require(self.value >= 0, f"fixed: a threshold of at least 0; got {self.value}")

    def init(self) -> State:
        """No state."""
        return {"theta": _number(self.value)}

    def first(self, rho: float, state: State) -> float:
        """One block."""
        return 1.0

    def at(self, looks: Sequence[Look], rho: float, state: State) -> float:
        """The value."""
        return self.value

    def after(self, looks: Sequence[Look], rho: float, state: State) -> float:
        """One block more."""
        return looks[-1][0] + 1.0

    def alone(self, most: int, rho: float, state: State) -> float:
        """M."""
        return float(most)

    def update(self, state: State, looks: Sequence[Look], n: float, v: float, most: int, rho: float) -> State:
        """As it was."""
        return state


@dataclass(frozen=True, slots=True)
class ratio:
    """log Theta <- (1 - beta) log Theta + beta (log V + gamma log((M/2) / n)); the first round is one block.

    If V grows linearly with blocks, V (M/2) / n is the variance after M/2 blocks, so every round aims at M/2. With V ~ n^p
    a deviation of log n from log M/2 is multiplied by 1 - beta gamma / p from round to round (beta or gamma being 1):
    `plain` (both 1) is published and swings for p < 1/2. Theta stays where V is not finite. Source: FDA-Opt, arXiv
    2505.04535; gamma and beta are ours.
    """

    most: ClassVar[int] = 10
    gamma: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.gamma <= 1, f"gamma: above 0, at most 1; got {self.gamma}")
        require(0 < self.beta <= 1, f"beta: above 0, at most 1; got {self.beta}")

    def init(self) -> State:
        """Below everything, so that the first look ends the first round."""
        return {"theta": _number(-math.inf)}

    def first(self, rho: float, state: State) -> float:
        """One block."""
        return 1.0

    def at(self, looks: Sequence[Look], rho: float, state: State) -> float:
        """Theta of this round."""
        return float(state["theta"])

    def after(self, looks: Sequence[Look], rho: float, state: State) -> float:
        """One block more."""
        return looks[-1][0] + 1.0

    def alone(self, most: int, rho: float, state: State) -> float:
        """M."""
        return float(most)

    def update(self, state: State, looks: Sequence[Look], n: float, v: float, most: int, rho: float) -> State:
        """The rule above."""
        if not math.isfinite(v):
            return state
        goal, before = v * (most / 2 / n) ** self.gamma, float(state["theta"])
        if self.beta < 1 and before > 0 and goal > 0:
            goal = before ** (1 - self.beta) * goal**self.beta
        return {"theta": _number(goal)}


def plain() -> ratio:
    """Theta <- V (M/2) / n: `ratio()`, the published rule."""
    return ratio()


def power(gamma: float = 0.5) -> ratio:
    """Theta <- V ((M/2) / n)^gamma: `ratio(gamma=gamma)`."""
    return ratio(gamma=gamma)


def ema(beta: float = 0.5) -> ratio:
    """log Theta <- (1 - beta) log Theta + beta log(V (M/2) / n): `ratio(beta=beta)`."""
    return ratio(beta=beta)


@dataclass(frozen=True, slots=True)
class adaptive:
    """Theta = H (n* / n)^p: the variance that is expected at n* blocks, n* = (h r rho^2)^(1/3), r = p / (2 - p).

    n* is where a block more gains less than the round's blocks and messages did in the mean (the marginal value theorem,
    Charnov 1976). Two laws say where that is. If a round gains as much as the clients drift, n^(p/2), it is r rho: far out
    while they move straight ahead (p near 2), early once they reach their own optima (p near 0). If it gains n / (n + h),
    half of what there is to gain in h blocks, it is sqrt(h rho). At n* the first law has the slope of the second for
    h = r n*; n* follows from the geometric mean of that h and `horizon`, with weights trust and 1 - trust:

        n* = (r^trust horizon^(1 - trust) rho)^(1 / (2 - trust))

    start: most blocks of the first round; from random weights a long one can break the model for good (docs/fda.md). p is
    measured from one look to the next and remembered; `memory` is the weight of what is new. Looks: at half of the expected
    n*, at n*, and on, at most twice as far, where n* has moved away. Where clients stop themselves p stays 1.
    Source: ours.
    """

    most: ClassVar[int] = 200
    horizon: float = 1.5
    trust: float = 0.5
    memory: float = 0.5
    start: float = math.inf

    def __post_init__(self) -> None:
        require(self.start > 0, f"start: blocks, above 0; got {self.start}")
        require(self.horizon > 0, f"horizon: blocks, above 0; got {self.horizon}")
        require(0 <= self.trust <= 1, f"trust: between 0 and 1; got {self.trust}")
        require(0 <= self.memory <= 1, f"memory: between 0 and 1; got {self.memory}")

    def init(self) -> State:
        """p = 1; clients that stop themselves stop at their first look."""
        return {"theta": _number(-math.inf), "p": _number(1.0), "reach": _number(self.start)}

    def goal(self, p: float, rho: float) -> float:
        """n*, for an exponent below 2.

        >>> round(adaptive().goal(1.0, 10.0), 2), adaptive(trust=1.0).goal(1.0, 10.0)
        (5.31, 10.0)
        """
        t = self.trust
        half: float = (p / (2 - p)) ** t * self.horizon ** (1 - t)
        n: float = (half * rho) ** (1 / (2 - t))
        return n

    def aim(self, p: float, rho: float, state: State) -> float:
        """n*, as far as this round may reach."""
        return min(self.goal(p, rho), float(state["reach"]))

    def first(self, rho: float, state: State) -> float:
        """n* / 2."""
        return self.aim(float(state["p"]), rho, state) / 2

    def exponent(self, looks: Sequence[Look], state: State) -> float:
        """p with what the last two looks say: the slope of log H over log n, held between 0.05 and 1.9."""
        p = float(state["p"])
        if len(looks) < 2:
            return p
        (n0, h0), (n1, h1) = looks[-2:]
        if not (n1 > n0 and h0 > 0 and 0 < h1 < math.inf):
            return p
        slope = math.log(h1 / h0) / math.log(n1 / n0)
        return (1 - self.memory) * p + self.memory * min(max(slope, 0.05), 1.9)

    def at(self, looks: Sequence[Look], rho: float, state: State) -> float:
        """The formula above, with n* a little smaller: who is almost there is not asked to go on."""
        p, (n, h) = self.exponent(looks, state), looks[-1]
        theta: float = h * (_NEAR * self.aim(p, rho, state) / n) ** p
        return theta

    def after(self, looks: Sequence[Look], rho: float, state: State) -> float:
        """n*, at most twice as far as now."""
        return min(2 * looks[-1][0], self.aim(self.exponent(looks, state), rho, state))

    def alone(self, most: int, rho: float, state: State) -> float:
        """2 n*, at least one block."""
        return min(float(most), max(1.0, 2 * self.aim(float(state["p"]), rho, state)))

    def update(self, state: State, looks: Sequence[Look], n: float, v: float, most: int, rho: float) -> State:
        """p, and the variance expected at n* as the threshold of clients that stop themselves."""
        if not math.isfinite(v):
            return state
        p, after = self.exponent(looks, state), {"reach": _number(math.inf)}
        return {"theta": _number(v * (self.aim(p, rho, after) / n) ** p), "p": _number(p)} | after
