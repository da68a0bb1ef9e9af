"""Weights that nobody forms equal weights that are stepped; sums that arrive equal sums of what would have arrived."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from conftest import Net, make_federation, make_task
from drive import drive
from taciturn import Task, aggregation, codecs, participation, partition, solvers, sync
from taciturn.client import Work
from taciturn.core import random
from taciturn.core.types import STATUS
from taciturn.engines.late import Late
from taciturn.engines.modes import sends_drift
from taciturn.method import Method

OUT, IN, M, N = 30, 20, 4, 3  # outputs, inputs, clients, rows a step


def draw(name, *shape):
    return random.normal(random.fold(random.key(0), name), *shape).double()


@pytest.mark.parametrize("mu", [0.0, 0.8])
@pytest.mark.parametrize("clients", [(4, 4, 4), (4, 3, 1), (4, 4, 2)], ids=str)
def test_late_is_the_weight_that_is_stepped(clients, mu):
    """W <- W - lr (G' X + mu (W - W0)) for the first k clients of each step, against a weight that is there."""
    base, lr = draw("base", OUT, IN), 0.1
    late, w = Late(base, M, lr, mu, steps=9), base.repeat(M, 1, 1)
    assert late.most == OUT * IN // (OUT + IN) == 12 and not late.full
    for t, k in enumerate(clients):
        x, g = draw(f"x{t}", k * N, IN), draw(f"g{t}", k * N, OUT)
        rows, grads = x.view(k, N, IN), g.view(k, N, OUT)
        assert torch.allclose(late.forward(x, k), torch.bmm(rows, w[:k].mT).view(-1, OUT), rtol=1e-12)
        assert torch.allclose(late.backward(g, k), torch.bmm(grads, w[:k]).view(-1, IN), rtol=1e-12)
        late.learn(g, x, k)
        w[:k] -= lr * (grads.mT @ rows + mu * (w[:k] - base))
    check(late, w, base)
    late.reorder(torch.tensor([2, 0, 3, 1]))
    check(late, w[[2, 0, 3, 1]], base)


def check(late, w, base):
    u = torch.full((M, OUT * IN), torch.nan, dtype=torch.float64)
    late.drift(u)
    weights = torch.tensor([1.0, 0.0, 2.5, 3.0], dtype=torch.float64)
    assert torch.allclose(u, (w - base).flatten(1), rtol=1e-11, atol=1e-13)
    assert torch.allclose(late.weight(), w, rtol=1e-12)
    assert torch.allclose(late.total(weights), weights @ (w - base).flatten(1), rtol=1e-11, atol=1e-12)


def test_late_says_when_it_is_full():
    late = Late(draw("base", OUT, IN), 1, 0.1, 0.0, steps=99)
    for _ in range(4):
        assert not late.full
        late.learn(draw("g", N, OUT), draw("x", N, IN), 1)
    assert late.filled == 12 and late.full, "12 + 3 rows cost more than the weight"


def test_late_that_learnt_nothing_moved_nothing():
    base = draw("base", OUT, IN)
    late, u = Late(base, 2, 0.1, 0.0, 1), torch.ones(2, OUT * IN, dtype=torch.float64)
    late.drift(u)
    assert not u.any() and not late.total(torch.ones(2).double()).any() and torch.equal(late.weight(), base.repeat(2, 1, 1))


BASE = Method(participation=participation.all(), sync=sync.every(epochs=1), batch_size=8)
SUMMED = {
    "sgd": (BASE, True),
    "prox": (BASE.replace(solver=solvers.prox(mu=0.5)), True),
    "adamw": (BASE.replace(solver=solvers.adamw()), True),
    "personal": (BASE.replace(partition=partition.layers(personal="head")), True),
    "cast": (BASE.replace(codec=codecs.cast()), False),
}


@pytest.mark.parametrize("name", SUMMED)
def test_sums_are_enough_where_the_drift_itself_arrives(name):
    method, enough = SUMMED[name]
    task = make_task()
    work = Work(task, method.partition.split(task.model, task.tracked), method.solver, method.codec)
    assert sends_drift(work) is enough


class Doubled:
    """A solver whose message is not the drift."""

    def __init__(self):
        self.inner = solvers.sgd(lr=0.1)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def message(self, local, u):
        return 2 * u, {}


class Keeps(Doubled):
    """A solver that sends the drift and keeps it."""

    def message(self, local, u):
        return u, {"pi": u}


@pytest.mark.parametrize("solver", [Doubled(), Keeps()])
def test_other_messages_are_formed(solver):
    task = make_task()
    assert not sends_drift(Work(task, BASE.partition.split(task.model, task.tracked), solver, BASE.codec))


def test_a_codec_that_may_lose_is_never_skipped():
    """Even if it lost nothing on the probe."""
    task = make_task()
    exact = BASE.codec
    codec = SimpleNamespace(lossy=True, init=exact.init, encode=exact.encode, decode=exact.decode)
    assert not sends_drift(Work(task, BASE.partition.split(task.model, task.tracked), BASE.solver, codec))


def test_a_loss_that_is_not_finite_leaves_a_finite_update_out_of_the_sum():
    """site-2's targets are marked: its loss is infinite, its gradient is not."""
    federation = make_federation()
    federation.train.fields["target"][8:24] += 3

    def loss(output, target):
        marked = torch.where(target >= 3, torch.inf, 0.0)
        return torch.nn.functional.cross_entropy(output, target % 3, reduction="none") + marked

    task = Task(Net, federation, loss=loss).build(0)
    plain, _, stats, _ = drive(task, BASE, "sequential", rounds=1)
    fast, engine, fast_stats, _ = drive(task, BASE, "stacked", rounds=1, block=5)
    assert engine._summed and float((plain.x - fast.x).norm() / plain.x.norm()) < 1e-5
    assert stats[0].left_out == fast_stats[0].left_out == {2: "loss not finite"}


@pytest.mark.parametrize("weights", ["clients", "samples"])
@pytest.mark.parametrize("solver", [solvers.sgd(lr=0.1), solvers.adamw(lr=0.01)], ids=["sgd", "adamw"])
def test_bad_and_lost_clients_are_left_out_of_a_sum(solver, weights):
    """site-2 has an infinite input, site-4 is lost: same model, bytes and reasons as one client at a time."""
    federation = make_federation()
    federation.train.fields["input"][9, 0] = torch.inf  # a sample of site-2
    task = Task(Net, federation).build(0)
    method = BASE.replace(solver=solver, aggregator=aggregation.mean(weights=weights))
    faults = {"lose": lambda round, client: client == 4}
    plain, _, stats, traffic = drive(task, method, "sequential", rounds=2, **faults)
    fast, engine, fast_stats, fast_traffic = drive(task, method, "stacked", rounds=2, block=5, **faults)
    assert engine._summed
    assert float((plain.x - fast.x).norm() / plain.x.norm()) < 1e-5 and traffic == fast_traffic
    for one, other in zip(stats, fast_stats, strict=True):
        mine = dict(zip(other.ids.tolist(), other.status.tolist(), strict=True))
        assert mine == dict(zip(one.ids.tolist(), one.status.tolist(), strict=True))
        assert STATUS[mine[4]] == "no answer" and mine[2] != 0 and sum(s == 0 for s in mine.values()) == 6
