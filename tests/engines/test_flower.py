"""The line over Flower, with a grid in this process; the client's file as it is shipped; the desk behind its socket."""

from __future__ import annotations

import json
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import taciturn
from engines.fake_flwr import Grid, Message, modules, node
from taciturn import Method, data, participation, solvers
from taciturn.cli.common import experiment_of
from taciturn.core.errors import ConfigError, RunError, WireError
from taciturn.engines import flower
from taciturn.engines.letters import Letter
from taciturn.experiment import deployed, desk
from taciturn.experiment.experiment import Experiment
from taciturn.tasks.models import linear
from taciturn.tasks.spec import TaskSpec


@pytest.fixture(autouse=True)
def flwr(monkeypatch):
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def experiment(clients=4, rounds=2, **fields) -> Experiment:
    task = TaskSpec(data.digits(clients=clients, split=data.dirichlet(alpha=0.5)), linear())
    method = Method(solver=solvers.sgd(lr=0.1), participation=participation.all(), batch_size=32)
    return Experiment(task, method, rounds=rounds, engine="loopback", **fields)


@pytest.mark.parametrize("desks", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_bundle_run_over_a_grid_is_the_simulated_run(tmp_path, desks):
    """The same TOML, bytes and model; client i at node i mod 2; with a resident process and without."""
    mine = experiment()
    app = deployed.bundle(mine, tmp_path / "app", out=str(tmp_path / "run"))
    states = [tmp_path / ("s" * 60) / ("t" * 60) / str(which) for which in range(2)]  # longer than a socket's name may be
    for state in states:
        state.mkdir(parents=True)
        if desks:
            threading.Thread(target=desk.serve, args=(state, deployed.at_node), daemon=True).start()
    end = time.monotonic() + 10
    while desks and not all((state / "desk").exists() for state in states):
        assert time.monotonic() < end
        time.sleep(0.01)
    grid = Grid({7 + which: node(app, state, which, 2) for which, state in enumerate(states)})
    line = flower.FlowerLine(grid)
    deployed.serve(deployed._experiment(app), line, {"out": str(tmp_path / "run")})
    flown, wired = taciturn.load(tmp_path / "run"), taciturn.run(mine)
    assert all(torch.equal(flown.tensors[name], t) for name, t in wired.tensors.items())
    assert [one["traffic"] for one in flown.history] == json.loads(json.dumps([one["traffic"] for one in wired.history]))
    facts = json.loads((tmp_path / "run" / "carried.json").read_text())
    assert facts["nodes"] == 2 and not facts["broken"] and facts["exchanges"] == 4
    kinds = [
        e["payload"] + e["frame"] for one in flown.history for k, e in one["traffic"]["by_kind"].items() if k[0] == "u"
    ]
    assert facts["carried"]["up"] == sum(kinds)
    deployed.serve(deployed._experiment(app).replace(rounds=3), flower.FlowerLine(grid), {"out": str(tmp_path / "run")})
    longer = taciturn.run(mine.replace(rounds=3))
    again = taciturn.load(tmp_path / "run")
    assert all(torch.equal(again.tensors[name], t) for name, t in longer.tensors.items()), "it went on"
    kept = experiment_of(str(tmp_path / "run" / "config.toml"), None, "")
    assert deployed.readmit(kept, tmp_path / "run", "client-001") == 3


def test_a_node_that_fails_or_lies_or_is_silent(tmp_path):
    hello = {"orders": {"clients": []}, "node": {"partition-id": 0, "num-partitions": 1}}
    letter = Letter(0, {"command": "collect"}, (b"abc",))
    answers = {
        "error": lambda m: Message(error=SimpleNamespace(code=5, reason="gone"), reply_to=m),
        "garbage": lambda m: Message({"x": 1}, reply_to=m),
        "other client": lambda m: Message(flower.content_of([Letter(1, {})]), reply_to=m),
        "silent": lambda m: None,
    }
    for name, answer in answers.items():
        grid = Grid({3: lambda m, answer=answer: Message(hello, reply_to=m) if m.kind == "query" else answer(m)})
        line = flower.FlowerLine(grid, clients=2)
        assert line.there() == [0, 1]
        if name == "other client":
            line.nodes = {3: (0, 2)}
        assert list(line.exchange([letter], 0.3)) == [], name
        assert bool(line.broken) == (name in ("error", "garbage"))


def test_too_few_nodes():
    line = flower.FlowerLine(Grid({}), clients=2, least=2, patience=0.1)
    with pytest.raises(RunError, match="0 nodes after 0 s, and min-available-nodes is 2"):
        line.there()


def test_letters_round_trip_and_others_are_refused():
    letters = [Letter(3, {"a": 1}, (b"", b"xyz")), Letter(0, {"b": [1.5, "c"]})]
    assert flower.letters_of(flower.content_of(letters)) == letters
    content = flower.content_of(letters)
    content["frames-0"]["0001"].stype = "numpy.ndarray"
    strange = [{"orders": {"clients": [i], "order-0": "{}"}} for i in ("x", float("inf"), None)]
    for bad in (content, {}, {"orders": {"clients": [1]}}, {"orders": {"clients": [1], "order-0": "["}}, *strange):
        with pytest.raises(WireError):
            flower.letters_of(bad)


def test_without_flwr(monkeypatch):
    for name in modules():
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'taciturn\[flower\]'"):
        flower.server_app(lambda line, settings: None)


def test_what_is_not_deployable():
    with pytest.raises(ConfigError, match="simulated seconds"):
        deployed.check_deployable(experiment(deadline=5.0), 2)
    with pytest.raises(ConfigError, match="at least 1; got 0"):
        deployed.check_deployable(experiment(), 0)


def test_the_fingerprint_is_of_what_decides_the_bits():
    mine = experiment()
    assert deployed.fingerprint(mine) == deployed.fingerprint(mine.replace(rounds=9, engine="flower"))
    assert deployed.fingerprint(mine) != deployed.fingerprint(mine.replace(seed=1))
