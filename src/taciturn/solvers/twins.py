"""Personalised models beside the shared one, for `partition = twins`: the two pull at each other.

Symbols: x [d] the model received; y [d] the shared model on its way, v [d] the client's own; f the loss of a batch; g its
gradient; lam the pull. The oracle's model is the personal one (partition/twins.py): oracle(y, w, batch) -> f(w), 0, g(w).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from taciturn.core.errors import MethodError, require
from taciturn.core.state import State
from taciturn.core.types import Batch, Oracle, Solver, Split
from taciturn.core.vector import Layout, Vector
from taciturn.solvers.blocks import check_stateless, one_schedule
from taciturn.solvers.optimizers import Schedule, sgd
from taciturn.solvers.schedules import constant


def _refuse_alone(part: Any, split: Split) -> None:
    """Errors: `MethodError` for a split without a personal twin of all that is shared."""
    if split.personal != split.layout:
        raise MethodError(
            f"{type(part).__name__}: each client needs a whole model of its own beside the shared one, of the same layout; "
            f"this partition shares {split.layout.d} values and keeps {split.personal.d} personal; use partition = twins"
        )


@dataclass(frozen=True, slots=True)
class ditto:
    """A step of solver u on f(y), and a step of solver v on f(v) + (lam / 2) |v - x|^2, on the same batch.

    The update is that of y alone, as if nothing were personal; v [d] is kept on the client from round to round. Needs
    partition = twins. The reported loss is f(v), before the step. u and v work each on a vector of d values, with the
    learning rates of their own and one schedule; neither may keep a state between rounds.
    Source: Li, Hu, Beirami & Smith 2021 (arXiv 2012.04221), Algorithm 1. Departure: v takes as many steps as y, on the
    same batches, where the paper gives it a number of its own.
    Errors: `MethodError` for another partition, or a solver that keeps a state.
    """

    lam: float = 0.1
    u: Solver = sgd()
    v: Solver = sgd()

    def __post_init__(self) -> None:
        require(self.lam >= 0, f"ditto.lam: at least 0; got {self.lam}")
        one_schedule("ditto", self.u, self.v)

    @property
    def schedule(self) -> Schedule:
        """That of u and v."""
        return self.u.schedule

    def init(self, split: Split) -> State:
        """Nothing is kept besides v."""
        _refuse_alone(self, split)
        check_stateless(replace(split, personal=Layout((), ()), v0=split.v0[:0]), self.u, self.v)  # what each knows
        return {}

    def begin(self, x: Vector, v: Vector, state: State) -> State:
        """The records of u, which knows no v, and of v, which knows no y."""
        return _paired(self.u.begin(x, x[:0], {}), self.v.begin(x[:0], v, {}), x)

    def step(self, local: State, batch: Batch, oracle: Oracle, lr_scale: Tensor) -> tuple[State, Tensor]:
        """One step of each."""
        x, none = local["x"], local["x"][:0]

        def shared(y: Vector, _: Vector, batch: Batch) -> tuple[Tensor, Vector, Vector]:
            loss, _, g = oracle(x, y, batch)
            return loss, g, none

        def personal(_: Vector, v: Vector, batch: Batch) -> tuple[Tensor, Vector, Vector]:
            loss, _, g = oracle(x, v, batch)
            return loss, none, g + self.lam * (v - x)

        u, _ = self.u.step(local["of u"] | {"y": local["y"], "v": none}, batch, shared, lr_scale)
        v, loss = self.v.step(local["of v"] | {"y": none, "v": local["v"]}, batch, personal, lr_scale)
        return _paired(u, v, x), loss

    def message(self, local: State, u: Vector) -> tuple[Vector, State]:
        """What u makes of the drift of y."""
        return self.u.message(local["of u"], u)[0], {}

    def affine(self) -> tuple[float, float] | None:
        """Not affine: two gradients a step."""
        return None


def _paired(u: State, v: State, x: Vector) -> State:
    """Two records as one: y is u's, v is v's, the rest of each stays its own."""
    of_u, of_v = ({name: t for name, t in own.items() if name not in ("y", "v")} for own in (u, v))
    return {"y": u["y"], "v": v["v"], "x": x, "of u": of_u, "of v": of_v}


@dataclass(frozen=True, slots=True)
class pfedme:
    """v ~ argmin over theta of f(theta) + (lam / 2) |theta - y|^2;  y <- y - lr lam (y - v).

    The argmin takes `inner_steps` gradient steps of rate local_lr on the batch of the step. They begin at x in every round
    and go on from the last v within it, as in the authors' code; the paper leaves it open. The update is that of y; v [d]
    is kept on the client, to be evaluated. Needs partition = twins; server = sgd(lr = beta) and aggregator = mean are the
    paper's x <- (1 - beta) x + beta mean y. lr is scaled by the schedule, local_lr is not. The reported loss is f(v)
    before the inner steps.
    Source: Dinh, Tran & Nguyen 2020 (arXiv 2006.08848), Algorithm 1. Errors: `MethodError` for another partition.
    """

    lam: float = 15.0
    inner_steps: int = 5
    lr: float = 0.005
    local_lr: float = 0.01
    schedule: Schedule = constant()

    def __post_init__(self) -> None:
        require(self.inner_steps >= 1, f"pfedme.inner_steps: at least 1; got {self.inner_steps}")
        for name in ("lam", "lr", "local_lr"):
            require(getattr(self, name) >= 0, f"pfedme.{name}: at least 0; got {getattr(self, name)}")

    def init(self, split: Split) -> State:
        """Nothing is kept besides v."""
        _refuse_alone(self, split)
        return {}

    def begin(self, x: Vector, v: Vector, state: State) -> State:
        """y = v = x."""
        return {"y": x, "v": x}

    def step(self, local: State, batch: Batch, oracle: Oracle, lr_scale: Tensor) -> tuple[State, Tensor]:
        """The inner steps on v, and one step of y."""
        y, v, losses = local["y"], local["v"], []
        for _ in range(self.inner_steps):
            loss, _, g = oracle(y, v, batch)
            v = v - self.local_lr * (g + self.lam * (v - y))
            losses.append(loss)
        return {"y": y - (self.lr * lr_scale * self.lam) * (y - v), "v": v}, losses[0]

    def message(self, local: State, u: Vector) -> tuple[Vector, State]:
        """u itself."""
        return u, {}

    def affine(self) -> tuple[float, float] | None:
        """Not affine."""
        return None
