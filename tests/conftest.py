"""Small federations that tests share. Symbols: N clients of unlike sizes, one with a single sample."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import nn

from taciturn.core import random
from taciturn.tasks.built import BuiltTask
from taciturn.tasks.data.clients import Federation, TableClients
from taciturn.tasks.task import Task

torch.set_num_threads(1)
settings.register_profile("house", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("house")
SIZES = (1, 7, 16, 33, 5, 20, 11, 2)


def make_federation(sizes: tuple[int, ...] = SIZES, features: int = 6, classes: int = 3, seed: int = 0) -> Federation:
    """Gaussian inputs with labels that a linear map explains."""
    total = sum(sizes) + 40
    key = random.key(seed)
    x = random.normal(random.fold(key, "x"), total, features)
    y = (x @ random.normal(random.fold(key, "w"), features, classes)).argmax(1)
    fields = {"input": x, "target": y}
    edges = np.cumsum((0, *sizes))
    owners = {f"site-{i}": np.arange(a, b) for i, (a, b) in enumerate(itertools.pairwise(edges))}
    held_out = {name: rows[: max(1, len(rows) // 3)] for name, rows in owners.items()}
    central = TableClients.of(fields, {"server": np.arange(sum(sizes), total)})
    test = TableClients.of(fields, held_out)
    return Federation(TableClients.of(fields, owners), "classification", classes, test=test, central=central)


class Net(nn.Module):
    """stem -> norm -> head, small."""

    def __init__(self, norm: nn.Module | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.norm = norm or nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, 6] -> [b, 3]."""
        return self.head(self.dropout(torch.relu(self.norm(self.stem(x)))))


def make_task(model=Net, seed: int = 0, dtype: torch.dtype = torch.float32, **data) -> BuiltTask:
    """A built task on a small federation."""
    return Task(model, make_federation(**data)).build(seed, dtype=dtype)


@pytest.fixture
def task() -> BuiltTask:
    return make_task()
