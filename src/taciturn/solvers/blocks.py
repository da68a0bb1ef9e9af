"""Shared and personal parameters, each with an optimizer of its own: one after the other, or both at once.

Symbols: y [d] shared, v [p] personal parameters of a client; g_y, g_v gradients; t [] local steps of this round. A block's
optimizer is any solver that keeps nothing between rounds; it sees its block alone, the other is empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taciturn.core.errors import MethodError, require
from taciturn.core.state import State, where
from taciturn.core.types import Batch, Oracle, Solver, Split
from taciturn.core.vector import Vector
from taciturn.solvers.optimizers import Schedule, sgd


def once(oracle: Oracle) -> Oracle:
    """The oracle, which is asked but once where two optimizers look at the very same point."""
    seen: list[tuple[Vector, Vector, tuple[Tensor, Vector, Vector]]] = []

    def asked(y: Vector, v: Vector, batch: Batch) -> tuple[Tensor, Vector, Vector]:
        for at_y, at_v, answer in seen:
            if y is at_y and v is at_v:
                return answer
        seen.append((y, v, oracle(y, v, batch)))
        return seen[-1][2]

    return asked


def check_blocks(split: Split, solver: str, u: Solver, v: Solver, v_steps: int = 1) -> None:
    """Errors: `MethodError` where a block gets no steps, steps have no block, or an optimizer would lose what it keeps."""
    if v_steps and not split.personal.d:
        raise MethodError(
            f"method.solver = {solver} trains personal parameters, and this partition keeps none; use partition = "
            'layers(personal = "head"), or lora with a personal part'
        )
    if split.personal.d and not v_steps:
        raise MethodError(f"method.solver = {solver}: with v_steps = 0 the personal parameters would never be trained")
    check_stateless(split, u, v)


def check_stateless(split: Split, u: Solver, v: Solver) -> None:
    """Errors: `MethodError` for an optimizer of a block that would lose what it keeps between rounds."""
    for field, one in (("u", u), ("v", v)):
        if one.init(split):
            kind = type(one).__name__
            raise MethodError(f"method.solver.{field} = {kind} keeps a state between rounds; use sgd, adamw, prox or lbfgs")


def one_schedule(solver: str, u: Solver, v: Solver) -> None:
    """Errors: `ConfigError` for optimizers of two schedules: a round has one factor."""
    same = u.schedule == v.schedule
    require(same, f"{solver}: u and v have one schedule; got u.schedule = {u.schedule}, v.schedule = {v.schedule}")


def _begin(y: Solver, v: Solver, x: Vector, personal: Vector) -> State:
    """y = x, v, t = 0 and the records of the two optimizers, which hold no weights."""
    weights: State = {"y": x, "v": personal, "t": torch.zeros((), dtype=torch.int64, device=x.device)}
    return weights | _named("y", y.begin(x, personal[:0], {})) | _named("v", v.begin(personal, x[:0], {}))


def _named(block: str, own: State) -> State:
    """An optimizer's record without weights, as part of a record of both blocks."""
    return {f"{block}.{name}": t for name, t in own.items() if name not in ("y", "v")}


def _move(solver: Solver, block: str, local: State, batch: Batch, oracle: Oracle, lr_scale: Tensor) -> tuple[State, Tensor]:
    """A step of one block ("y" or "v") -> the record, and the loss where it began."""
    y, v = local["y"], local["v"]

    def alone(z: Vector, none: Vector, batch: Batch) -> tuple[Tensor, Vector, Vector]:
        loss, g_y, g_v = oracle(z, v, batch) if block == "y" else oracle(y, z, batch)
        return loss, g_y if block == "y" else g_v, none

    rest = {name.removeprefix(f"{block}."): t for name, t in local.items() if name.startswith(f"{block}.")}
    own, loss = solver.step({"y": local[block], "v": local[block][:0], **rest}, batch, alone, lr_scale)
    return local | {block: own["y"]} | _named(block, own), loss


