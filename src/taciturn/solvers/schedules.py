"""Learning rates over rounds: round (0, 1, ..) -> factor of the solver's learning rate.

Symbols: r round; W warm-up rounds; R rounds of the schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from taciturn.core.errors import require


@dataclass(frozen=True, slots=True)
class constant:
    """factor = min(1, (r + 1) / W): constant after a linear warm-up.

    >>> constant()(7), constant(warmup=4)(0)
    (1.0, 0.25)
    """

    warmup: int = 0

    def __post_init__(self) -> None:
        require(self.warmup >= 0, f"constant: warmup at least 0 rounds; got {self.warmup}")

    def __call__(self, round: int) -> float:
        """Round -> factor."""
        return min(1.0, (round + 1) / self.warmup) if self.warmup else 1.0


@dataclass(frozen=True, slots=True)
class cosine:
    """factor = floor + (1 - floor) (1 + cos(pi r / R)) / 2, after a linear warm-up; `floor` from round R on.

    >>> round(cosine(rounds=10)(0), 3), round(cosine(rounds=10, floor=0.1)(10), 3)
    (1.0, 0.1)
    """

    rounds: int
    floor: float = 0.0
    warmup: int = 0

    def __post_init__(self) -> None:
        require(self.rounds >= 1, f"cosine: rounds at least 1; got {self.rounds}")
        require(0 <= self.floor <= 1, f"cosine: floor in [0, 1]; got {self.floor}")
        require(self.warmup >= 0, f"cosine: warmup at least 0 rounds; got {self.warmup}")

    def __call__(self, round: int) -> float:
        """Round -> factor."""
        wave = (1 + math.cos(math.pi * min(1.0, round / self.rounds))) / 2
        return (self.floor + (1 - self.floor) * wave) * constant(self.warmup)(round)


@dataclass(frozen=True, slots=True)
class exponential:
    """factor = decay^(r // every): the factor falls by `decay` every `every` rounds.

    >>> exponential(decay=0.5, every=10)(20)
    0.25
    """

    decay: float
    every: int = 1

    def __post_init__(self) -> None:
        require(0 < self.decay <= 1, f"exponential: decay in (0, 1]; got {self.decay}")
        require(self.every >= 1, f"exponential: every at least 1 round; got {self.every}")

    def __call__(self, round: int) -> float:
        """Round -> factor."""
        return self.decay ** (round // self.every)


__all__ = ["constant", "cosine", "exponential"]
