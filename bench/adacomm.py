"""AdaComm, the rule of others that `bench.fda` compares with: the interval shrinks as the training loss does.

Symbols: E_0 epochs of the first round; F_r mean training loss of round r. Source: Wang & Joshi, MLSys 2019, equation 14.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from taciturn.core.types import OK


@dataclass(frozen=True)
class adacomm:
    """E_r = ceil(sqrt(F_r-1 / F_0) E_0), never above E_0. One exchange a round."""

    observer: ClassVar[str] = "nobody"
    first: int = 10

    def init(self, x: Any) -> dict[str, Any]:
        """No loss is known."""
        return {"start": torch.tensor(math.nan), "share": torch.tensor(1.0)}

    def schedule(self, epoch_steps: Any, state: dict[str, Any]) -> Any:
        """The epochs of this round, in one stride."""
        limit = epoch_steps * max(1, math.ceil(math.sqrt(float(state["share"])) * self.first - 1e-9))
        return limit, limit

    def signal(self, state: Any) -> dict[str, Any]:
        """Nothing: a deployment would send the number of epochs, 4 bytes."""
        return {}

    def observe(self, u: Any, told: Any, signal: Any) -> Any:
        """Go on."""
        return {}, torch.ones((), dtype=torch.bool)

    def watch(self, seen: Any, plan: Any, state: Any) -> Any:
        """One stride."""
        return None, state

    def update(self, state: Any, plan: Any, stats: Any, spent: Any, change: Any) -> dict[str, Any]:
        """The loss of this round against that of the first."""
        share = torch.where(stats["status"] == OK, plan.weights, 0.0)
        loss = (share * torch.where(share > 0, stats["loss"], 0.0)).sum() / share.sum()
        start = loss if math.isnan(float(state["start"])) else state["start"]
        return {"start": start, "share": (loss / start).clamp(max=1.0)}

    def tell(self, state: Any) -> dict[str, Any]:
        """Nothing."""
        return {}
