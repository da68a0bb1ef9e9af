"""Averaging of the iterates.

Symbols: w_r [d] the model after r rounds; K rounds; skip: rounds before the average begins; order: how fast it forgets.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from taciturn.core.errors import require
from taciturn.core.state import State
from taciturn.core.types import ServerOptimizer
from taciturn.core.vector import Vector
from taciturn.server.fedopt import sgd


@dataclass(frozen=True, slots=True)
class averaged:
    """Polyak and Ruppert: train with `server`, and evaluate and keep wbar = mean of w_skip .. w_(K-1).

    The clients train from w_K as before; wbar is what is measured and saved. The average ends one step before w_K, as in
    the theory; up to round `skip` it is the last of them. State on the server: "average" [d] float64, "rounds" [], and that
    of `server`. Source: Polyak & Juditsky 1992; Philippenko & Dieuleveut 2023, section 2.
    """

    server: ServerOptimizer = field(default_factory=sgd)
    skip: int = 0

    def __post_init__(self) -> None:
        require(self.skip >= 0, f"averaged.skip: at least 0 rounds; got {self.skip}")

    def init(self, x: Vector) -> State:
        """The average is x until there is more to average."""
        rounds = torch.zeros((), dtype=torch.int64, device=x.device)
        return {"average": x.to(torch.float64), "rounds": rounds, "server": self.server.init(x)}

    def step(self, x: Vector, update: Vector, state: State) -> tuple[Vector, State]:
        """w_r joins the average, then the server steps from it."""
        rounds = state["rounds"] + 1
        share = 1.0 / (rounds - self.skip).clamp(min=1).to(torch.float64)
        average = state["average"] + share * (x - state["average"])
        y, inner = self.server.step(x, update, state.get("server", {}))
        return y, {"average": average, "rounds": rounds, "server": inner}


@dataclass(frozen=True, slots=True)
class recent:
    """Train with `server`, and evaluate and keep a mean of recent models: wbar <- wbar + share (w_r - wbar).

        share = (order + 1) / (r + order)        so wbar = w_1 at r = 1; a horizon of about r / (order + 1) rounds

    The horizon grows with the run, so there is nothing to tune: early models, far from the last, are forgotten, and late
    ones, which swing around a point with their cohorts, are averaged. The clients train from w_r as before. State on the
    server: "average" [d] float64, "rounds" [], and that of `server`. Source: polynomial-decay averaging, Shamir & Zhang
    2013, section 4.
    """

    server: ServerOptimizer = field(default_factory=sgd)
    order: float = 8.0

    def __post_init__(self) -> None:
        require(self.order >= 0, f"recent.order: at least 0; got {self.order}")

    def init(self, x: Vector) -> State:
        """The average is x until a round is done."""
        return averaged(self.server).init(x)

    def step(self, x: Vector, update: Vector, state: State) -> tuple[Vector, State]:
        """The server steps, and w_r joins the average."""
        y, inner = self.server.step(x, update, state.get("server", {}))
        rounds = state["rounds"] + 1
        share = (self.order + 1) / (rounds + self.order).to(torch.float64)
        average = state["average"] + share * (y - state["average"])
        return y, {"average": average, "rounds": rounds, "server": inner}
