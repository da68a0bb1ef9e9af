"""The average of the updates of the clients that took part.

Symbols: u_i [d] update of client i; n_i its samples; w_i its weight; cohort S. Accumulated in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from taciturn.core.state import State
from taciturn.core.types import Block, Change
from taciturn.core.vector import Vector

Sum = tuple[Tensor, Tensor]  # (sum of w_i u_i [d], sum of w_i [], or [d] of those who train it), float64
Weights = Literal["clients", "samples"]


def weights_of(weights: Weights, sizes: Tensor) -> Tensor:
    """[M] samples -> [M] float32: ones ("clients"), or the samples themselves."""
    return torch.ones_like(sizes, dtype=torch.float32) if weights == "clients" else sizes.to(torch.float32)


def summed(acc: Sum, block: Block) -> Sum:
    """The sum with one more block: acc + w [m] @ updates [m, d]."""
    total, weight = acc
    weights = block.weights.to(torch.float64)
    weight = weight + (weights.sum() if block.kind.trains is None else weights.sum() * block.kind.trains.mask)
    if len(block.updates) == 1:  # no rounding beyond float64: the order of the clients hardly matters
        return torch.add(total, block.updates[0], alpha=float(weights[0])), weight
    return total + block.sum(), weight


@dataclass(frozen=True, slots=True)
class mean:
    """u = sum over S of w_i u_i / sum over S of w_i. Stateless, linear. Where clients train parts of x, S is for each
    coordinate those who train it, and one that nobody trains stays (for adapters of unlike ranks this is RBLA).

    weights "clients": w_i = 1, every client counts the same; "samples": w_i = n_i, every sample counts the same
    (McMahan et al. 2017, Algorithm 1).
    """

    linear: ClassVar[bool] = True
    kinds: ClassVar[bool] = True
    weights: Weights = "clients"

    def weigh(self, sizes: Tensor) -> Tensor:
        """[M] samples -> [M] weights."""
        return weights_of(self.weights, sizes)

    def init(self, x: Vector, sizes: Tensor) -> State:
        """No state."""
        return {}

    def start(self, state: State, x: Vector) -> Sum:
        """An empty sum."""
        return torch.zeros_like(x, dtype=torch.float64), torch.zeros((), dtype=torch.float64, device=x.device)

    def add(self, acc: Sum, block: Block) -> Sum:
        """The sum with one more block."""
        return summed(acc, block)

    def finish(self, acc: Sum) -> tuple[Change, State]:
        """sum / weight -> update [d] float64."""
        return Change(acc[0] / torch.where(acc[1] > 0, acc[1], 1.0)), {}


def weighted() -> mean:
    """The mean with w_i = n_i: `mean(weights="samples")`."""
    return mean(weights="samples")
