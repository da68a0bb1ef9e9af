"""A solver for small smooth problems that minimizes instead of taking a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from taciturn.core.errors import require
from taciturn.core.state import State
from taciturn.core.types import Batch, Oracle, Split
from taciturn.core.vector import Vector
from taciturn.solvers.optimizers import Schedule
from taciturn.solvers.schedules import constant


@dataclass(frozen=True, slots=True)
class lbfgs:
    """(y, v) <- argmin f(y, v) on the batch: `torch.optim.LBFGS` with a strong Wolfe line search, until max |g| is at most
    `tolerance` or `iterations` are done. One local step is a whole solve.

    Meant for batches that hold all data of a client, and small problems: it looks at numbers as it goes, so clients run
    one after the other. The learning rate's schedule does not touch it. Source: Liu & Nocedal 1989.
    """

    iterations: int = 100
    tolerance: float = 1e-9
    history: int = 20
    schedule: ClassVar[Schedule] = constant()

    def __post_init__(self) -> None:
        require(self.iterations >= 1, f"lbfgs.iterations: at least 1; got {self.iterations}")
        require(self.tolerance > 0, f"lbfgs.tolerance: above 0; got {self.tolerance}")
        require(self.history >= 1, f"lbfgs.history: at least 1; got {self.history}")

    def init(self, split: Split) -> State:
        """Nothing is kept between rounds."""
        return {}

    def begin(self, x: Vector, v: Vector, state: State) -> State:
        """y = x."""
        return {"y": x, "v": v}

    def step(self, local: State, batch: Batch, oracle: Oracle, lr_scale: Tensor) -> tuple[State, Tensor]:
        """One solve, from where y and v are."""
        d, losses = len(local["y"]), []
        z = torch.nn.Parameter(torch.cat([local["y"], local["v"]]).detach())
        optimizer = torch.optim.LBFGS(
            [z], max_iter=self.iterations, max_eval=4 * self.iterations, tolerance_grad=self.tolerance,
            tolerance_change=0.0, history_size=self.history, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Tensor:
            loss, *gradient = oracle(z[:d].detach(), z[d:].detach(), batch)
            z.grad = torch.cat(gradient)
            losses.append(loss)
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        found = z.detach()
        return local | {"y": found[:d], "v": found[d:]}, losses[0]

    def message(self, local: State, u: Vector) -> tuple[Vector, State]:
        """u itself."""
        return u, {}

    def affine(self) -> None:
        """Not affine."""
        return
