"""A fixed amount of local work.

Symbols: epoch_steps [M] = ceil(n_i / b), the local steps of one pass over client i's data; limit [M] steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from taciturn.core.errors import require
from taciturn.core.state import State
from taciturn.core.types import Change, Observations, Payload
from taciturn.core.vector import Vector


@dataclass(frozen=True, slots=True)
class every:
    """Synchronise after a fixed number of local epochs or steps: the rule of FedAvg.

    epochs: passes over the client's own data; steps: where given, that many local steps instead, the
    same for all.
    pace "own": each client does its own epochs and waits; "longest": all do as many steps as the longest of the cohort,
    small clients going through their data again (FDA-Opt's convention). Silent: one exchange a round.
    Source: McMahan et al. 2017, Algorithm 1 (E epochs).
    """

    silent: ClassVar[bool] = True
    epochs: int = 1
    steps: int | None = None
    pace: Literal["own", "longest"] = "own"

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"epochs: at least 1; got {self.epochs}")
        require(self.steps is None or self.steps >= 1, f"steps: at least 1; got {self.steps}")

    def init(self) -> State:
        """No state."""
        return {}

    def schedule(self, epoch_steps: Tensor) -> tuple[Tensor, int]:
        """[M] steps per epoch -> ([M] limit, stride = the longest)."""
        limit = torch.full_like(epoch_steps, self.steps) if self.steps else epoch_steps * self.epochs
        if self.pace == "longest":
            limit = limit.max().expand_as(limit)
        return limit, int(limit.max())

    def observe(self, u: Vector, state: State) -> tuple[Payload, Tensor]:
        """Nothing to send; go on to the limit."""
        return {}, torch.ones((), dtype=torch.bool)

    def stop(self, seen: Observations, done: int, state: State) -> bool:
        """After one stride all have reached their limit."""
        return True

    def update(self, state: State, done: int, stats: dict[str, Tensor], change: Change) -> State:
        """No state."""
        return state
