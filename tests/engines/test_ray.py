"""Actors of Ray: the same bits as stacked, also when actors die; errors arrive and say what to do."""

from __future__ import annotations

import os
import sys
import threading
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import Net, make_task
from drive import drive
from taciturn import participation, partition, solvers, sync
from taciturn.core.errors import ConfigError, DataError, RunError
from taciturn.core.state import equal
from taciturn.engines import ray as ours
from taciturn.engines.crew import Workers
from taciturn.engines.ray import Flat, Remote
from taciturn.method import Method
from watching import Watch

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'taciturn[ray]'")
BASE = Method(participation=participation.uniform(count=6), sync=sync.every(epochs=2), batch_size=8)
METHODS = {
    "plain": BASE,
    "adamw, personal head": BASE.replace(solver=solvers.adamw(lr=0.01), partition=partition.layers(personal="head")),
}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Two CPUs on this machine; actors find what tests import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # no token in the home folder
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        path = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}}
        ray.init(
            "local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, logging_level="error",
            log_to_driver=False, runtime_env=path,
        )  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def task():
    return make_task(lambda: Net(dropout=0.2))


def odd(error=None):
    """A model with a weight of its own, so that it runs through vmap; raises in any process but this one.

    The class is local, so that it travels as text: actors do not have this file.
    """

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale, self.home = nn.Linear(6, 3), nn.Parameter(torch.ones(3)), os.getpid()

        def forward(self, x):
            if error is not None and os.getpid() != self.home:
                raise error
            return self.layer(x) * self.scale

    return Odd()


@pytest.mark.parametrize("name", [*METHODS, "odd model"])
def test_two_actors_are_stacked_bit_for_bit(name, task):
    method = METHODS.get(name, BASE)
    task = make_task(odd) if name == "odd model" else task
    alone, one, _, traffic = drive(task, method, "stacked", rounds=3, block=2)
    state, many, _, same = drive(task, method, "ray", rounds=3, block=2)
    assert isinstance(many.crew, Workers) and len(many.crew._posts) == 2, "as many as there are CPUs"
    ids = torch.arange(8)
    assert torch.equal(alone.x, state.x) and equal(one.store.read(ids), many.store.read(ids)) and traffic == same
    found = many.evaluate(ids, state.cast, "train")
    assert all(found[k].equal(v) for k, v in one.evaluate(ids, alone.cast, "train").items())
    many.crew.close()
    assert not many.crew.deaths


def test_a_killed_actor_is_replaced_and_its_blocks_are_repeated(task, monkeypatch):
    """With a rule that watches: strides and an upload are repeated, of what was answered already and what was not.

    The first to replace it is said to find no CPU, as when a machine is lost; then one is shared.
    """
    method = BASE.replace(sync=Watch(theta=0.02, local=True))
    alone, _, _, traffic = drive(task, method, "stacked", rounds=3, block=1)
    seen, tell, placed, asked, refuse = [0], Remote.tell, Remote.placed, [], []

    def telling(self, name, *arguments):
        tell(self, name, *arguments)
        seen[0] += name == "collect"
        if name == "collect" and seen[0] == 12:  # the last block of the second round
            ray.kill(self.actor)
            refuse.append(False)

    def hire(made, cpus):
        asked.append(cpus)
        return Remote(made, cpus)

    monkeypatch.setattr(Remote, "placed", lambda self: refuse.pop() if refuse else placed(self))
    monkeypatch.setattr(ours, "Remote", hire)
    monkeypatch.setattr(Remote, "tell", telling)
    state, many, _, same = drive(task, method, "ray", rounds=3, block=1, workers=2)
    many.crew.close()
    assert many.crew.deaths == 1 and asked == [1, 1, 1, 0]
    assert torch.equal(alone.x, state.x) and traffic == same


def test_what_an_actor_raises_arrives():
    with pytest.raises(DataError, match="no such column"):
        drive(make_task(lambda: odd(DataError("no such column"))), BASE, "ray", rounds=1, workers=1)


def test_other_versions_and_code_that_is_not_there_are_named(monkeypatch):
    module = types.ModuleType("only_here")
    exec("def make(): pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    worker = Remote(ray.put(module.make), cpus=1)
    worker.tell("begin", {}, 0, 1.0, {})
    with monkeypatch.context() as patch:
        patch.setattr(ours, "_versions", lambda: {"torch": "1.0"})
        with pytest.raises(ConfigError, match=r"a machine of the cluster has torch .*, this one 1\.0"):
            worker.answer()
    with pytest.raises(RunError, match="No module named 'only_here'"):
        worker.answer()
    worker.close()


def test_what_cannot_be_sent_is_refused():
    with pytest.raises(ConfigError, match=r"cannot be sent to other processes: .*lock"):
        ours.workers(partial(print, threading.Lock()), 1, torch.device("cpu"))


def test_more_workers_than_cpus_are_refused(task):
    with pytest.raises(ConfigError, match="workers = 3: the cluster has 2 CPUs"):
        drive(task, BASE, "ray", workers=3)


def test_a_full_cluster_is_not_waited_for_without_end(task, monkeypatch):
    class Busy:
        def up(self):
            return True

    other = ray.remote(Busy).options(num_cpus=2).remote()
    ray.get(other.up.remote())
    monkeypatch.setattr(ours, "PATIENCE", 0.5)
    with pytest.raises(RunError, match=r"no CPU for a worker within .* s: of the cluster's 2 CPUs 0 are free"):
        drive(task, BASE, "ray", rounds=1, workers=1)
    ray.kill(other)


def test_tensors_cross_as_they_are():
    table = torch.arange(12.0).reshape(3, 4)
    many = [table, table[:, 1], torch.tensor(True), torch.zeros(0, 2), torch.rand(3).bfloat16(), torch.tensor(7)]
    for tensor in many:
        found = Flat.of(tensor).tensor()
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype
    assert Flat.of(table[1]).data.nbytes == 16, "a view leaves the rest behind"
