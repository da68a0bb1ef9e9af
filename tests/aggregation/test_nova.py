"""FedNova's average: what each client counts does not depend on how many steps it did.

Symbols: u_i [d] updates; t_i steps; w_i weights.
"""

from __future__ import annotations

import pytest
import torch

from conftest import make_task
from drive import drive
from taciturn import aggregation, participation, solvers, sync
from taciturn.core import random
from taciturn.core.types import Block
from taciturn.core.vector import Layout
from taciturn.method import Method
from taciturn.sync import fda

U = random.normal(random.key(0), 4, 6)
W = torch.tensor([3.0, 1.0, 2.0, 5.0])


def run(aggregator, steps: torch.Tensor, cuts=(4,)) -> torch.Tensor:
    acc = aggregator.start({}, torch.zeros(6))
    for rows in torch.arange(4).split(list(cuts)):
        stats = {"steps": steps[rows].to(torch.int32), "loss": torch.zeros(len(rows))}
        status = torch.zeros(len(rows), dtype=torch.int64)
        acc = aggregator.add(acc, Block(rows, U[rows], U[rows], W[rows], Layout.flat(6), stats, status))
    return aggregator.finish(acc)[0].update


@pytest.mark.parametrize("cuts", [(4,), (1, 1, 1, 1), (3, 1)])
def test_formula(cuts):
    t = torch.tensor([2, 7, 1, 4])
    w, u = W.double(), U.double()
    share = w / w.sum()
    want = (share @ t.double()) * (share / t @ u)
    torch.testing.assert_close(run(aggregation.nova(), t, cuts), want, rtol=1e-12, atol=0)


def test_equal_steps_are_the_mean():
    steps = torch.full((4,), 3)
    torch.testing.assert_close(run(aggregation.nova(), steps), run(aggregation.weighted(), steps), rtol=1e-5, atol=1e-6)


def test_who_does_not_count_does_not_count():
    """A client that was left out has zero weight and zero steps."""
    block = Block(torch.arange(2), U[:2], U[:2], torch.tensor([1.0, 0.0]), Layout.flat(6),
                  {"steps": torch.tensor([4, 0])}, torch.zeros(2, dtype=torch.int64))  # fmt: skip
    nova = aggregation.nova()
    update = nova.finish(nova.add(nova.start({}, torch.zeros(6)), block))[0].update
    torch.testing.assert_close(update, U[0].double(), rtol=1e-12, atol=0)


def test_unlike_epochs_change_the_aggregate_and_equal_steps_do_not():
    task = make_task()
    base = Method(participation=participation.all(), solver=solvers.sgd(lr=0.05), batch_size=8)
    for rule, same in ((sync.every(steps=3), True), (sync.every(epochs=2), False)):
        mean, nova = (
            drive(task, base.replace(sync=rule, aggregator=part), rounds=1)[0].x
            for part in (aggregation.weighted(), aggregation.nova())
        )
        assert (float((mean - nova).norm() / mean.norm()) < 1e-6) is same


@pytest.mark.parametrize("engine", ["sequential", "stacked"])
def test_beside_the_plain_mean_where_clients_stop_themselves(engine):
    """Clients that drift fast stop early: nova gives each its weight all the same, and both learn."""
    task, found = make_task(), {}
    for part in (aggregation.weighted(), aggregation.nova()):
        method = Method(
            participation=participation.all(), solver=solvers.sgd(lr=0.1), batch_size=8, sync=fda(monitor="local"),
            aggregator=part,
        )  # fmt: skip
        state, _, stats, _ = drive(task, method, engine, rounds=4)
        found[repr(part)] = state.x
        assert len({int(s) for s in stats[-1].steps}) > 1, "clients did unlike amounts of work"
        assert float(stats[-1].loss.mean()) < 0.8 * float(stats[0].loss.mean())
    one, other = found.values()
    assert not torch.equal(one, other)
