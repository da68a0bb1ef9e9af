"""Workers: the same bits for any number of them, also when they die; errors arrive; nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import Net, make_task
from drive import drive, thinned
from taciturn import fleet, participation, partition, solvers, sync
from taciturn.core.errors import ConfigError, DataError, RunError
from taciturn.core.state import equal
from taciturn.engines.crew import Workers
from taciturn.engines.fork import Arena, Forked
from taciturn.method import Method
from watching import Watch

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked: Linux")
BASE = Method(participation=participation.uniform(count=6), sync=sync.every(epochs=2), batch_size=8)
METHODS = {
    "plain": BASE,
    "adamw": BASE.replace(solver=solvers.adamw(lr=0.01)),
    "personal": BASE.replace(partition=partition.layers(personal="head")),
    "dynamic": BASE.replace(sync=sync.fda(price=fleet.Price.crossing(1.0, model_bytes=400, epoch_steps=4))),
    "dynamic-local": BASE.replace(sync=sync.fda(monitor="local", max_blocks=4)),
    "watching": BASE.replace(sync=Watch(theta=0.02, local=True)),
}


@pytest.fixture(scope="module")
def task():
    return make_task(lambda: Net(dropout=0.2))


@pytest.mark.parametrize(("name", "engine"), thinned(METHODS, ["stacked", "sequential"]))
def test_workers_change_no_bit(name, engine, task):
    alone, one, _, traffic = drive(task, METHODS[name], engine, rounds=3, block=2 if engine == "stacked" else None)
    for workers in (2, 3):
        state, many, _, same = drive(
            task, METHODS[name], engine, rounds=3, block=2 if engine == "stacked" else None, workers=workers
        )
        ids = torch.arange(8)
        assert torch.equal(alone.x, state.x) and equal(one.store.read(ids), many.store.read(ids)) and traffic == same
        assert isinstance(many.crew, Workers) and not many.crew.deaths
        assert all(
            many.evaluate(ids, state.cast, "train")[k].equal(v) for k, v in one.evaluate(ids, alone.cast, "train").items()
        )
        many.crew.close()


@pytest.mark.parametrize("command", ["begin", "observe", "collect"])
@pytest.mark.parametrize("moment", ["before it is told", "before it answers"])
def test_a_killed_worker_is_replaced_and_its_blocks_are_repeated(command, moment, task, monkeypatch):
    method = METHODS["watching"]
    alone, _, _, traffic = drive(task, method, "stacked", rounds=3, block=1)
    seen, tell = [0], Forked.tell

    def kill(worker):
        worker.process.kill()
        worker.process.join()

    def telling(self, name, *arguments):
        if name == command:
            seen[0] += 1
            if seen[0] == 6 and moment == "before it is told":
                kill(self)
        tell(self, name, *arguments)
        if name == command and seen[0] == 6 and moment == "before it answers":
            seen[0] += 1
            kill(self)

    monkeypatch.setattr(Forked, "tell", telling)
    state, many, _, same = drive(task, method, "stacked", rounds=3, block=1, workers=2)
    many.crew.close()
    assert many.crew.deaths == 1
    assert torch.equal(alone.x, state.x) and traffic == same


def test_a_worker_that_always_dies_ends_the_run(task, monkeypatch):
    tell = Forked.tell

    def telling(self, name, *arguments):
        if name == "collect":
            self.process.kill()
            self.process.join()
        tell(self, name, *arguments)

    monkeypatch.setattr(Forked, "tell", telling)
    with pytest.raises(RunError, match="died for the 4th time in one round"):
        drive(task, BASE, "stacked", rounds=1, block=2, workers=2)


class Broken(nn.Module):
    """Fails in any process but the one that made it."""

    def __init__(self, error):
        super().__init__()
        self.layer, self.error, self.home = nn.Linear(6, 3), error, os.getpid()

    def forward(self, x):
        if os.getpid() != self.home:
            raise self.error
        return self.layer(x)


@pytest.mark.parametrize(
    "error, kind, words",
    [(DataError("no such column"), DataError, "no such column"), (ValueError("odd"), RunError, "ValueError: odd")],
)
def test_what_a_worker_raises_arrives(error, kind, words):
    task = make_task(lambda: Broken(error))
    with pytest.raises(kind, match=words):
        drive(task, BASE, "sequential", rounds=9, workers=2)


def test_workers_need_a_way_to_be_alone(task, monkeypatch):
    with pytest.raises(ConfigError, match="loopback engine has one process"):
        drive(task, BASE, "loopback", workers=2)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="need Linux and the CPU; this is darwin"):
        drive(task, BASE, "stacked", workers=2)


def test_ray_is_asked_for_where_it_is_missing(task, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'taciturn\[ray\]'"):
        drive(task, BASE, "ray")


def test_no_worker_outlives_its_parent():
    program = """
import os, time
from conftest import Net, make_task
from drive import drive
from test_crew import BASE
_, engine, _, _ = drive(make_task(Net), BASE, "stacked", rounds=1, workers=3)
print(*(post.worker.process.pid for post in engine.crew._posts), flush=True)
time.sleep(60)
"""
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent, here.parent / "experiment", *sys.path)))
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.send_signal(signal.SIGKILL)
    assert len(pids) == 3
    for _ in range(100):
        left = [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text()]
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"still there: {left}")


def test_an_arena_gives_back_what_was_put():
    arena = Arena(slots=2)
    first = [torch.arange(5), torch.rand(3, 4, dtype=torch.float64), torch.zeros(0, 2), torch.tensor(True), torch.rand(1)]
    places = [arena.put(t) for t in first]
    arena.turn()
    arena.put(torch.full((100,), 7.0))
    assert all(torch.equal(arena.get(p), t) and arena.get(p).dtype == t.dtype for p, t in zip(places, first, strict=True))
    arena.turn()
    arena.put(torch.zeros(100))
    assert not torch.equal(arena.get(places[0]), first[0]), "the slot is used again"
