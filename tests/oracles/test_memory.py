"""DIANA, EF21 and error feedback as naked loops over clients on quadratics, against the library's parts.

Symbols: N clients; f_i(w) = |w - b_i|^2 / 2, so that the gradient is w - b_i and the optimum the mean of b_i; h_i memories,
hbar their mean; C the codec; S the cohort of a round.
"""

from __future__ import annotations

import pytest
import torch

from taciturn import aggregation, codecs, participation, server, solvers, sync
from taciturn.client import Work
from taciturn.core import random
from taciturn.core.state import row
from taciturn.core.vector import Layout
from taciturn.engines import build
from taciturn.method import Method
from taciturn.round import fed_round, start
from taciturn.tasks.data.clients import Federation, TableClients
from taciturn.tasks.task import Task

N, D = 6, 12
B = random.normal(random.key(9), N, D) * 3.0


class Shift(torch.nn.Module):
    """w; the input says which client asks."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w + 0.0 * x


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """|w - b|^2 / 2 of each sample."""
    return ((output - target) ** 2).sum(-1) / 2


@pytest.fixture(scope="module")
def task():
    fields = {"input": torch.zeros(N, D), "target": B}
    clients = TableClients.of(fields, {f"c{i}": [i] for i in range(N)})
    return Task(Shift, Federation(clients, "regression", D), loss=loss, metrics=()).build(0, dtype=torch.float64)


def method(lr: float, count: int = N, **parts) -> Method:
    return Method(
        participation=participation.uniform(count=count), sync=sync.every(steps=1), solver=solvers.sgd(lr=lr),
        batch_size=1, server=server.sgd(lr=1.0), aggregator=parts.pop("aggregator", aggregation.mean()), **parts,
    )  # fmt: skip


def drive(task, m: Method, rounds: int, lose=None, engine: str = "sequential"):
    """-> (iterates [rounds, d], cohorts, engine)."""
    split = m.partition.split(task.model, task.tracked)
    work = Work(task, split, m.solver, m.codec)
    runner, _ = build(engine, work, m, random.key(0), lose=lose)
    state, xs, cohorts = start(split.x0, task.train.sizes, m), [], []
    for r in range(rounds):
        key = random.fold(random.key(0), "round", r)
        ids = m.participation.draw(r, key, torch.ones(N, dtype=torch.bool))
        state, _ = fed_round(state, ids, torch.ones(N, dtype=torch.int64)[ids], m, runner, split, key)
        xs.append(state.x.clone())
        cohorts.append(ids.tolist())
    return torch.stack(xs), cohorts, runner, state


def compress(codec, u: torch.Tensor, client: int, round: int) -> torch.Tensor:
    """C(u) with the key that the client has in this round."""
    layout = Layout(("w",), ((D,),))
    key = random.fold(random.fold(random.key(0), "client"), torch.tensor(client), "encode", round)
    payload, _ = codec.encode(u, {}, key, layout=layout, knobs={})
    return codec.decode(payload, {}, layout=layout)[0]


UPLOADS = {"all": N, "some": 3}


@pytest.mark.parametrize("count", UPLOADS.values(), ids=UPLOADS)
@pytest.mark.parametrize("where", ["receiver", "mean"])
def test_diana(task, where, count):
    """h_i <- h_i + alpha q_i; update = mean of h_i + q_i over the cohort, or hbar + mean of q_i."""
    lr, alpha, codec, rounds = 0.3, 0.25, codecs.quantize(bits=3), 25
    parts = {"aggregator": aggregation.running(alpha=alpha, update="unbiased")} if where == "mean" else {}
    m = method(lr, count, codec=codecs.difference(codec, alpha=alpha, memory=where), **parts)
    xs, cohorts, runner, state = drive(task, m, rounds)
    w, h = torch.zeros(D, dtype=torch.float64), torch.zeros(N, D)
    for r, cohort in enumerate(cohorts):
        q = {i: compress(codec, -lr * (w - B[i].double()) - h[i].double(), i, r) for i in cohort}
        sent = torch.stack([q[i] for i in cohort]).double().mean(0)
        known = h.double().mean(0) if where == "mean" else torch.stack([h[i] for i in cohort]).double().mean(0)
        for i in cohort:
            h[i] += alpha * q[i]
        w = w + known + sent
        assert float((w - xs[r]).norm() / w.norm()) < 1e-5
    kept = runner.store.export()["rows"]["tx"]["h"]
    assert torch.allclose(kept.float(), h, rtol=1e-5, atol=1e-6)
    if where == "mean":
        assert torch.allclose(state.agg["mean"], h.double().mean(0), atol=1e-6)


@pytest.mark.parametrize("count", UPLOADS.values(), ids=UPLOADS)
def test_ef21(task, count):
    """h_i <- h_i + C(u_i - h_i); update = mean of h_i over all N."""
    lr, codec, rounds = 0.3, codecs.top_k(k=3), 25
    m = method(
        lr, count, codec=codecs.difference(codec, alpha=1.0, memory="mean"), aggregator=aggregation.running(alpha=1.0)
    )
    xs, cohorts, _, _ = drive(task, m, rounds)
    w, h = torch.zeros(D, dtype=torch.float64), torch.zeros(N, D)
    for r, cohort in enumerate(cohorts):
        for i in cohort:
            h[i] += compress(codec, -lr * (w - B[i].double()) - h[i].double(), i, r)
        w = w + h.double().mean(0)
        assert float((w - xs[r]).norm() / w.norm()) < 1e-5


def test_error_feedback(task):
    """p = u + e; send C(p); e <- p - C(p)."""
    lr, codec, rounds = 0.2, codecs.top_k(k=2), 25
    xs, cohorts, _, _ = drive(task, method(lr, 3, codec=codecs.error_feedback(codec)), rounds)
    w, e = torch.zeros(D, dtype=torch.float64), torch.zeros(N, D, dtype=torch.float64)
    for r, cohort in enumerate(cohorts):
        sent = []
        for i in cohort:
            p = -lr * (w - B[i].double()) + e[i]
            sent.append(compress(codec, p, i, r).double())
            e[i] = p - sent[-1]
        w = w + torch.stack(sent).mean(0)
        assert float((w - xs[r]).norm() / w.norm()) < 1e-5


@pytest.mark.parametrize("engine", ["sequential", "stacked"])
@pytest.mark.parametrize("steps", [1, 4])
def test_training_on_from_what_was_lost(task, steps, engine):
    """y = w + e, some steps; u = y - w; send C(u); e <- u - C(u)."""
    lr, codec, rounds = 0.2, codecs.top_k(k=2), 25
    m = method(lr, 3, codec=codecs.error_feedback(codec, into="start")).replace(sync=sync.every(steps=steps))
    xs, cohorts, _, _ = drive(task, m, rounds, engine=engine)
    w, e = torch.zeros(D, dtype=torch.float64), torch.zeros(N, D, dtype=torch.float64)
    for r, cohort in enumerate(cohorts):
        sent = []
        for i in cohort:
            y = w + e[i]
            for _ in range(steps):
                y = y - lr * (y - B[i].double())
            sent.append(compress(codec, y - w, i, r).double())
            e[i] = y - w - sent[-1]
        w = w + torch.stack(sent).mean(0)
        assert float((w - xs[r]).norm() / w.norm()) < 1e-5


@pytest.mark.parametrize(("into", "twice"), [("message", True), ("start", False)])
def test_what_a_long_round_learns_again_is_added_twice_or_not(task, into, twice):
    """Clients that arrive at b_i miss b_i - w, whatever they lost before: more than that is never owed to the server."""
    m = method(1.0, codec=codecs.error_feedback(codecs.top_k(k=2), into=into))
    xs, _, runner, _ = drive(task, m, 12)
    path = [torch.zeros(D, dtype=torch.float64), *xs]
    missed = max(float((B.double() - w).norm(dim=1).max()) for w in path)
    assert (float(runner.store.export()["rows"]["tx"]["error"].norm(dim=1).max()) > missed) is twice


def test_what_was_lost_is_not_believed(task):
    """An upload that is lost moves no memory: neither the client's, nor the server's, nor the mean."""
    lost = {(r, i) for r in range(30) for i in range(N) if (r * 7 + i * 3) % 5 == 0}
    for where in ("receiver", "mean"):
        parts = {"aggregator": aggregation.running(alpha=0.25, update="unbiased")} if where == "mean" else {}
        m = method(0.3, codec=codecs.difference(codecs.quantize4(), alpha=0.25, memory=where), **parts)
        for engine in ("sequential", "stacked"):
            _, _, runner, state = drive(task, m, 30, lose=lambda r, i: (r, i) in lost, engine=engine)
            sender = runner.store.export()["rows"]["tx"]["h"]
            if where == "receiver":
                assert torch.equal(sender, runner._receivers.export()["rows"]["h"])
            else:
                assert torch.allclose(sender.double().mean(0), state.agg["mean"], atol=1e-6)


def distance(task, codec, rounds: int, lr: float = 0.3, **parts) -> float:
    xs, _, _, _ = drive(task, method(lr, codec=codec, **parts), rounds, engine="stacked")
    return float((xs[-1] - B.double().mean(0)).norm())


def test_memory_removes_what_heterogeneity_adds(task):
    """Gradients at the optimum do not vanish: without memory their noise stays, with memory convergence is linear."""
    codec = codecs.quantize(bits=3)
    without = distance(task, codec, 90)
    memories = {
        "receiver": {"codec": codecs.difference(codec)},
        "mean": {
            "codec": codecs.difference(codec, alpha=0.25, memory="mean"),
            "aggregator": aggregation.running(alpha=0.25, update="unbiased"),
        },
    }
    for parts in memories.values():
        assert distance(task, rounds=90, **parts) < 1e-3 < 0.05 < without


def test_difference_of_one_client_is_its_row(task):
    """Rows of the store are those of each client: nothing of another client is in them."""
    _, _, runner, _ = drive(task, method(0.3, codec=codecs.difference(codecs.quantize8(), alpha=0.5)), 40)
    rows = runner.store.export()["rows"]
    for i in range(N):
        final = -0.3 * (B.mean(0) - B[i])
        assert torch.allclose(row(rows, i)["tx"]["h"], final, atol=1e-3)
