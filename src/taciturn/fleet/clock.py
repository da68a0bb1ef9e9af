"""Simulated seconds of a round: no clock is read, so two runs, and all engines, agree on them.

In each exchange of a round the server sends, a client works, and it answers:

    down_i = bytes / down + latency / 2      compute_i = local steps x step      up_i = bytes / up + latency / 2

and the next exchange begins when the slowest of them has answered. A client arrives with the last; the round ends when all
have arrived whose answer the server gets, or at the deadline where one is missing.

Symbols: N clients in all; M clients `ids` [M] of a round; S exchanges; work [S, 3, M] int64 bytes down, local steps, bytes
up; P profiles; W ways to take a local step (on quantized weights, in bfloat16), way [M] int64 that of each client, 0 the
plain one in float32; d deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taciturn.core import random
from taciturn.core.random import Key
from taciturn.core.types import LOST
from taciturn.fleet.fleets import Fleet
from taciturn.fleet.profile import Operator

PHASES = ("down", "compute", "up", "wait")

# what a client counts that arrives after t seconds; 0: it is too late, and left out
LATE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "drop": lambda t, d: (t <= d).to(t.dtype),
    "discount": lambda t, d: (d / t).clamp(max=1.0),
}


@dataclass(frozen=True)
class Clock:
    """The fleet of a run, as seconds. device [N]: profile of each client; up, down, latency, availability [P].

    steps [W, P]: seconds of a local step, the plain one first.
    """

    device: Tensor
    steps: Tensor
    up: Tensor
    down: Tensor
    latency: Tensor
    availability: Tensor
    deadline: float | None = None
    late: str = "drop"

    @classmethod
    def of(
        cls,
        fleet: Fleet,
        clients: int,
        ways: Sequence[Sequence[Operator]],
        key: Key,
        deadline: float | None = None,
        late: str = "drop",
    ) -> Clock:
        """Every client gets a device. ways: the operators of one local step, in each way. key: of the run."""
        rows = [(p.up, p.down, p.latency, p.availability) for p in fleet.profiles]
        up, down, latency, availability = torch.tensor(rows, dtype=torch.float64).unbind(1)
        steps = [[profile.step_seconds(operators) for profile in fleet.profiles] for operators in ways]
        device = fleet.assign(clients, random.fold(key, "fleet"))
        return cls(device, torch.tensor(steps, dtype=torch.float64), up, down, latency, availability, deadline, late)

    def phases(self, ids: Tensor, work: Tensor, way: Tensor | int = 0) -> Tensor:
        """Seconds [S, 3, M] that a client receives, works and sends in each exchange."""
        mine, (down, steps, up) = self.device[ids], work.to(torch.float64).unbind(1)
        half = self.latency[mine] / 2
        return torch.stack(
            [
                down / self.down[mine] + (down > 0) * half,
                steps * self.steps[way, mine],
                up / self.up[mine] + (up > 0) * half,
            ],
            1,
        )

    def arrivals(self, phases: Tensor) -> Tensor:
        """Phases [S, 3, M] -> seconds until the last answer of each has arrived [M]."""
        spent = phases.sum(1)
        return spent[:-1].amax(1).sum() + spent[-1]

    def share(self, ids: Tensor, work: Tensor, way: Tensor | int = 0) -> Tensor:
        """What each counts because of its time [M] in 0 .. 1; 0: too late."""
        arrivals = self.arrivals(self.phases(ids, work, way))
        return torch.ones_like(arrivals) if self.deadline is None else LATE[self.late](arrivals, self.deadline)

    def round(self, ids: Tensor, work: Tensor, status: Tensor, way: Tensor | int = 0) -> dict[str, Any]:
        """A round for the record: its seconds; each client's device, and its seconds by phase, summed over exchanges."""
        phases = self.phases(ids, work, way)
        arrivals, got = self.arrivals(phases), status < LOST
        seconds = float(arrivals[got].max()) if got.any() else 0.0
        if self.deadline is not None and not got.all():
            seconds = max(seconds, self.deadline)
        busy = phases.sum(0)
        table = torch.cat([busy, (seconds - busy.sum(0)).clamp(min=0.0).unsqueeze(0)])
        rows = {name: [_rounded(value) for value in row] for name, row in zip(PHASES, table.tolist(), strict=True)}
        return {"round": seconds, "device": self.device[ids].tolist(), **rows}

    def reachable(self, key: Key) -> Tensor:
        """Who can be reached in a round [N] bool. Where nobody can, the server asks again. key: of the round."""
        if bool((self.availability >= 1).all()):
            return torch.ones(len(self.device), dtype=torch.bool)
        chance, attempt = self.availability[self.device], 0
        while True:
            found = random.uniform(random.fold(key, "available", attempt), len(chance)) < chance
            if found.any():
                return found
            attempt += 1


def _rounded(seconds: float) -> float:
    """Six digits: a record is read by people, and long cohorts make long lines."""
    return float(f"{seconds:.6g}")
