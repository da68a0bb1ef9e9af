"""The average of clients that did unlike amounts of local work.

Symbols: u_i [d] update of client i after t_i local steps; w_i its weight; cohort S. Accumulated in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from taciturn.aggregation.mean import Weights, weights_of
from taciturn.core.state import State
from taciturn.core.types import Block, Change
from taciturn.core.vector import Vector

Sum = tuple[Tensor, Tensor, Tensor]  # sums of w_i u_i / t_i [d], of w_i t_i [], of w_i [], float64


@dataclass(frozen=True, slots=True)
class nova:
    """u = (sum w_i t_i / W) (sum w_i u_i / t_i) / W, W = sum over S of w_i: each client counts by w_i, whatever t_i.

    With equal t_i it is `mean`. For plain SGD the mean of u_i favors clients that did more steps, and converges to the
    optimum of other weights; this does not. weights: as for `mean`. Stateless; not linear, for t_i comes with the upload.
    Source: FedNova, Wang et al. 2020 (arXiv 2007.07481), equation 6 with a_i = (1, .., 1).
    """

    linear: ClassVar[bool] = False
    weights: Weights = "samples"

    def weigh(self, sizes: Tensor) -> Tensor:
        """[M] samples -> [M] weights."""
        return weights_of(self.weights, sizes)

    def init(self, x: Vector, sizes: Tensor) -> State:
        """No state."""
        return {}

    def start(self, state: State, x: Vector) -> Sum:
        """Empty sums."""
        zero = torch.zeros((), dtype=torch.float64, device=x.device)
        return torch.zeros_like(x, dtype=torch.float64), zero, zero

    def add(self, acc: Sum, block: Block) -> Sum:
        """The sums with one more block."""
        weights = block.weights.to(torch.float64)
        steps = block.stats["steps"].to(weights).clamp(min=1)
        total = acc[0] + (weights / steps) @ block.updates.to(torch.float64)
        return total, acc[1] + weights @ steps, acc[2] + weights.sum()

    def finish(self, acc: Sum) -> tuple[Change, State]:
        """-> update [d] float64."""
        return Change(acc[0] * acc[1] / acc[2] ** 2), {}