@dataclass(frozen=True, slots=True)
class alternating:
    """FedAlt: the first v_steps local steps move v alone, by the optimizer v, y at rest; all later ones y alone, by u.

        v <- v - lr_v g_v(y, v)   v_steps times;   y <- y - lr_u g_y(y, v)   until the round ends

    for plain SGD. How many steps the shared block gets is the sync rule's: `every(steps = v_steps + u_steps)`. With a
    personal head this is FedRep as well. Errors: `MethodError` where nothing is personal.
    Source: Pillutla et al. 2022 (arXiv 2204.03809), algorithm FedAlt; Collins et al. 2021 (FedRep).
    """

    v_steps: int = 5
    v: Solver = sgd()
    u: Solver = sgd()

    def __post_init__(self) -> None:
        require(self.v_steps >= 0, f"alternating.v_steps: at least 0; got {self.v_steps}")
        one_schedule("alternating", self.u, self.v)

    @property
    def schedule(self) -> Schedule:
        """That of u and v."""
        return self.u.schedule

    def init(self, split: Split) -> State:
        """Nothing is kept between rounds but v."""
        check_blocks(split, "alternating", self.u, self.v, self.v_steps)
        return {}

    def begin(self, x: Vector, v: Vector, state: State) -> State:
        """y = x."""
        return _begin(self.u, self.v, x, v)

    def step(self, local: State, batch: Batch, oracle: Oracle, lr_scale: Tensor) -> tuple[State, Tensor]:
        """One step of the block whose turn it is."""
        ask = once(oracle)
        moved, loss = _move(self.u, "y", local, batch, ask, lr_scale)
        if self.v_steps:
            other, _ = _move(self.v, "v", local, batch, ask, lr_scale)
            moved = where(local["t"] < self.v_steps, other, moved)
        return moved | {"t": local["t"] + 1}, loss

    def message(self, local: State, u: Vector) -> tuple[Vector, State]:
        """u itself."""
        return u, {}

    def affine(self) -> None:
        """Not affine: the blocks take turns."""
        return


@dataclass(frozen=True, slots=True)
class joint:
    """FedSim: v and y move at once, from gradients at one point and batch, each by an optimizer of its own.

        (v, y) <- (v - lr_v g_v(y, v), y - lr_u g_y(y, v))

    for plain SGD; with equal optimizers it is that optimizer on both, and with a personal head FedPer.
    Errors: `MethodError` where nothing is personal.
    Source: Pillutla et al. 2022 (arXiv 2204.03809), algorithm FedSim; Arivazhagan et al. 2019 (FedPer).
    """

    v: Solver = sgd()
    u: Solver = sgd()

    def __post_init__(self) -> None:
        one_schedule("joint", self.u, self.v)

    @property
    def schedule(self) -> Schedule:
        """That of u and v."""
        return self.u.schedule

    def init(self, split: Split) -> State:
        """Nothing is kept between rounds but v."""
        check_blocks(split, "joint", self.u, self.v)
        return {}

    def begin(self, x: Vector, v: Vector, state: State) -> State:
        """y = x."""
        return _begin(self.u, self.v, x, v)

    def step(self, local: State, batch: Batch, oracle: Oracle, lr_scale: Tensor) -> tuple[State, Tensor]:
        """One step of both blocks."""
        ask = once(oracle)
        moved, loss = _move(self.u, "y", local, batch, ask, lr_scale)
        other, _ = _move(self.v, "v", local, batch, ask, lr_scale)
        own = {name: t for name, t in other.items() if name == "v" or name.startswith("v.")}
        return moved | own | {"t": local["t"] + 1}, loss

    def message(self, local: State, u: Vector) -> tuple[Vector, State]:
        """u itself."""
        return u, {}

    def affine(self) -> None:
        """Not affine in one step size."""
        return
