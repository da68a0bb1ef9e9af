"""SCAFFOLD: what a step and a message are, what is shared beside the model, and which parts go with it.

Symbols: x = [w, c] [2 d]; c_i [d] of the client; the update of a cohort S of N clients.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import make_task
from drive import drive
from taciturn import aggregation, codecs, participation, partition, server, solvers, sync
from taciturn.client import Work
from taciturn.core import random
from taciturn.core.errors import MethodError, ModelError
from taciturn.core.extended import extended
from taciturn.core.types import Block
from taciturn.core.vector import Kind, Layout
from taciturn.method import Method

METHOD = Method(solver=solvers.scaffold(lr=0.1), aggregator=aggregation.controlled(), batch_size=8)
D, P = 4, 2
ONE = torch.ones((), dtype=torch.float64)


def normal(name: str, *shape: int) -> torch.Tensor:
    return random.normal(random.fold(random.key(0), name), *shape).double()


def test_a_step_corrects_w_alone_and_the_message_is_the_mean_gradient():
    """Of gradients g_1, g_2 c_i+ is the mean, whatever c_i and c were; v takes plain steps."""
    x, v, own = normal("x", 2 * D), normal("v", P), normal("own", D)
    solver, gradients, personal = solvers.scaffold(0.3), normal("g", 2, D), normal("p", 2, P)
    local = solver.begin(x, v, {"control": own})
    for g, p in zip(gradients, personal, strict=True):
        found = torch.cat([g, torch.zeros(D)]), p
        local, _ = solver.step(local, {}, lambda y, v, batch, found=found: (y.sum(), *found), ONE / 2)
    c, mean = x[D:], gradients.mean(0)
    torch.testing.assert_close(local["y"], torch.cat([x[:D] - 0.3 * (mean - own + c), c]))
    torch.testing.assert_close(local["v"], v - 0.3 * personal.mean(0))
    message, kept = solver.message(local, local["y"] - x)
    torch.testing.assert_close(kept["control"], mean)
    torch.testing.assert_close(message, torch.cat([(local["y"] - x)[:D], mean - own]))


def test_a_round_of_rate_zero_changes_no_control():
    solver, x = solvers.scaffold(0.3), normal("x", 2 * D)
    local = solver.begin(x, normal("v", P), {"control": normal("own", D)})
    local, _ = solver.step(local, {}, lambda y, v, batch: (y.sum(), y, v), 0 * ONE)
    message, kept = solver.message(local, local["y"] - x)
    assert torch.equal(message, torch.zeros(2 * D)) and torch.equal(kept["control"], local["control"])


def test_the_server_takes_the_mean_of_one_half_and_a_share_of_the_other():
    """Blocks of any size; one client of the three is left out, four of the seven are not in the cohort."""
    u, weights = normal("u", 3, 2 * D), torch.tensor([1.0, 0.0, 1.0])
    u[1] = 0.0
    rule, layout = aggregation.controlled(lr=0.5), Method().split(make_task().model, frozenset()).layout
    state = rule.init(u[0], torch.tensor([5, 1, 2, 8, 1, 1, 1]))
    for cuts in ([3], [1, 2], [1, 1, 1]):
        acc = rule.start(state, u[0])
        for ids in torch.arange(3).split(cuts):
            status = torch.zeros(len(ids), dtype=torch.int64)
            acc = rule.add(acc, Block(ids, torch.zeros_like(u[ids]), u[ids], weights[ids], layout, {}, status))
        change, kept = rule.finish(acc)
        want = torch.cat([0.5 * u[:, :D].sum(0) / 2, u[:, D:].sum(0) / 7])
        torch.testing.assert_close(change.update, want, rtol=1e-12, atol=1e-12)
        assert kept == state
    assert rule.weigh(torch.tensor([3, 90])).tolist() == [1.0, 1.0]


def test_values_beside_the_model_are_shared_and_not_joined():
    task = make_task()
    plain, split = Method().split(task.model, task.tracked), METHOD.split(task.model, task.tracked)
    assert split.layout.d == 2 * plain.layout.d and torch.equal(split.x0[: plain.layout.d], plain.x0)
    assert split.layout.names[6:] == tuple(f"scaffold.control.{name}" for name in plain.layout.names)
    assert not split.x0[plain.layout.d :].any()
    joined = split.join({}, split.layout.views(split.x0), {})
    assert list(joined) == list(plain.join({}, plain.layout.views(plain.x0), {}))


def test_a_partition_that_has_no_place_for_them_is_refused():
    task = make_task()
    split = Method().split(task.model, task.tracked)
    merging = replace(split, base=Layout(("stem",), ((8, 6),)))
    with pytest.raises(MethodError, match=r"shares stem\.weight, and the model has parameters of these names"):
        extended(split, {"stem.weight": torch.zeros(1)})
    for odd, says in ((replace(split, kinds=(Kind(),)), "clients train unlike parts"), (merging, "base takes products")):
        with pytest.raises(MethodError, match=rf"shares tensors \(scaffold\.control\.stem\.weight, \.\.\).*{says}"):
            solvers.scaffold().extend(odd)
    assert solvers.scaffold().extend(replace(split, merging=merging)).merging is None, "this mean does not merge"
    with pytest.raises(MethodError, match="shares nothing"):
        METHOD.replace(partition=partition.local()).split(task.model, task.tracked)
    inside = METHOD.replace(solver=solvers.prox(solver=solvers.scaffold()), aggregator=aggregation.mean())
    with pytest.raises(MethodError, match=r"must be method\.solver itself"):
        inside.solver.init(inside.split(task.model, task.tracked))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"aggregator": aggregation.mean()}, r"two halves of SCAFFOLD; got solver = scaffold and aggregator = mean"),
        ({"solver": solvers.sgd()}, r"two halves of SCAFFOLD; got solver = sgd and aggregator = controlled"),
        ({"server": server.sgd(lr=0.5)}, r"aggregator = controlled\(lr = \.\.\)"),
        ({"server": server.adam()}, r"is a mean and no direction; use server = sgd\(lr = 1\)"),
        ({"codec": codecs.cast()}, r"use identity, or a memory: error_feedback\(cast\(\.\.\)\)"),
        ({"codec": codecs.lossless(codecs.quantize4())}, "what codec = lossless.* loses stays in them"),
    ],
)
def test_parts_that_do_not_go_with_it(parts, says):
    with pytest.raises(MethodError, match=says):
        METHOD.replace(**parts)


ALLOWED = {
    "error_feedback": codecs.error_feedback(codecs.top_k(share=0.3)),
    "difference": codecs.difference(codecs.quantize8()),
    "lossless": codecs.lossless(codecs.identity()),
    "lossless difference": codecs.lossless(codecs.difference(codecs.quantize8())),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_codecs_that_lose_nothing_for_good_go_with_it(name):
    """And c stays near the mean of all c_i, with a memory as without."""
    task = make_task()
    method = METHOD.replace(codec=ALLOWED[name], participation=participation.uniform(count=4), sync=sync.every(steps=3))
    state, engine, stats, _ = drive(task, method, "stacked", rounds=6)
    kept = engine.store.read(torch.arange(8))
    missing = kept["tx"]["error"][:, 99:].mean(0) if "error" in kept["tx"] else 0.0
    c, own = state.x[99:], kept["solver"]["control"].mean(0)
    assert float((c + missing - own).norm()) < (0.05 if "difference" in name else 1e-5) * float(own.norm())
    assert stats[-1].loss.mean() < stats[0].loss.mean()


def test_personal_layers_are_trained_and_have_no_control():
    task = make_task()
    method = METHOD.replace(partition=partition.layers(personal="head"))
    split = method.split(task.model, task.tracked)
    assert split.layout.d == 2 * (99 - 27) and split.personal.d == 27
    assert Work(task, split, method.solver, method.codec).newcomer()["solver"]["control"].shape == (72,)
    _, engine, _, _ = drive(task, method, rounds=1)
    assert len(torch.unique(engine.store.read(torch.arange(8))["v"], dim=0)) == 8


def test_running_statistics_are_refused_as_without_it():
    with pytest.raises(ModelError, match="running"):
        METHOD.split(make_task().model, frozenset({"norm.running_mean"}))
