"""Adapters through a whole round: what is broadcast, what the record tells, on every engine.

Symbols: B_i [m, r], A_i [r, n] what client i holds after training; M = sum w_i B_i A_i; (P, Q) what all continue from.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft", reason="partition lora needs peft: pip install 'taciturn[lora]'")

import taciturn
from aggregation.layers import part_of
from conftest import Net, make_federation, make_task
from drive import drive
from taciturn import Broadcast, Experiment, Task, aggregation, codecs, participation, partition, server, solvers, sync
from taciturn.aggregation import factors
from taciturn.aggregation.low_rank import OPERATORS, pairs_of
from taciturn.core import random
from taciturn.core.errors import MethodError, RunError, UnknownName
from taciturn.core.vector import Layout
from taciturn.method import Method

PART = partition.lora(rank=2, targets=("stem", "head"), also="norms")
METHOD = Method(
    partition=PART, participation=participation.uniform(count=4), solver=solvers.sgd(lr=0.05), batch_size=8,
    sync=sync.every(epochs=3),
)  # fmt: skip


class Spy:
    """An aggregator that keeps what it is given."""

    def __init__(self, inner):
        self.inner, self.rows, self.weights = inner, [], []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def add(self, acc, block):
        self.rows.append((block.start + block.updates).double())
        self.weights.append(block.weights.double())
        self.layout = block.layout
        return self.inner.add(acc, block)


@pytest.fixture(scope="module")
def task():
    return Task(Net, make_federation()).build(0, prepare=PART.prepare)


@pytest.mark.parametrize("operator", [name for name, one in OPERATORS.items() if not one.common])
def test_engines_agree(operator, task):
    method = METHOD.replace(aggregator=part_of(operator))
    state, _, stats, traffic = drive(task, method, rounds=4)
    wired, _, wired_stats, wire_traffic = drive(task, method, "loopback", rounds=4)
    stacked, _, stacked_stats, stacked_traffic = drive(task, method, "stacked", rounds=4, block=3)
    assert torch.equal(state.x, wired.x) and traffic == wire_traffic == stacked_traffic
    assert float((state.x - stacked.x).norm() / state.x.norm()) <= 1e-4
    assert [s.aggregate for s in stats] == [s.aggregate for s in wired_stats]
    assert float(stats[-1].loss.mean()) < float(stats[0].loss.mean())
    for told in (stat.aggregate for stat in (*stats, *stacked_stats)):
        assert set(told) == {"stem", "head"} and all(0 <= layer["product"] < 1.5 for layer in told.values())


@pytest.mark.parametrize("operator", [name for name, one in OPERATORS.items() if not one.common])
def test_what_all_continue_from(operator, task):
    """factor_mean is the mean, its product stays when rebalanced; the SVD's is the best of rank 2; norms are the mean."""
    spy = Spy(part_of(operator))
    state, *_ = drive(task, METHOD.replace(aggregator=spy), rounds=1)
    layout, rows, weights = spy.layout, torch.cat(spy.rows), torch.cat(spy.weights)
    share = weights / weights.sum()
    mean, got, each = layout.views(share @ rows), layout.views(state.x.double()), layout.views(rows)
    for name in ("norm.weight", "norm.bias"):
        torch.testing.assert_close(got[name], mean[name], rtol=1e-5, atol=1e-6)
    for layer, (b, a) in pairs_of(layout).items():
        product = got[b] @ got[a]
        best = torch.einsum("k,kmr,krn->mn", share, each[b], each[a])
        u, s, v = torch.linalg.svd(best, full_matrices=False)
        truncated, tail = u[:, :2] * s[:2] @ v[:2], float(s[2:].norm())
        error = float((product - best).norm())
        assert tail * (1 - 1e-4) <= error + 1e-7, layer
        if operator.startswith("factor_mean"):
            torch.testing.assert_close(product, mean[b] @ mean[a], rtol=1e-3, atol=1e-5)
        if operator == "factor_mean":
            torch.testing.assert_close(got[a], mean[a], rtol=1e-5, atol=1e-6)
        if operator == "product_svd":
            torch.testing.assert_close(product, truncated, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(got[b].T @ got[b], got[a] @ got[a].T, rtol=1e-3, atol=1e-5)
        if operator == "lora_fair_style":
            torch.testing.assert_close(got[a], mean[a], rtol=1e-5, atol=1e-6)


def test_factor_mean_is_the_mean(task):
    one, *_ = drive(task, METHOD.replace(aggregator=aggregation.low_rank(operator="factor_mean")), rounds=3)
    other, *_ = drive(task, METHOD.replace(aggregator=aggregation.weighted()), rounds=3)
    assert float((one.x - other.x).norm() / other.x.norm()) <= 1e-5


@pytest.mark.parametrize(
    "parts",
    [
        {
            "sync": sync.fda(),
            "codec": codecs.error_feedback(codecs.quantize4()),
            "broadcast": Broadcast(codecs.quantize8()),
        },
        {"participation": participation.all(), "solver": solvers.adamw(lr=0.01)},
    ],
    ids=["fda-q4-q8", "adamw"],
)
def test_composes_with_other_parts(parts, task):
    """With a lossy way down the factors are what clients hold, not what the server has."""
    method = METHOD.replace(aggregator=aggregation.low_rank(), **parts)
    state, _, stats, traffic = drive(task, method, rounds=4)
    wired, _, _, same = drive(task, method, "loopback", rounds=4)
    assert torch.equal(state.x, wired.x) and traffic == same
    assert float(stats[-1].loss.mean()) < float(stats[0].loss.mean())


def test_lost_clients_drop_out(task):
    spy = Spy(aggregation.low_rank())
    method = METHOD.replace(aggregator=spy, participation=participation.all())
    state, _, stats, _ = drive(task, method, rounds=1, lose=lambda round, i: i == 2)
    kept = METHOD.replace(aggregator=aggregation.low_rank(), participation=participation.all())
    assert stats[0].left_out == {2: "no answer"} and torch.isfinite(state.x).all()
    everyone, *_ = drive(task, kept, rounds=1)
    assert not torch.equal(everyone.x, state.x)


@pytest.mark.parametrize(
    ("share", "rest", "shared", "personal"),
    [("B", "frozen", {"B"}, set()), ("A", "personal", {"A"}, {"B"}), ("B", "personal", {"B"}, {"A"})],
    ids=["ffa", "fedsa", "b-shared"],
)
def test_one_factor_is_shared(share, rest, shared, personal):
    part = partition.lora(rank=2, targets=("stem", "head"), share=share, rest=rest)
    task = Task(Net, make_federation()).build(0, prepare=part.prepare)
    split = part.split(task.model, task.tracked)
    assert {name.split("lora_")[1][0] for name in split.layout.names} == shared
    assert {name.split("lora_")[1][0] for name in split.personal.names} == personal
    method = METHOD.replace(partition=part)
    state, _, stats, traffic = drive(task, method, rounds=4)
    wired, _, _, same = drive(task, method, "loopback", rounds=4)
    assert torch.equal(state.x, wired.x) and traffic == same
    assert float(stats[-1].loss.mean()) < float(stats[0].loss.mean())
    with pytest.raises(MethodError, match="the mean is exact"):
        drive(task, method.replace(aggregator=aggregation.low_rank()), rounds=1)


def test_in_toml_and_in_the_record(tmp_path):
    method = METHOD.replace(aggregator=aggregation.low_rank(operator="tangent"))
    experiment = Experiment(Task(Net, make_federation()), method, rounds=2)
    result = taciturn.run(experiment, out=tmp_path / "run")
    assert result.history[1]["aggregate"]["stem"]["product"] >= 0
    resumed = taciturn.run(experiment.replace(rounds=3), out=tmp_path / "run", resume=True)
    whole = taciturn.run(experiment.replace(rounds=3))
    assert [line["aggregate"] for line in resumed.history] == [line["aggregate"] for line in whole.history]


def test_pairs_by_name():
    names = (
        "e.lora_embedding_A",
        "e.lora_embedding_B",
        "c.lora_A.weight",
        "c.lora_B.weight",
        "d.lora_A.weight",
        "n.weight",
    )
    found = pairs_of(Layout(names, ((1,),) * 6))
    assert found == {"e": (names[1], names[0]), "c": (names[3], names[2])}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: aggregation.low_rank(operator="svd"), UnknownName, "there is no operator 'svd'"),
        (
            lambda: METHOD.replace(aggregator=aggregation.low_rank(), server=server.adam(lr=0.1)),
            MethodError,
            "gauge of their own",
        ),
        (lambda: partition.lora(share="A"), MethodError, "nothing is ever learnt"),
        (lambda: drive(make_task(), Method(aggregator=aggregation.low_rank()), rounds=1), MethodError, "partition = lora"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_server_that_remembers_goes_with_a_gauge_that_stays():
    METHOD.replace(aggregator=aggregation.low_rank(operator="tangent"), server=server.adam(lr=0.1))


@pytest.mark.parametrize("backend", ["rsvd", "core", "gram"])
@pytest.mark.parametrize("size", [1e-12, 1e15])
def test_the_product_is_found_at_any_scale(backend, size):
    """Squares of float32 factors would overflow."""
    held = [(random.normal(random.key(i), 12, 2), random.normal(random.key(9 + i), 2, 9)) for i in range(4)]
    weights = torch.full((4,), 0.25)
    one = factors.product_svd(held, weights, random.key(0), backend=backend)
    big = factors.product_svd([(b * size, a * size) for b, a in held], weights, random.key(0), backend=backend)
    assert torch.allclose(big[0] / size, one[0], rtol=1e-3, atol=1e-4)
    assert torch.allclose(big[1] / size, one[1], rtol=1e-3, atol=1e-4)


def test_factors_that_cannot_be_decomposed_are_an_error_with_a_remedy(task, monkeypatch):
    def fail(*_):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setitem(OPERATORS, "product_svd", replace(OPERATORS["product_svd"], run=fail))
    with pytest.raises(RunError, match=r"the factors of stem have grown to .* learning rate"):
        drive(task, METHOD.replace(aggregator=part_of("product_svd")), rounds=1)
