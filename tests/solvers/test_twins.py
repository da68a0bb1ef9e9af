"""Ditto and pFedMe, one step at a time: which of y and v moves, and how; and what the two refuse.

Symbols: y, v, x [d] shared, personal and received model; loss |A w - b|^2 / (2 n) of the rows of a batch.
"""

from __future__ import annotations

import pytest
import torch

from conftest import make_task
from taciturn import partition, solvers
from taciturn.core import random
from taciturn.core.errors import ConfigError, MethodError

D, ROWS = 5, 8
ONE = torch.ones((), dtype=torch.float64)


def normal(name: str, *shape: int) -> torch.Tensor:
    return random.normal(random.fold(random.key(0), name), *shape).double()


BATCH = {"A": normal("A", ROWS, D), "b": normal("b", ROWS)}
X, V = normal("x", D), normal("v", D)


def loss(w):
    return (BATCH["A"] @ w - BATCH["b"]).square().mean() / 2


def gradient(w):
    return BATCH["A"].T @ (BATCH["A"] @ w - BATCH["b"]) / ROWS


def oracle(y, v, batch):
    """Of twins: the model is v."""
    return loss(v), torch.zeros_like(y), gradient(v)


def after(solver, steps: int = 1, lr_scale=ONE):
    local, losses = solver.begin(X, V, {}), []
    for _ in range(steps):
        local, found = solver.step(local, BATCH, oracle, lr_scale)
        losses.append(found)
    return local, losses


def test_ditto_steps_on_both_and_pulls_only_v():
    local, losses = after(solvers.ditto(0.5, solvers.sgd(0.1), solvers.sgd(0.2)), lr_scale=ONE / 2)
    torch.testing.assert_close(local["y"], X - 0.05 * gradient(X))
    torch.testing.assert_close(local["v"], V - 0.1 * (gradient(V) + 0.5 * (V - X)))
    assert losses[0] == loss(V)
    message, kept = solvers.ditto().message(local, local["y"] - X)
    assert torch.equal(message, local["y"] - X) and kept == {}


@pytest.mark.parametrize("still", ["u", "v"])
def test_ditto_moves_one_where_the_other_stands(still):
    parts = {"u": solvers.sgd(0.1), "v": solvers.adamw(0.1)} | {still: solvers.sgd(0.0)}
    local, _ = after(solvers.ditto(0.5, **parts), steps=3)
    assert torch.equal(local["y"], X) is (still == "u") and torch.equal(local["v"], V) is (still == "v")


@pytest.mark.parametrize(
    "inner", [solvers.sgd(0.1, momentum=0.9, clip=0.5), solvers.adamw(0.05, weight_decay=0.1)], ids=str
)
def test_ditto_gives_each_solver_a_whole_model(inner):
    """Without a pull v is trained as the solver alone would train it from v, and y as from x; clips are apart."""
    local, losses = after(solvers.ditto(0.0, inner, inner), steps=4)
    for name, start in (("y", X), ("v", V)):
        alone = inner.begin(start, start[:0], {})
        for _ in range(4):
            alone, found = inner.step(alone, BATCH, lambda y, v, batch: (loss(y), gradient(y), v), ONE)
        torch.testing.assert_close(local[name], alone["y"], rtol=1e-14, atol=1e-14)
    assert losses[-1] == found


def test_ditto_of_a_strong_pull_is_the_shared_model():
    local, _ = after(solvers.ditto(1e3, solvers.sgd(0.1), solvers.sgd(1e-3)), steps=60)
    assert float((local["v"] - X).norm()) < 1e-2 < 0.1 < float((V - X).norm())


def test_pfedme_is_a_step_of_the_proximal_point():
    """Many inner steps reach theta = argmin f + lam / 2 |theta - x|^2; y goes lr lam of the way to it."""
    lam, lr = 2.0, 0.1
    local, losses = after(solvers.pfedme(lam, 400, lr, 0.1))
    theta = torch.linalg.solve(
        BATCH["A"].T @ BATCH["A"] / ROWS + lam * torch.eye(D), BATCH["A"].T @ BATCH["b"] / ROWS + lam * X
    )
    torch.testing.assert_close(local["v"], theta)
    torch.testing.assert_close(local["y"], X - lr * lam * (X - theta))
    assert losses[0] == loss(X)
    assert torch.equal(after(solvers.pfedme(lr=0.0), steps=3)[0]["y"], X)


@pytest.mark.parametrize("solver", [solvers.ditto(), solvers.pfedme()], ids=["ditto", "pfedme"])
@pytest.mark.parametrize("part", [partition.full(), partition.layers(personal="head"), partition.local()], ids=str)
def test_other_partitions_are_refused(solver, part):
    with pytest.raises(MethodError, match=r"whole model of its own.*shares \d+ values.*use partition = twins"):
        solver.init(part.split(make_task().model, frozenset()))
    assert solver.init(partition.twins().split(make_task().model, frozenset())) == {}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: solvers.ditto(-1.0), r"ditto\.lam: at least 0; got -1"),
        (
            lambda: solvers.ditto(v=solvers.sgd(schedule=solvers.schedules.cosine(9))),
            "one schedule; got u.schedule = const",
        ),
        (lambda: solvers.pfedme(inner_steps=0), r"pfedme\.inner_steps: at least 1; got 0"),
        (lambda: solvers.pfedme(lam=-2.0), r"pfedme\.lam: at least 0; got -2"),
        (lambda: solvers.pfedme(local_lr=-1.0), r"pfedme\.local_lr: at least 0; got -1"),
    ],
)
def test_odd_settings_are_named(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


class keeping:
    """A solver that keeps something between rounds."""

    schedule = solvers.sgd().schedule

    def init(self, split):
        return {"momentum": torch.zeros_like(split.x0)}


@pytest.mark.parametrize(
    ("inner", "says"),
    [
        (solvers.scaffold(), r"must be method\.solver itself"),
        (solvers.pfedme(), "pfedme: .* whole model of its own"),
        (keeping(), r"method\.solver\.u = .* keeps a state between rounds; use sgd"),
    ],
    ids=["scaffold", "pfedme", "keeping"],
)
def test_solvers_that_have_no_place_in_ditto(inner, says):
    split = partition.twins().split(make_task().model, frozenset())
    with pytest.raises(MethodError, match=says):
        solvers.ditto(u=inner).init(split)
