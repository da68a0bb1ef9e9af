"""A model in evaluation mode with one set of weights, whose frozen prefix is computed once. Symbols: n samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taciturn.client import Work
from taciturn.core.types import Batch, Clients
from taciturn.engines.layers import Gather, Step
from taciturn.engines.prefix import Prefix, find
from taciturn.engines.swap import Program, in_model


class Evaluated:
    """Outputs for samples of one data set, with features of its frozen prefix kept."""

    def __init__(self, program: Program, work: Work, prefix: Prefix) -> None:
        self._program, self._work, self._prefix = program, work, prefix

    @classmethod
    def build(cls, work: Work, model: nn.Module, data: Clients, keep: int) -> Evaluated | None:
        """None where the model cannot be cut, or nothing is frozen."""
        split, task = work.split, work.task
        if keep <= 0 or split.buffers.d or split.base.names or not task.plain:
            return None
        try:
            names = [name for layout in in_model(split) for name in layout.names]
            program = Program(model, frozenset(names))
            place = torch.arange(min(2, int(data.sizes[0])))
            fetched = data.fetch(torch.zeros(1, dtype=torch.int64), place.unsqueeze(0))
            views = split.layout.views(split.x0), split.personal.views(split.v0)
            weights = work.params({"x": split.x0}, *views, {})

            def forward(batch: Batch, draw: int = 0) -> Any:
                return program(task.cast(batch)["input"], _step(weights))

            batch = {name: t[0] for name, t in fetched.items()}
            with torch.no_grad():
                loss = task.values(forward(batch), task.cast(batch)["target"]).sum()
            mask = torch.ones(len(place), dtype=torch.bool, device=loss.device)
            if not torch.allclose(loss, task.measure(weights, batch | {"mask": mask})["loss"], rtol=1e-4):
                return None
            prefix = find(program, forward, batch, data, keep)
        except Exception:  # a refusal, or whatever a user's model raises on a copy of it: the plain way still works
            return None
        return None if prefix is None else cls(program, work, prefix)

    def __call__(self, weights: dict[str, Tensor], batch: Batch, index: Tensor) -> Any:
        """Samples `index` [n] of the first owner, as `batch` -> the output. weights: by the model's names."""
        with self._prefix.given(torch.zeros(1, dtype=torch.int64), index.unsqueeze(0)):
            return self._program(self._work.task.cast(batch)["input"], _step(weights))


def _step(weights: dict[str, Tensor]) -> Step:
    return Step(weights, Gather({}), 1, True)
