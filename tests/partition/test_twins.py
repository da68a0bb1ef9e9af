"""Two copies of a model, and a model that is not shared at all.

Symbols: d = p = 99 parameters of the model of the tests.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import taciturn
from conftest import Net, make_federation, make_task
from drive import drive, resumes
from taciturn import Experiment, Task, codecs, participation, partition, solvers, sync
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import MethodError, ModelError
from taciturn.core.state import equal
from taciturn.method import Method
from taciturn.partition import full, local, twins

BASE = Method(participation=participation.uniform(count=4), sync=sync.every(epochs=2), batch_size=8)
DITTO = BASE.replace(partition=twins(), solver=solvers.ditto(lam=0.5))


def test_twins_share_all_and_run_the_personal_copy():
    model = Net()
    split, whole = twins().split(model, frozenset()), full().split(model, frozenset())
    assert split.layout == split.personal == whole.layout and split.buffers.d == 0
    assert torch.equal(split.x0, whole.x0) and torch.equal(split.v0, whole.x0)
    y, v = split.layout.views(split.x0), split.personal.views(split.v0 + 1)
    assert all(torch.equal(tensor, v[name]) for name, tensor in split.join({}, y, v).items())


def test_local_shares_nothing():
    split = local().split(Net(nn.BatchNorm1d(8)), frozenset({"norm.running_mean", "norm.running_var"}))
    assert split.layout.d == 0 == len(split.x0) and split.personal.d == 99 and split.buffers.d == 16


@pytest.mark.parametrize("part", [twins(), local()], ids=str)
def test_models_they_cannot_split(part):
    with pytest.raises(ModelError, match="no parameter that requires a gradient"):
        part.split(Net().requires_grad_(False), frozenset())
    if part == twins():
        with pytest.raises(ModelError, match="running statistics of BatchNorm"):
            part.split(Net(), frozenset({"norm.running_mean"}))


@pytest.mark.parametrize("solver", [solvers.sgd(0.1), solvers.sgd(0.1, momentum=0.5), solvers.adamw(0.01)], ids=str)
def test_local_trains_everybody_alone_on_every_engine(solver):
    """Messages are empty, their frames and statistics are all that is paid; each client is as if there were no others."""
    task, method = make_task(), BASE.replace(partition=local(), solver=solver)
    state, engine, stats, traffic = drive(task, method, rounds=3)
    _, wire, _, wired = drive(task, method, "loopback", rounds=3)
    _, stacked, _, blocks = drive(task, method, "stacked", rounds=3, block=3)
    assert state.x.shape == (0,) and equal(engine.store.export(), wire.store.export()) and traffic == wired == blocks
    kinds = traffic[-1]["by_kind"]
    assert [kinds[kind]["payload"] for kind in ("down/model", "up/update", "up/stats")] == [0, 0, 4 * 8]
    rows, near = (one.store.read(torch.arange(8))["v"] for one in (engine, stacked))
    assert float((rows - near).norm() / rows.norm()) < 1e-5
    drawn = sorted({int(i) for stat in stats for i in stat.ids})
    alone = method.replace(participation=participation.all())
    own = drive(task, alone, rounds=1)[1].store.read(torch.arange(8))["v"]
    once = [i for i in drawn if sum(int((stat.ids == i).sum()) for stat in stats) == 1]
    assert once and torch.equal(own[once], rows[once])


@pytest.mark.parametrize(
    "parts",
    [{"codec": codecs.top_k(k=3)}, {"broadcast": Broadcast(codecs.quantize8(), "change")}, {"sync": sync.fda()}],
    ids=["codec", "broadcast", "sync"],
)
def test_where_nothing_is_shared_nothing_is_encoded_or_looked_at(parts):
    with pytest.raises(MethodError, match=r"partition = local\(\) shares nothing.*use codec = identity"):
        BASE.replace(partition=local(), **parts).split(Net(), frozenset())


def test_runs_go_on_and_results_are_read(tmp_path):
    """Of twins the result is x and a client's model its v; a local run leaves x as it was, and clients' own data count."""
    task = Task(Net, make_federation())
    for method in (DITTO, BASE.replace(partition=local())):
        experiment = Experiment(task, method, rounds=2, evaluate_every=2)
        whole = resumes(experiment, tmp_path / type(method.partition).__name__, rounds=4)
        assert whole.header["measured_on"] == "the clients' test data" and 0 <= whole.metrics["accuracy"] <= 1
        start = torch.cat([p.detach().reshape(-1) for p in task.build(0).model.parameters()])
        result = torch.cat([p.detach().reshape(-1) for p in whole.model.parameters()])
        mine = torch.cat([p.detach().reshape(-1) for p in whole.client("site-3").parameters()])
        assert torch.equal(result, start) is (method.partition == local()) and not torch.equal(mine, result)


def test_ditto_without_a_pull_is_fedavg_beside_local_training():
    task = make_task()
    state, engine, _, _ = drive(task, DITTO.replace(solver=solvers.ditto(0.0)), rounds=3)
    shared = drive(task, BASE, rounds=3)[0]
    alone = drive(task, BASE.replace(partition=partition.local()), rounds=3)[1]
    assert torch.equal(state.x, shared.x)
    assert torch.equal(engine.store.read(torch.arange(8))["v"], alone.store.read(torch.arange(8))["v"])


def test_the_parts_are_exported():
    assert {"full", "layers", "local", "lora", "twins"} == set(taciturn.partition.__all__)
