"""The pilot: what clients would send, drawn as the method draws it."""

from __future__ import annotations

import pytest
import torch

from advisor.toys import experiment, least_squares
from conftest import Net, make_federation
from taciturn import Experiment, Method, aggregation, methods, participation, partition, solvers, sync
from taciturn.advisor import run_pilot
from taciturn.aggregation import mean
from taciturn.core.errors import ConfigError, MethodError, RunError
from taciturn.partition import layers
from taciturn.tasks.task import Task


def test_messages_have_the_law_of_minibatch_gradients():
    task, x = least_squares(d=5, clients=4, samples=60)
    p = run_pilot(experiment(task, lr=0.05, batch=6), rounds=3, messages=800)
    assert p.messages.shape == (800, 5) and p.gamma == 0.05 and p.steps == 1 and p.cohort == 4 and p.share == 1
    y = task.data.train.fields["target"].view(4, 60)
    error = (x @ p.x) - y
    gradients = 2 * error.unsqueeze(-1) * x  # [4, 60, 5]
    for i in range(4):
        mine = p.messages[p.client == i].double()
        wanted, cov = -0.05 * gradients[i].mean(0).double(), 0.05**2 * torch.cov(gradients[i].T.double()) / 6
        cov = cov * (60 - 6) / 60  # without replacement
        spread = mine.var(0)
        z = (mine.mean(0) - wanted) / (spread / len(mine)).sqrt()
        assert float(z.abs().max()) < 4.5
        torch.testing.assert_close(spread, cov.diagonal(), rtol=0.3, atol=0)
    # draws of other keys are independent: the lag-one correlation of a client's messages is small
    centred = (p.messages - p.messages.mean(0))[p.client == 0][:, 0]
    assert abs(float((centred[1:] * centred[:-1]).mean() / centred.var())) < 0.2


def test_the_same_pilot_twice_and_nothing_is_kept():
    task, _ = least_squares()
    a, b = (run_pilot(experiment(task, steps=3), rounds=2) for _ in range(2))
    assert torch.equal(a.messages, b.messages) and torch.equal(a.x, b.x) and torch.equal(a.curve, b.curve)
    assert len(a.curve) == 3 and a.curve[-1] < a.curve[0] and a.cost["rounds"] == 2 and a.bytes_down >= 32


def test_weights_cohorts_and_personal_parts():
    data = make_federation()
    method = Method(participation=participation.uniform(count=2), solver=solvers.sgd(lr=0.1), batch_size=4)
    p = run_pilot(Experiment(Task(_net, data), method), rounds=2)
    sizes = data.train.sizes.double()
    torch.testing.assert_close(p.weights, sizes / sizes.sum())
    assert (
        p.cohort_clients == 2
        and p.share == 0.25
        and p.cohort == pytest.approx(float(sizes.sum() ** 2 / sizes.square().sum()) / 4)
    )
    assert len(p.curvature.weights) == int(sizes.sum()) and float(p.curvature.weights.sum()) == pytest.approx(1)
    personal = method.replace(partition=layers(personal="2"), aggregator=mean())
    q = run_pilot(Experiment(Task(_net, data), personal), rounds=2)
    assert q.d == 6 * 8 + 8 and q.weights.unique().numel() == 1


def _net():
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


def test_step_size_is_fitted_where_the_solver_does_not_tell_it():
    task, _ = least_squares()
    p = run_pilot(experiment(task, solver=solvers.sgd(lr=0.01, momentum=0.5), steps=1), rounds=1, messages=600)
    assert p.gamma == pytest.approx(0.01, rel=0.05) and "fitted" in p.gamma_note
    q = run_pilot(experiment(task, solver=solvers.adamw(lr=0.01), steps=2), rounds=1)
    assert q.gamma > 0


def test_errors(monkeypatch):
    task, _ = least_squares()
    with pytest.raises(ConfigError, match="at least 1 round"):
        run_pilot(experiment(task), rounds=0)
    with pytest.raises((RunError, MethodError)):
        run_pilot(experiment(task, lr=1e20, steps=9), rounds=2)
    monkeypatch.setattr("taciturn.advisor.pilot.VALUES", 100)
    with pytest.raises(ConfigError, match=r"shares 8 values.*Share less"):
        run_pilot(experiment(task))


def test_whole_epochs():
    task, _ = least_squares()
    p = run_pilot(experiment(task, sync=sync.every(epochs=1)), rounds=1, messages=30)
    assert p.steps == pytest.approx(25) and torch.isfinite(p.messages).all()


@pytest.mark.parametrize(
    ("fields", "operator", "message"),
    [
        ({}, "fedex", "merges into the frozen base"),
        ({"rank": 2, "ranks": (1, 2)}, "rbla", "with one rank"),
        ({"share": "alternate"}, "tangent", "that changes by rounds"),
    ],
)
def test_unlike_messages_are_refused(fields, operator, message):
    pytest.importorskip("peft", reason="partition lora needs peft: pip install 'taciturn[lora]'")
    part = partition.lora(**({"rank": 2, "targets": "stem"} | fields))
    method = Method(partition=part, aggregator=aggregation.low_rank(operator=operator))
    with pytest.raises(MethodError, match=message):
        run_pilot(Experiment(Task(Net, make_federation()), method, rounds=4))


@pytest.mark.parametrize("method", [methods.fedapm(), methods.scaffold()], ids=["admm", "scaffold"])
def test_solvers_that_send_more_than_a_change_are_refused(method):
    with pytest.raises(MethodError, match="sends more than the change of a model"):
        run_pilot(Experiment(Task(Net, make_federation()), method, rounds=4))
