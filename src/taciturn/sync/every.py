"""A fixed amount of local work.

Symbols: epoch_steps [M] = ceil(n_i / b), the local steps of one pass over client i's data; limit [M] steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from taciturn.core.errors import require
from taciturn.core.state import State
from taciturn.core.types import Change, Observations, Payload, Plan, Record, Spent
from taciturn.core.vector import Vector


@dataclass(frozen=True, slots=True)
class every:
    """Synchronise after a fixed number of local epochs or steps: the rule of FedAvg.

    epochs: passes over the client's own data; steps: where given, that many local steps instead, the
    same for all.
    pace "own": each client does its own epochs and waits; "longest": all do as many steps as the longest of the cohort,
    small clients going through their data again (FDA-Opt's convention). One exchange a round.
    Source: McMahan et al. 2017, Algorithm 1 (E epochs).
    """

    observer: ClassVar[Literal["nobody"]] = "nobody"
    epochs: int = 1
    steps: int | None = None
    pace: Literal["own", "longest"] = "own"

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"epochs: at least 1; got {self.epochs}")
        require(self.steps is None or self.steps >= 1, f"steps: at least 1; got {self.steps}")

    def init(self, x: Vector) -> State:
        """No state."""
        return {}

    def schedule(self, epoch_steps: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """[M] steps per epoch -> ([M] limit, [M] the same in one stride)."""
        limit = torch.full_like(epoch_steps, self.steps) if self.steps else epoch_steps * self.epochs
        if self.pace == "longest":
            limit = limit.max().expand_as(limit)
        return limit, limit

    def signal(self, state: State) -> Payload:
        """Nothing to say."""
        return {}

    def observe(self, u: Vector, told: Record, signal: Payload) -> tuple[Payload, Tensor]:
        """Nothing to send; go on to the limit."""
        return {}, torch.ones((), dtype=torch.bool)

    def watch(self, seen: Observations, plan: Plan, state: State) -> tuple[Tensor | None, State]:
        """After one stride all have reached their limit."""
        return None, state

    def update(self, state: State, plan: Plan, stats: Record, spent: Spent, change: Change) -> State:
        """No state."""
        return state

    def tell(self, state: State) -> dict[str, Any]:
        """Nothing."""
        return {}
