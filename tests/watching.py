"""A rule that looks while clients train, for tests of the seam that dynamic synchronisation uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Watch:
    """Clients tell ||u||^2 every two steps; the server stops when the mean exceeds theta, which then doubles."""

    observer: ClassVar[str] = "server"
    theta: float = 0.05
    local: bool = False

    def init(self, x):
        return {"theta": torch.tensor(self.theta)}

    def schedule(self, epoch_steps, state):
        return torch.full_like(epoch_steps, 7), torch.full_like(epoch_steps, 2)

    def signal(self, state):
        return state

    def observe(self, u, told, signal):
        norm = u.square().sum()
        go = norm <= signal["theta"] if self.local else torch.ones((), dtype=torch.bool)
        return {"norm": norm}, go

    def watch(self, seen, plan, state):
        stop = not self.local and bool(seen.payload["norm"].mean() > state["theta"])
        return None if stop else torch.full_like(plan.limit, 2), state

    def update(self, state, plan, stats, spent, change):
        return {"theta": state["theta"] * 2}

    def tell(self, state):
        return {}
