"""Local optimizers, as pure functions of a record.

Symbols: y [d] local shared parameters; v [p] personal parameters; x [d] the model at the start of the round; g gradient;
m, s [d + p] first and second moments; t [] steps of this round. y and v take the same step; moments start at zero in
every round (stateless clients). One client's record has no client axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taciturn.core.errors import require
from taciturn.core.state import State
from taciturn.core.types import Batch, Oracle, Solver, Split
from taciturn.core.vector import Vector
from taciturn.solvers.schedules import constant

Schedule = Callable[[int], float]


def _clip(g_y: Tensor, g_v: Tensor, largest: float | None) -> tuple[Tensor, Tensor]:
    """Scale the whole gradient so that its norm is at most `largest`."""
    if largest is None:
        return g_y, g_v
    norm = torch.sqrt(g_y.square().sum() + g_v.square().sum())
    factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
    return g_y * factor, g_v * factor


def _debias(beta: float, t: Tensor) -> Tensor:
    """1 - beta^t without the cancellation that costs float32 half its digits: -expm1(t log beta)."""
    return -torch.expm1(t * math.log(beta)) if beta else torch.ones_like(t)


def _check(part: Any) -> None:
    name = type(part).__name__
    require(part.lr >= 0, f"{name}: lr at least 0; got {part.lr}")
    require(part.weight_decay >= 0, f"{name}: weight_decay at least 0; got {part.weight_decay}")
    require(part.clip is None or part.clip > 0, f"{name}: clip above 0; got {part.clip}")


@dataclass(frozen=True, slots=True)
class sgd:
    """g += weight_decay y;  m <- momentum m + g (m = g at t = 0);  y <- y - lr (g + momentum m if nesterov else m).

    `torch.optim.SGD` without dampening. clip: largest norm of the gradient over y and v, before weight decay.
    """

    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    clip: float | None = None
    schedule: Schedule = constant()

    def __post_init__(self) -> None:
        _check(self)
        require(0 <= self.momentum < 1, f"sgd: momentum in [0, 1); got {self.momentum}")

    def init(self, split: Split) -> State:
        """Nothing is kept between rounds."""
        return {}

    def begin(self, x: Vector, v: Vector, state: State) -> State:
        """y = x, m = 0."""
        return {"y": x, "v": v} | ({"m_y": torch.zeros_like(x), "m_v": torch.zeros_like(v)} if self.momentum else {})

    def step(self, local: State, batch: Batch, oracle: Oracle, lr_scale: Tensor) -> tuple[State, Tensor]:
        """One step on y and v."""
        loss, g_y, g_v = oracle(local["y"], local["v"], batch)
        g_y, g_v = _clip(g_y, g_v, self.clip)
        new = dict(local)
        for name, g in (("y", g_y), ("v", g_v)):
            z = local[name]
            if self.weight_decay:
                g = g + self.weight_decay * z
            if self.momentum:
                m = self.momentum * local[f"m_{name}"] + g
                new[f"m_{name}"] = m
                g = g + self.momentum * m if self.nesterov else m
            new[name] = z - (self.lr * lr_scale) * g
        return new, loss

    def message(self, local: State, u: Vector) -> tuple[Vector, State]:
        """u itself."""
        return u, {}

    def affine(self) -> tuple[float, float] | None:
        """(lr, 0) for plain SGD."""
        plain = not self.momentum and not self.weight_decay and self.clip is None
        return (self.lr, 0.0) if plain else None


@dataclass(frozen=True, slots=True)
class adamw:
    """m <- b1 m + (1 - b1) g;  s <- b2 s + (1 - b2) g^2;  y <- (1 - lr weight_decay) y - lr mhat / (sqrt(shat) + eps).

    mhat = m / (1 - b1^t), shat = s / (1 - b2^t): `torch.optim.AdamW`, with moments that start anew in every round.
    Source: Loshchilov & Hutter 2019, Algorithm 2.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = None
    schedule: Schedule = constant()

    def __post_init__(self) -> None:
        _check(self)
        require(0 <= self.betas[0] < 1 and 0 <= self.betas[1] < 1, f"adamw: betas in [0, 1); got {self.betas}")
        require(self.eps > 0, f"adamw: eps above 0; got {self.eps}")

    def init(self, split: Split) -> State:
        """Nothing is kept between rounds."""
        return {}

    def begin(self, x: Vector, v: Vector, state: State) -> State:
        """y = x, moments and t are zero."""
        moments = {f"{kind}_{name}": torch.zeros_like(z) for kind in "ms" for name, z in (("y", x), ("v", v))}
        return {"y": x, "v": v, "t": torch.zeros((), dtype=x.dtype, device=x.device), **moments}

    def step(self, local: State, batch: Batch, oracle: Oracle, lr_scale: Tensor) -> tuple[State, Tensor]:
        """One step on y and v."""
        loss, g_y, g_v = oracle(local["y"], local["v"], batch)
        g_y, g_v = _clip(g_y, g_v, self.clip)
        b1, b2 = self.betas
        t = local["t"] + 1
        lr = self.lr * lr_scale
        new = dict(local) | {"t": t}
        for name, g in (("y", g_y), ("v", g_v)):
            z = local[name]
            m = b1 * local[f"m_{name}"] + (1 - b1) * g
            s = b2 * local[f"s_{name}"] + (1 - b2) * g.square()
            root = torch.sqrt(s) / torch.sqrt(_debias(b2, t)) + self.eps
            new[name] = z * (1 - lr * self.weight_decay) - lr / _debias(b1, t) * m / root
            new[f"m_{name}"], new[f"s_{name}"] = m, s
        return new, loss

    def message(self, local: State, u: Vector) -> tuple[Vector, State]:
        """u itself."""
        return u, {}

    def affine(self) -> tuple[float, float] | None:
        """Not affine."""
        return None


@dataclass(frozen=True, slots=True)
class prox:
    """FedProx: the inner solver on f(y, v) + (mu / 2) ||y - x||^2, that is g_y + mu (y - x) in place of g_y.

    Wraps any solver; x is the model the round started from. The reported loss is f alone. Adds [d] to the record.
    Source: Li et al. 2020, Algorithm 2.
    """

    mu: float = 0.01
    solver: Solver = sgd()

    def __post_init__(self) -> None:
        require(self.mu >= 0, f"prox: mu at least 0; got {self.mu}")

    @property
    def schedule(self) -> Schedule:
        """The inner solver's."""
        return self.solver.schedule

    def init(self, split: Split) -> State:
        """What the inner solver keeps."""
        return self.solver.init(split)

    def begin(self, x: Vector, v: Vector, state: State) -> State:
        """The inner record, and x."""
        return self.solver.begin(x, v, state) | {"x": x}

    def step(self, local: State, batch: Batch, oracle: Oracle, lr_scale: Tensor) -> tuple[State, Tensor]:
        """One inner step with the proximal gradient."""

        def proximal(y: Vector, v: Vector, batch: Batch) -> tuple[Tensor, Vector, Vector]:
            loss, g_y, g_v = oracle(y, v, batch)
            return loss, g_y + self.mu * (y - local["x"]), g_v

        return self.solver.step(local, batch, proximal, lr_scale)

    def message(self, local: State, u: Vector) -> tuple[Vector, State]:
        """The inner solver's."""
        return self.solver.message(local, u)

    def affine(self) -> tuple[float, float] | None:
        """(lr, mu) if the inner solver is plain SGD."""
        inner = self.solver.affine()
        return None if inner is None else (inner[0], inner[1] + self.mu)
