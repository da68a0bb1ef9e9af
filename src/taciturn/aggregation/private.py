"""A mean that hardly depends on any one client: clipped updates, and noise at the server.

Symbols: u_i [d] decoded update of client i; C norm; z noise; q rate; N clients; n [d] standard normal. float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from taciturn.aggregation.mean import weights_of
from taciturn.core import random, secret
from taciturn.core.errors import require
from taciturn.core.state import State
from taciturn.core.types import Block, Change
from taciturn.core.vector import Vector


@dataclass(frozen=True, slots=True)
class private:
    """u = (sum over S of u_i min(1, C / |u_i|) + z C n) / (q N).

    The sum changes by at most C where one client is added, removed or lies, whatever a codec or a memory did to its
    message, for it is clipped here, once decoded; the divisor does not depend on who came. So a round is a Gaussian
    mechanism with multiplier z, sampled with probability q where `participation = poisson(rate)` draws the cohort; with
    rate = 1 all take part. Every client counts the same. delta: of the guarantee that the record states. seed: of the
    noise; secret: noise of the operating system instead; a deployed run sets it. The server sees updates: it is trusted.
    Not linear. State: N, and how often noise was drawn. Source: DP-FedAvg, McMahan et al. 2018 (arXiv 1710.06963), fixed
    denominator.
    """

    linear: ClassVar[bool] = False
    norm: float = 1.0
    noise: float = 1.0
    rate: float = 1.0
    delta: float = 1e-5
    seed: int = 0
    secret: bool = False

    def __post_init__(self) -> None:
        require(0 < self.norm < math.inf, f"private.norm: a length above 0; got {self.norm}")
        require(0 < self.noise < math.inf, f"private.noise: a multiple of the norm, above 0; got {self.noise}")
        require(0 < self.rate <= 1, f"private.rate: above 0, at most 1; got {self.rate}")
        require(0 < self.delta < 1, f"private.delta: between 0 and 1; got {self.delta}")

    def weigh(self, sizes: Tensor) -> Tensor:
        """[M] samples -> ones [M]."""
        return weights_of("clients", sizes)

    def init(self, x: Vector, sizes: Tensor) -> State:
        """How many clients there are; no noise was drawn."""
        return {"clients": torch.tensor(float(len(sizes)), dtype=torch.float64), "drawn": torch.tensor(0)}

    def start(self, state: State, x: Vector) -> tuple[Tensor, State]:
        """An empty sum."""
        return torch.zeros_like(x, dtype=torch.float64), state

    def add(self, acc: tuple[Tensor, State], block: Block) -> tuple[Tensor, State]:
        """The sum with one more block; who is late may count less, nobody more than once."""
        length = torch.linalg.vector_norm(block.updates, dim=1, dtype=torch.float64)
        weights = block.weights.double().clamp(0, 1) * (self.norm / length.clamp(min=self.norm))
        return acc[0] + weights @ block.updates.double(), acc[1]

    def finish(self, acc: tuple[Tensor, State]) -> tuple[Change, State]:
        """The noise is drawn, once a round -> update [d] float64."""
        total, state = acc
        key = None if self.secret else random.fold(random.key(self.seed), "private", int(state["drawn"]))
        noise = self.norm * self.noise * secret.gaussian(key, len(total)).to(total)
        update = (total + noise) / (self.rate * float(state["clients"]))
        return Change(update), state | {"drawn": state["drawn"] + 1}
