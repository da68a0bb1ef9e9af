"""Ditto, pFedMe and SCAFFOLD as naked loops over clients, against the library's parts, on the same batches in float64.

Symbols: w [d] the server's model; v_i [d] personal models; c_i [d] control variates, c their mean; S the cohort of a round.
"""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from conftest import SIZES, Net, make_federation
from drive import drive
from taciturn import aggregation, participation, partition, server, solvers, sync
from taciturn.core import random
from taciturn.core.vector import Layout
from taciturn.method import Method
from taciturn.solvers import schedules
from taciturn.tasks.data.clients import Federation, TableClients
from taciturn.tasks.task import Task

N, ROUNDS, BATCH = len(SIZES), 4, 8
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
BASE = Method(participation=participation.uniform(count=4), sync=sync.every(epochs=2), batch_size=BATCH)


@pytest.fixture(scope="module")
def task():
    return Task(Net, make_federation()).build(0, dtype=torch.float64)


@pytest.fixture(scope="module")
def gradient(task):
    """w, batch -> the gradient of the mean loss."""
    layout = Layout.of(dict(task.model.named_parameters()))

    def gradient(w, batch):
        w = w.clone().requires_grad_()
        loss = cross_entropy(functional_call(task.model, layout.views(w), (batch[0],)), batch[1])
        return torch.autograd.grad(loss, w)[0]

    return gradient


@pytest.fixture(scope="module")
def x0(task):
    return torch.cat([p.detach().reshape(-1) for p in task.model.parameters()])


