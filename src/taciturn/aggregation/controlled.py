"""The server's half of SCAFFOLD: the model moves by the mean of the cohort, the control variate by a sum over all.

Symbols: x = [w, c] [2 d] model and control variate; u_i = [change of w, change of c_i] of client i; cohort S, N clients in
all. Accumulated in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from taciturn.aggregation.mean import Sum, summed, weights_of
from taciturn.core.errors import require
from taciturn.core.state import State
from taciturn.core.types import Block, Change
from taciturn.core.vector import Vector


@dataclass(frozen=True, slots=True)
class controlled:
    """w <- w + (lr / |S|) sum over S of the changes of w;  c <- c + (1 / N) sum over S of the changes of c_i.

    So c stays the mean of all c_i, those of clients that were not drawn included. For `solver = scaffold`, which says what
    the halves are; lr is the server's rate, beside server = sgd(lr = 1). Every client counts the same. State: N []. Linear.
    Source: Karimireddy et al. 2020 (arXiv 1910.06378), Algorithm 1.
    """

    linear: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    lr: float = 1.0

    def __post_init__(self) -> None:
        require(self.lr > 0, f"controlled.lr: above 0; got {self.lr}")

    def weigh(self, sizes: Tensor) -> Tensor:
        """[M] samples -> ones [M]."""
        return weights_of("clients", sizes)

    def init(self, x: Vector, sizes: Tensor) -> State:
        """How many clients there are."""
        return {"clients": torch.tensor(float(len(sizes)), dtype=torch.float64, device=x.device)}

    def start(self, state: State, x: Vector) -> tuple[Sum, State]:
        """An empty sum, and N."""
        return (torch.zeros_like(x, dtype=torch.float64), state["clients"].new_zeros(())), state

    def add(self, acc: tuple[Sum, State], block: Block) -> tuple[Sum, State]:
        """The sum with one more block."""
        return summed(acc[0], block), acc[1]

    def finish(self, acc: tuple[Sum, State]) -> tuple[Change, State]:
        """-> update [2 d] float64."""
        (total, heard), state = acc
        w, c = total.chunk(2)
        return Change(torch.cat([self.lr / heard * w, c / state["clients"]])), state
