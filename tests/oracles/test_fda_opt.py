"""FDA-Opt's box (methods of arXiv 2505.04535, 3.4 of its code) as naked loops over clients, against `sync.fda`.

Symbols: K clients sampled; w0 global model; w_k model of client k; u_k = w_k - w0; T steps of a block; n blocks of a round;
H estimate of the variance of the models; theta; M most blocks.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from conftest import Net, make_federation
from drive import drive
from taciturn import aggregation, participation, server, solvers
from taciturn.core import random
from taciturn.method import Method
from taciturn.sync import fda
from taciturn.sync.thresholds import plain
from taciturn.tasks.task import Task

M, BATCH, LR, ROUNDS = 6, 8, 0.1, 8
DIRECTIONS = {"linear": True}


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def load(model, w: torch.Tensor):
    torch.nn.utils.vector_to_parameters(w, model.parameters())
    return model


def stream(k: int, size: int):
    """The endless stream of a client's batches, as the library draws it: its position lasts over rounds."""
    key = random.fold(random.fold(random.key(0), "client"), torch.tensor([k]))
    t = 0
    while True:
        index, mask = random.batches(key, torch.tensor([size]), torch.tensor([t]), 1, BATCH, size)
        yield index[0, 0][mask[0, 0]]
        t += 1


def fda_opt(model, clients, cohorts, monitor, step):
    """-> (model after each round, n of each round, thetas). step(w, ubar) is the server optimizer."""
    streams = [stream(k, len(y)) for k, (_, y) in enumerate(clients)]
    w0, theta, first, models, blocks, thetas = flat(model), 0.0, True, [], [], []
    for cohort in cohorts:
        w = {k: w0.clone() for k in cohort}
        steps = max(math.ceil(len(clients[k][1]) / BATCH) for k in cohort)
        n = 0
        while True:
            n += 1
            for k in cohort:
                local = load(copy.deepcopy(model), w[k])
                x, y = clients[k]
                for _ in range(steps):
                    rows = next(streams[k])
                    local.zero_grad()
                    cross_entropy(local(x[rows]), y[rows]).backward()
                    with torch.no_grad():
                        for p in local.parameters():
                            p -= LR * p.grad
                w[k] = flat(local)
            u = torch.stack([w[k] - w0 for k in cohort])
            total, mean = u.square().sum(1).mean(), u.mean(0)
            var = float(total - mean.square().sum())
            h = float(total) if monitor == "naive" else var
            if not (h <= theta and n < M and not first):
                break
        first = False
        theta = max(0.0, (M / 2) / n * h)
        w0 = step(w0, mean)
        models.append(w0)
        blocks.append(n)
        thetas.append(theta)
    return models, blocks, thetas


class Adam:
    """torch's, on the pseudo-gradient -ubar."""

    def __init__(self, d: int) -> None:
        self.w = torch.nn.Parameter(torch.zeros(d, dtype=torch.float64))
        self.optimizer = torch.optim.Adam([self.w], lr=0.05, betas=(0.9, 0.99), eps=1e-3)

    def __call__(self, w0: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.w.copy_(w0)
        self.w.grad = -mean
        self.optimizer.step()
        return self.w.detach().clone()


@pytest.mark.parametrize("optimizer", ["FDA-SGD", "FDA-Adam"])
@pytest.mark.parametrize("monitor", ["exact", "naive"])
def test_naked_loops_equal_the_library(monitor, optimizer):
    data = make_federation()
    task = Task(Net, data).build(0, dtype=torch.float64)
    rule = fda(monitor=monitor, theta=plain(), max_blocks=M, pace="longest")
    method = Method(
        participation=participation.uniform(count=4), sync=rule, solver=solvers.sgd(lr=LR), aggregator=aggregation.mean(),
        server=server.adam(lr=0.05) if optimizer == "FDA-Adam" else server.sgd(lr=1.0), batch_size=BATCH,
    )  # fmt: skip
    state, _, stats, _ = drive(task, method, rounds=ROUNDS)
    clients = [
        (data.train.fields["input"][rows].double(), data.train.fields["target"][rows])
        for rows in data.train.rows.split(data.train.sizes.tolist())
    ]
    step = Adam(len(state.x)) if optimizer == "FDA-Adam" else lambda w0, mean: w0 + mean
    models, blocks, thetas = fda_opt(task.model, clients, [s.ids.tolist() for s in stats], monitor, step)
    assert [s.sync["blocks"] for s in stats] == blocks and len(set(blocks)) > 1
    assert [s.sync["next"]["theta"] for s in stats] == pytest.approx(thetas, rel=1e-4)
    assert float((models[-1] - state.x).norm() / state.x.norm()) <= 1e-6
