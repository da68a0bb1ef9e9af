"""A task by name: the tables `[data]` and `[model]` of a TOML file.

Symbols: seed of the run, which draws the split of the data and the start weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taciturn.tasks.built import BuiltTask
from taciturn.tasks.data.clients import Federation
from taciturn.tasks.metrics import next_token
from taciturn.tasks.task import Task

# by the kind of the data
LOSSES: dict[str, Callable[..., Tensor]] = {
    "classification": F.cross_entropy, "regression": F.mse_loss, "text": next_token
}  # fmt: skip


class DataSource(Protocol):
    """A part of `[data]`."""

    def load(self, seed: int) -> Federation: ...


class ModelSource(Protocol):
    """A part of `[model]`."""

    def build(self, sample: Tensor, outputs: int) -> nn.Module: ...


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """Data and model by name; the loss follows from the kind of data, and the metrics from the loss."""

    data: DataSource
    model: ModelSource

    def build(
        self,
        seed: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> BuiltTask:
        """Load the data, make the model, check both. prepare: the partition's."""
        data = self.data.load(seed)
        zero = torch.zeros(1, dtype=torch.int64)
        sample = data.train.fetch(zero, zero.unsqueeze(0))["input"][0, 0]
        task = Task(lambda: self.model.build(sample.cpu(), data.outputs), data, LOSSES[data.kind])
        return task.build(seed, device, dtype, prepare)
