"""FedOpt: the server treats the negative average update as a gradient and lets a torch optimizer step.

Symbols: x [d] the model; update [d] the aggregate of the clients' changes; g = -update the pseudo-gradient.
State on the server: the optimizer's tensors by torch's own names, saved with the run.
Source: Reddi et al. 2021, Algorithms 1 and 2. Defaults of the adaptive ones are theirs (betas 0.9 / 0.99, eps 1e-3).
Departure: torch's Adam corrects the bias of the moments; the paper's boxes do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taciturn.core.errors import require
from taciturn.core.state import State, clone
from taciturn.core.vector import Vector
from taciturn.server.yogi import Yogi


def _torch_step(
    make: Callable[[Iterable[Tensor]], torch.optim.Optimizer], x: Vector, update: Vector, state: State
) -> tuple[Vector, State]:
    """One step of a torch optimizer, as a pure function of its state."""
    parameter = torch.nn.Parameter(x.detach().clone())
    optimizer = make([parameter])
    if state:
        optimizer.state[parameter] = clone(state)
    parameter.grad = -update.to(x.dtype)
    optimizer.step()
    kept: State = {n: v.detach() for n, v in optimizer.state[parameter].items() if isinstance(v, Tensor)}
    return parameter.detach(), kept


def _check(part: Any) -> None:
    """Errors: `ConfigError` for step sizes, betas or eps that make no sense."""
    name = type(part).__name__
    require(part.lr > 0, f"{name}: lr above 0; got {part.lr}")
    betas = getattr(part, "betas", (0.0, 0.0))
    require(all(0 <= beta < 1 for beta in betas), f"{name}: betas in [0, 1); got {betas}")
    require(getattr(part, "eps", 1.0) > 0, f"{name}: eps above 0; got {getattr(part, 'eps', None)}")
    decay = getattr(part, "weight_decay", 0.0)
    require(decay >= 0, f"{name}: weight_decay at least 0; got {decay}")


@dataclass(frozen=True, slots=True)
class sgd:
    """FedAvg at lr = 1: x <- x + lr update. Stateless."""

    lr: float = 1.0

    def __post_init__(self) -> None:
        _check(self)

    def init(self, x: Vector) -> State:
        """No state."""
        return {}

    def step(self, x: Vector, update: Vector, state: State) -> tuple[Vector, State]:
        """One step."""
        return _torch_step(lambda p: torch.optim.SGD(p, lr=self.lr), x, update, state)


@dataclass(frozen=True, slots=True)
class momentum:
    """FedAvgM: m <- momentum m + g;  x <- x - lr m. State: momentum_buffer [d]. Source: Hsu et al. 2019."""

    lr: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check(self)
        require(0 < self.momentum < 1, f"momentum: in (0, 1); got {self.momentum}")

    def init(self, x: Vector) -> State:
        """torch makes the buffer at the first step."""
        return {}

    def step(self, x: Vector, update: Vector, state: State) -> tuple[Vector, State]:
        """One step."""
        return _torch_step(
            lambda p: torch.optim.SGD(p, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov), x, update, state
        )


@dataclass(frozen=True, slots=True)
class adam:
    """FedAdam: x <- x - lr mhat / (sqrt(shat) + eps). State: step, exp_avg [d], exp_avg_sq [d]."""

    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-3

    def __post_init__(self) -> None:
        _check(self)

    def init(self, x: Vector) -> State:
        """torch makes the moments at the first step."""
        return {}

    def step(self, x: Vector, update: Vector, state: State) -> tuple[Vector, State]:
        """One step."""
        return _torch_step(lambda p: torch.optim.Adam(p, self.lr, self.betas, self.eps), x, update, state)


@dataclass(frozen=True, slots=True)
class adamw:
    """FedAdam with x <- (1 - lr weight_decay) x before the step. State: step, exp_avg [d], exp_avg_sq [d]."""

    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-3
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        _check(self)

    def init(self, x: Vector) -> State:
        """torch makes the moments at the first step."""
        return {}

    def step(self, x: Vector, update: Vector, state: State) -> tuple[Vector, State]:
        """One step."""
        return _torch_step(
            lambda p: torch.optim.AdamW(p, self.lr, self.betas, self.eps, self.weight_decay), x, update, state
        )


@dataclass(frozen=True, slots=True)
class adagrad:
    """FedAdagrad: s <- s + g^2;  x <- x - lr g / (sqrt(s) + eps). State: step, sum [d]."""

    lr: float = 0.01
    eps: float = 1e-3

    def __post_init__(self) -> None:
        _check(self)

    def init(self, x: Vector) -> State:
        """torch makes the sum when the optimizer is built."""
        return {}

    def step(self, x: Vector, update: Vector, state: State) -> tuple[Vector, State]:
        """One step."""
        return _torch_step(lambda p: torch.optim.Adagrad(p, lr=self.lr, eps=self.eps), x, update, state)


@dataclass(frozen=True, slots=True)
class yogi:
    """FedYogi: as FedAdam with s <- s - (1 - b2) sign(s - g^2) g^2. State: step, exp_avg [d], exp_avg_sq [d]."""

    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-3

    def __post_init__(self) -> None:
        _check(self)

    def init(self, x: Vector) -> State:
        """The moments are made at the first step."""
        return {}

    def step(self, x: Vector, update: Vector, state: State) -> tuple[Vector, State]:
        """One step."""
        return _torch_step(lambda p: Yogi(p, self.lr, self.betas, self.eps), x, update, state)