class Stream:
    """The library's batches: each client goes on where it stopped, two epochs a round."""

    def __init__(self, task) -> None:
        self.task, self.done = task, [0] * N

    def __call__(self, i: int):
        n = SIZES[i]
        steps, first = 2 * -(-n // BATCH), self.done[i]
        self.done[i] += steps
        key = random.fold(random.fold(random.key(0), "client"), torch.tensor([i]))
        index, mask = random.batches(key, torch.tensor([n]), torch.tensor([first]), steps, BATCH, n)
        table, own = self.task.train, sum(SIZES[:i])
        for row, keep in zip(index[0], mask[0], strict=True):
            yield table.fields["input"][own + row[keep]].double(), table.fields["target"][own + row[keep]]


def test_ditto(task, gradient, x0):
    """y <- y - lr g(y); v <- v - lr (momentum of g(v) + lam (v - w)); the server averages y by samples."""
    lam, lr, lr_v, momentum = 0.7, 0.2, 0.05, 0.9
    solver = solvers.ditto(lam, solvers.sgd(lr), solvers.sgd(lr_v, momentum=momentum))
    state, engine, stats, _ = drive(task, BASE.replace(partition=partition.twins(), solver=solver), rounds=ROUNDS)
    w, v, stream = x0, x0.repeat(N, 1), Stream(task)
    for cohort in (stat.ids.tolist() for stat in stats):
        moved = torch.zeros_like(w)
        for i in cohort:
            y, m = w, torch.zeros_like(w)
            for batch in stream(i):
                y = y - lr * gradient(y, batch)
                m = momentum * m + gradient(v[i], batch) + lam * (v[i] - w)
                v[i] -= lr_v * m
            moved += SIZES[i] * (y - w)
        w = w + moved / sum(SIZES[i] for i in cohort)
    torch.testing.assert_close(state.x, w, **CLOSE)
    torch.testing.assert_close(_rows(engine, x0)["v"], v, **CLOSE)


def test_pfedme(task, gradient, x0):
    """K steps for theta ~ argmin f + lam / 2 |theta - y|^2; y <- y - lr lam (y - theta); w <- (1 - beta) w + beta mean."""
    lam, steps, lr, local_lr, beta = 3.0, 4, 0.1, 0.05, 0.6
    parts = {
        "partition": partition.twins(),
        "solver": solvers.pfedme(lam, steps, lr, local_lr, schedules.exponential(0.8)),
        "aggregator": aggregation.mean(),
        "server": server.sgd(lr=beta),
    }
    state, engine, stats, _ = drive(task, BASE.replace(**parts), rounds=ROUNDS)
    w, v, stream = x0, x0.repeat(N, 1), Stream(task)
    for r, cohort in enumerate(stat.ids.tolist() for stat in stats):
        found = []
        for i in cohort:
            y = theta = w
            for batch in stream(i):
                for _ in range(steps):
                    theta = theta - local_lr * (gradient(theta, batch) + lam * (theta - y))
                y = y - lr * 0.8**r * lam * (y - theta)
            v[i] = theta
            found.append(y)
        w = (1 - beta) * w + beta * torch.stack(found).mean(0)
    torch.testing.assert_close(state.x, w, **CLOSE)
    torch.testing.assert_close(_rows(engine, x0)["v"], v, **CLOSE)


def test_scaffold(task, gradient, x0):
    """y <- y - lr (g - c_i + c); c_i+ = c_i - c + (w - y) / (K lr); w moves by the cohort's mean, c by its sum over N."""
    lr, global_lr = 0.1, 0.8
    solver = solvers.scaffold(lr, schedules.exponential(0.7))
    method = BASE.replace(solver=solver, aggregator=aggregation.controlled(global_lr))
    state, engine, stats, _ = drive(task, method, rounds=ROUNDS)
    w, c, own, stream = x0, torch.zeros_like(x0), torch.zeros(N, len(x0), dtype=torch.float64), Stream(task)
    for r, cohort in enumerate(stat.ids.tolist() for stat in stats):
        rate, moves, changes = lr * 0.7**r, [], []
        for i in cohort:
            y, k = w, 0
            for batch in stream(i):
                y, k = y - rate * (gradient(y, batch) - own[i] + c), k + 1
            new = own[i] - c + (w - y) / (k * rate)
            moves.append(y - w)
            changes.append(new - own[i])
            own[i] = new
        w = w + global_lr * torch.stack(moves).mean(0)
        c = c + torch.stack(changes).sum(0) / N
    torch.testing.assert_close(state.x, torch.cat([w, c]), **CLOSE)
    torch.testing.assert_close(_rows(engine, x0)["solver"]["control"], own, **CLOSE)
    torch.testing.assert_close(c, own.mean(0), **CLOSE)


def _rows(engine, x0):
    """What all clients keep [N, ..]."""
    return engine.store.read(torch.arange(N))


# --------------------------------------------------------------------------------------------- what scaffold is for


@pytest.fixture(scope="module")
def squares():
    """Least squares where every client has an optimum and a curvature of its own -> (task, the optimum of all)."""
    clients, n, d = 6, 12, 4
    key = random.key(3)
    x = random.normal(random.fold(key, "x"), clients, n, d) * (0.3 + random.uniform(random.fold(key, "s"), clients, 1, d))
    y = (x @ random.normal(random.fold(key, "w"), clients, d, 1)).squeeze(2)
    fields = {"input": x.flatten(0, 1), "target": y.flatten().unsqueeze(1)}
    table = TableClients.of(fields, {f"c{i}": range(i * n, (i + 1) * n) for i in range(clients)})
    task = Task(
        lambda: torch.nn.Linear(d, 1, bias=False),
        Federation(table, "regression", 1),
        loss=lambda output, target: (output - target).square().sum(-1) / 2,
        metrics=(),
    ).build(0, dtype=torch.float64)
    rows, targets = fields["input"].double(), fields["target"].double()
    return task, torch.linalg.lstsq(rows, targets).solution.squeeze(1)


def test_scaffold_ends_at_the_optimum_and_fedavg_beside_it(squares):
    """Five local steps a round: the mean of clients that drift is biased, the control variates remove the bias."""
    task, optimum = squares
    base = Method(
        participation=participation.all(), sync=sync.every(steps=5), batch_size=12, solver=solvers.sgd(0.3),
        aggregator=aggregation.mean(),
    )  # fmt: skip
    corrected = base.replace(solver=solvers.scaffold(0.3), aggregator=aggregation.controlled())

    def distance(method, rounds):
        return float((drive(task, method, "stacked", rounds=rounds)[0].x[:4] - optimum).norm())

    fedavg = [distance(base, rounds) for rounds in (8, 12)]
    assert min(fedavg) > 0.05 and abs(fedavg[0] - fedavg[1]) < 1e-3 * fedavg[0], "FedAvg has ended elsewhere"
    assert distance(corrected, 32) < 1e-6
