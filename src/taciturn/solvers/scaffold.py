"""Local steps without client drift: each client knows how its gradient differs from everybody's.

Symbols: x = [w, c] [2 d] what is shared, the model w [d] and the mean c [d] of all control variates; y = [w, c] on its way;
c_i [d] this client's control variate; g gradient; K local steps of the round; v [p] personal parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taciturn.core.errors import MethodError, require
from taciturn.core.extended import extended
from taciturn.core.state import State
from taciturn.core.types import Batch, Oracle, Split
from taciturn.core.vector import Vector
from taciturn.solvers.optimizers import Schedule
from taciturn.solvers.schedules import constant

PREFIX = "scaffold.control."


@dataclass(frozen=True, slots=True)
class scaffold:
    """w <- w - lr (g - c_i + c), K times; then c_i+ = c_i - c + (w received - w) / (K lr), and [w, c_i]'s changes are sent.

    c_i+ is the mean gradient along the way (Option II). Together with `aggregator = controlled`, which keeps w and c: 2 d
    values each way. On the client: c_i [d], 0 at first. lr is scaled by the schedule; a round of rate 0 leaves c_i.
    Personal layers take plain steps, v <- v - lr g.
    Source: Karimireddy et al. 2020 (arXiv 1910.06378), Algorithm 1, Option II. Errors: `MethodError` for a partition that
    shares nothing, that clients train unlike parts of, or whose base takes products; and within another solver.
    """

    lr: float = 0.1
    schedule: Schedule = constant()

    def __post_init__(self) -> None:
        require(self.lr > 0, f"scaffold.lr: above 0; got {self.lr}")

    def extend(self, split: Split) -> Split:
        """[w] -> [w, c], c = 0."""
        if not split.layout.d:
            raise MethodError("scaffold: this partition shares nothing, so there is no drift to correct; use solver = sgd")
        shared = split.layout.views(split.x0)
        return extended(split, {PREFIX + name: torch.zeros_like(tensor) for name, tensor in shared.items()})

    def init(self, split: Split) -> State:
        """c_i = 0 [d]."""
        if not any(name.startswith(PREFIX) for name in split.layout.names):
            raise MethodError("scaffold: it shares control variates beside the model, so it must be method.solver itself")
        return {"control": torch.zeros_like(_halves(split.x0)[0])}

    def begin(self, x: Vector, v: Vector, state: State) -> State:
        """y = x; rate [] counts up to K lr."""
        return {"y": x, "v": v, "control": state["control"], "rate": x.new_zeros(())}

    def step(self, local: State, batch: Batch, oracle: Oracle, lr_scale: Tensor) -> tuple[State, Tensor]:
        """One step on w and v."""
        loss, g_y, g_v = oracle(local["y"], local["v"], batch)
        (w, c), g, lr = _halves(local["y"]), _halves(g_y)[0], self.lr * lr_scale
        y = torch.cat([w - lr * (g - local["control"] + c), c])
        return local | {"y": y, "v": local["v"] - lr * g_v, "rate": local["rate"] + lr}, loss

    def message(self, local: State, u: Vector) -> tuple[Vector, State]:
        """[change of w, c_i+ - c_i], and c_i+."""
        moved, c, rate = _halves(u)[0], _halves(local["y"])[1], local["rate"]
        change = torch.where(rate > 0, -moved / rate - c, 0.0)
        return torch.cat([moved, change]), {"control": local["control"] + change}

    def affine(self) -> tuple[float, float] | None:
        """Not affine: c_i differs from client to client."""
        return None


def _halves(x: Vector) -> tuple[Vector, Vector]:
    """[2 d] -> [d], [d]."""
    w, c = x.chunk(2)
    return w, c
