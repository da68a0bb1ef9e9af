"""The mean of what all clients sent last, those not in the cohort included, without keeping it for each of them.

Symbols: N clients, cohort S; q_i [d] what client i sends under `codec = difference(.., memory = "mean")`; h_i its
memory, kept on the client; hbar [d] the mean of all h_i; w_i weights, W their sum over all N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from taciturn.aggregation.mean import Sum, Weights, summed, weights_of
from taciturn.core.errors import require, unknown
from taciturn.core.state import State
from taciturn.core.types import OK, Block, Change, Record
from taciturn.core.vector import Vector


@dataclass(frozen=True, slots=True)
class running:
    """hbar_new = hbar + (alpha / W) sum over S of w_i q_i, while each client of S does h_i <- h_i + alpha q_i.

    update "unbiased": hbar + sum_S w_i q_i / sum_S w_i (DIANA with partial participation); "memory": hbar_new, the
    mean over all N (EF21 at alpha = 1); "point": x0 + hbar_new - x, for clients that send points as seen from x0
    (`solvers.admm`): the server's model becomes the mean of what all N are known to have sent last. On the server: hbar
    [d] float64, and x0 [d], where one memory a client would take N d. Linear. alpha: that of the codec. weights:
    "clients" or "samples", as in `mean`. Source: Mishchenko et al. 2019; Richtarik et al. 2021.
    """

    linear: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    alpha: float = 1.0
    update: Literal["unbiased", "memory", "point"] = "memory"
    weights: Weights = "clients"

    def __post_init__(self) -> None:
        require(0 < self.alpha <= 1, f"running.alpha: above 0 and at most 1; got {self.alpha}")
        if self.update not in (updates := ("unbiased", "memory", "point")):
            raise unknown("update", self.update, updates, "running.update")

    def weigh(self, sizes: Tensor) -> Tensor:
        """[M] samples -> [M] weights."""
        return weights_of(self.weights, sizes)

    def init(self, x: Vector, sizes: Tensor) -> State:
        """hbar = 0, W = sum of the weights of all clients; x0 where points are sent."""
        total = self.weigh(sizes).to(torch.float64).sum().to(x.device)
        origin = {"origin": x.clone()} if self.update == "point" else {}
        return {"mean": torch.zeros_like(x, dtype=torch.float64), "total": total} | origin

    def start(self, state: State, x: Vector) -> tuple[Sum, State, Vector, Record]:
        """An empty sum, what is known so far, and x."""
        return (state["mean"].new_zeros(x.shape), state["mean"].new_zeros(())), state, x, {}

    def add(self, acc: tuple[Sum, State, Vector, Record], block: Block) -> tuple[Sum, State, Vector, Record]:
        """The sum with one more block, and the weighted sums of what its clients told."""
        total, state, x, told = acc
        weights = block.weights.to(torch.float64)
        sums = {
            name: weights @ torch.where(block.status == OK, values, 0).to(weights) + told.get(name, 0.0)
            for name, values in block.stats.items()
        }
        exact = replace(block, updates=block.updates.to(torch.float64))  # the clients' memories add up q without loss
        return summed(total, exact), state, x, sums

    def finish(self, acc: tuple[Sum, State, Vector, Record]) -> tuple[Change, State]:
        """The update [d] float64, and hbar_new; for points, the residuals of the consensus."""
        (sent, weight), state, x, told = acc
        mean = state["mean"] + (self.alpha / state["total"]) * sent
        if self.update == "point":
            change = state["origin"] + mean - x
            means = {name: float(value / weight) for name, value in told.items()}
            return Change(change, told=_residuals(means, change)), state | {"mean": mean}
        return Change(mean if self.update == "memory" else state["mean"] + sent / weight), state | {"mean": mean}


def _residuals(means: dict[str, float], change: Vector) -> dict[str, Any]:
    """Of the cohort: consensus = root of mean |u_i - x|^2, moved = |x_new - x|, Lagrangian = mean of f_i and coupling.

    The dual residual is rho times moved. f_i is the mean loss of the client's batches in the round.
    """
    told: dict[str, Any] = {"consensus": math.sqrt(means["gap"]), "moved": float(change.norm())}
    return told | {"lagrangian": means["loss"] + means["coupling"]} | {k: means[k] for k in ("rho",) if k in means}
