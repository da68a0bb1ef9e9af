"""The naked loops of examples/fedavg_in_60_lines.py equal the library within 1e-6, on the same batches."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import torch

from conftest import Net, make_federation
from drive import drive
from taciturn import participation, solvers, sync
from taciturn.core import random
from taciturn.method import Method
from taciturn.tasks.task import Task


def _example():
    path = Path(__file__).parents[2] / "examples" / "fedavg_in_60_lines.py"
    spec = importlib.util.spec_from_file_location("fedavg_in_60_lines", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_naked_loops_equal_the_library():
    data = make_federation()
    task = Task(Net, data).build(0, dtype=torch.float64)
    method = Method(
        participation=participation.uniform(count=4), sync=sync.every(epochs=2), solver=solvers.sgd(lr=0.2), batch_size=8
    )
    state, _, stats, _ = drive(task, method, rounds=5)

    def batches(k, epoch, n, batch_size):
        """The library's batch stream, epoch by epoch."""
        key = random.fold(random.fold(random.key(0), "client"), torch.tensor([k]))
        per_epoch = -(-n // batch_size)
        first = torch.tensor([epoch * per_epoch])
        index, mask = random.batches(key, torch.tensor([n]), first, per_epoch, batch_size, n)
        return [row[keep] for row, keep in zip(index[0], mask[0], strict=True)]

    table = data.train
    clients = [
        (table.fields["input"][rows].double(), table.fields["target"][rows])
        for rows in table.rows.split(table.sizes.tolist())
    ]
    cohorts = [stat.ids.tolist() for stat in stats]
    model = _example().fedavg(copy.deepcopy(task.model), clients, cohorts, 2, 8, 0.2, batches)
    naked = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    assert float((naked - state.x).norm() / naked.norm()) <= 1e-6
    assert {k for cohort in cohorts for k in cohort} > {0}, "the client of one sample took part"
