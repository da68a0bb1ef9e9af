"""The mean of what all clients sent last, those not in the cohort included, without keeping it for each of them.

Symbols: N clients, cohort S; q_i [d] what client i sends under `codec = difference(.., memory = "mean")`; h_i its
memory, kept on the client; hbar [d] the mean of all h_i; w_i weights, W their sum over all N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from taciturn.aggregation.mean import Sum, Weights, summed, weights_of
from taciturn.core.errors import require
from taciturn.core.state import State
from taciturn.core.types import Block, Change
from taciturn.core.vector import Vector


@dataclass(frozen=True, slots=True)
class running:
    """hbar_new = hbar + (alpha / W) sum over S of w_i q_i, while each client of S does h_i <- h_i + alpha q_i.

    update "unbiased": hbar + sum_S w_i q_i / sum_S w_i (DIANA with partial participation); "memory": hbar_new, the
    mean over all N (EF21 at alpha = 1, ADMM). On the server: hbar [d] float64, where one memory a client would take N
    d. Linear. alpha: that of the codec. weights: "clients" or "samples", as in `mean`. Source: Mishchenko et al.
    2019; Richtarik et al. 2021.
    """

    linear: ClassVar[bool] = True
    alpha: float = 1.0
    update: Literal["unbiased", "memory"] = "memory"
    weights: Weights = "clients"

    def __post_init__(self) -> None:
        require(0 < self.alpha <= 1, f"running.alpha: above 0 and at most 1; got {self.alpha}")

    def weigh(self, sizes: Tensor) -> Tensor:
        """[M] samples -> [M] weights."""
        return weights_of(self.weights, sizes)

    def init(self, x: Vector, sizes: Tensor) -> State:
        """hbar = 0, W = sum of the weights of all clients."""
        total = self.weigh(sizes).to(torch.float64).sum().to(x.device)
        return {"mean": torch.zeros_like(x, dtype=torch.float64), "total": total}

    def start(self, state: State, x: Vector) -> tuple[Sum, State]:
        """An empty sum, and what is known so far."""
        return (state["mean"].new_zeros(x.shape), state["mean"].new_zeros(())), state

    def add(self, acc: tuple[Sum, State], block: Block) -> tuple[Sum, State]:
        """The sum with one more block."""
        return summed(acc[0], block), acc[1]

    def finish(self, acc: tuple[Sum, State]) -> tuple[Change, State]:
        """The update [d] float64, and hbar_new."""
        (sent, weight), state = acc
        mean = state["mean"] + (self.alpha / state["total"]) * sent
        return Change(mean if self.update == "memory" else state["mean"] + sent / weight), state | {"mean": mean}
