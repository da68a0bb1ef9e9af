"""A rule that looks while clients train, for tests of the seam that dynamic synchronisation uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Watch:
    """Clients tell ||u||^2 every two steps; the server stops when the mean exceeds theta, which then doubles."""

    silent: ClassVar[bool] = False
    theta: float = 0.05
    local: bool = False

    def init(self):
        return {"theta": torch.tensor(self.theta)}

    def schedule(self, epoch_steps):
        return torch.full_like(epoch_steps, 7), 2

    def observe(self, u, state):
        norm = u.square().sum()
        go = norm <= state["theta"] if self.local else torch.ones((), dtype=torch.bool)
        return {"norm": norm}, go

    def stop(self, seen, done, state):
        return not self.local and bool(seen.payload["norm"].mean() > state["theta"])

    def update(self, state, done, stats, change):
        return {"theta": state["theta"] * 2}
