"""Rules that look while clients train: the seam that dynamic synchronisation uses, on every engine.

Two small rules: one where the server stops the round, one where each client stops itself.
"""

from __future__ import annotations

import pytest
import torch

from conftest import make_task
from drive import drive
from taciturn import participation, solvers
from taciturn.core.state import equal
from taciturn.method import Method
from watching import Watch

METHOD = Method(participation=participation.uniform(count=5), solver=solvers.sgd(lr=0.1, momentum=0.5), batch_size=8)


@pytest.mark.parametrize("solver", [METHOD.solver, solvers.sgd(lr=0.1), solvers.adamw(lr=0.01)], ids=repr)
@pytest.mark.parametrize("rule", [Watch(), Watch(local=True)], ids=["server-stops", "client-stops"])
def test_engines_agree_under_a_watching_rule(rule, solver):
    task, method = make_task(), METHOD.replace(sync=rule, solver=solver)
    state, engine, stats, traffic = drive(task, method)
    wired, wire, _, wire_traffic = drive(task, method, "loopback")
    stacked, _, stacked_stats, stacked_traffic = drive(task, method, "stacked", block=2)
    assert torch.equal(state.x, wired.x) and equal(engine.store.export(), wire.store.export())
    assert float((state.x - stacked.x).norm() / state.x.norm()) <= 1e-5
    assert traffic == wire_traffic == stacked_traffic
    for one, many in zip(stats, stacked_stats, strict=True):
        assert torch.equal(one.steps, many.steps) and one.exchanges == many.exchanges
    steps = torch.cat([stat.steps for stat in stats])
    assert steps.min() < 7, "the rule never stopped anyone"
    assert len(set(steps.tolist())) > 1


def test_monitoring_is_counted_apart():
    """One float from each client still training at each check, and the steps of the next stride to those that go on;
    theta goes down once a round; round trips are counted."""
    _, engine, stats, traffic = drive(make_task(), METHOD.replace(sync=Watch(local=True)), rounds=3)
    totals = engine.post.ledger.totals
    checks = sum(int(((stat.steps + 1) // 2).sum()) for stat in stats)
    assert totals["down/monitor"]["payload"] == 3 * 5 * 4 + 4 * checks
    assert totals["up/monitor"] == {"payload": 4 * checks, "frame": 28 * checks, "messages": checks}
    for stat, line in zip(stats, traffic, strict=True):
        assert line["exchanges"] == stat.exchanges
        assert line["monitor"] > 0


def test_theta_moves_on():
    state, *_ = drive(make_task(), METHOD.replace(sync=Watch(theta=0.25)), rounds=3)
    assert float(state.sync["theta"]) == 2.0
