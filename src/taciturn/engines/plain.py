"""Local training as client.py says it, step after step, with a client axis that `lift` adds.

Symbols: m clients of a part; start [m, d] the model they began from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from taciturn import client
from taciturn.client import Work
from taciturn.core.state import State, tree_map
from taciturn.engines.train import Fetch, Lift


@dataclass(frozen=True)
class _Part:
    held: State
    local: State
    lr_scale: Tensor


@dataclass(frozen=True)
class Plain:
    """One way to train a part of a block (train.py): any model, any solver."""

    work: Work
    lift: Lift

    def width(self, steps: int, batch: int) -> int:
        """The whole block."""
        return 1 << 30

    def begin(self, held: State, start: Tensor, own: State, lr_scale: float, steps: int) -> _Part:
        """The local records at the start of a round."""
        local = self.lift(lambda x, o: client.begin(self.work, x, o))(start, own)
        return _Part(held, local, torch.tensor(lr_scale, dtype=start.dtype, device=start.device))

    def advance(self, part: _Part, todo: list[int], fetch: Fetch) -> _Part:
        """`client.step`, or `client.step_if` once some clients are done."""
        work, local, left = self.work, part.local, torch.tensor(todo)
        step = self.lift(lambda r, s, k: client.step(work, part.held, r, s, k, part.lr_scale))
        step_if = self.lift(lambda a, r, s, k: client.step_if(a, work, part.held, r, s, k, part.lr_scale))
        for t in range(todo[0]):
            active = t < left
            arguments = (local, *fetch(t, len(todo))[:2])
            local = step(*arguments) if bool(active.all()) else step_if(active.to(part.lr_scale.device), *arguments)
        return replace(part, local=local)

    def reorder(self, part: _Part, order: Tensor) -> _Part:
        """The records in another order."""
        return replace(part, local=tree_map(lambda t: t[order.to(t.device)], part.local))

    def drift(self, part: _Part, out: Tensor) -> None:
        """u = y - start."""
        out.copy_(self.lift(lambda local: client.drift(self.work, local))(part.local))

    def total(self, part: _Part, weights: Tensor) -> Tensor:
        """The drifts, summed."""
        u = part.lr_scale.new_empty(len(weights), self.work.split.layout.d)
        self.drift(part, u)
        return weights @ u

    def record(self, part: _Part) -> State:
        """The records themselves."""
        return part.local

    def restore(self, part: _Part, local: State) -> _Part:
        """A part that has just begun, with the records that another had."""
        return replace(part, local=local)
