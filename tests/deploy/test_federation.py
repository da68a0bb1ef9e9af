"""A real federation: SuperLink and two SuperNodes as processes, TLS, node keys; and kill -9 of each of them.

`make test-deploy` runs all; where flwr is installed, `make test` runs the first.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import taciturn
from taciturn import Method, codecs, data, methods, participation, solvers, sync
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import ConfigError, RunError
from taciturn.experiment import deployed, federation
from taciturn.experiment.experiment import Experiment
from taciturn.sync import thresholds
from taciturn.tasks.models import mlp
from taciturn.tasks.spec import TaskSpec

needs_flwr = pytest.mark.skipif(find_spec("flwr") is None, reason="flwr is not installed: make test-deploy")
SGD = solvers.sgd(lr=0.1)
ALL = {"participation": participation.all(), "batch_size": 32}
CHANGE = Broadcast(codecs.quantize8(), of="change")
FEDAPM = methods.fedapm(u=SGD, **ALL)
FDA = Method(solver=SGD, sync=sync.fda(theta=thresholds.fixed(0.3), max_blocks=2), broadcast=CHANGE, **ALL)


def experiment(method, rounds) -> Experiment:
    task = TaskSpec(data.digits(clients=2, split=data.dirichlet(alpha=0.5)), mlp(hidden=(16,)))
    return Experiment(task, method, rounds=rounds, engine="loopback")


class Deployed:
    """An experiment in a federation, and where it runs."""

    def __init__(self, held, mine: Experiment, place: Path, deadline: float = 300.0) -> None:
        self.held, self.mine, self.out = held, mine, place / "run"
        told = {"out": str(self.out), "deadline": deadline, "min-available-nodes": 2}
        self.app, self.said = deployed.bundle(mine, place / "app", **told), []

    def run(self, say=lambda line: None) -> taciturn.Result:
        def both(line):
            self.said.append(line)
            say(line)

        self.held.run(self.app, self.out, both, 540.0)
        return taciturn.load(self.out)

    def is_simulated(self) -> None:
        flown, wired = taciturn.load(self.out), taciturn.run(self.mine)
        assert all(torch.equal(flown.tensors[name], t) for name, t in wired.tensors.items())
        assert [one["traffic"] for one in flown.history] == [one["traffic"] for one in wired.history]


def processes_of(leader: int, word: str) -> list[int]:
    """What a process has started, and that in turn, where the command has the word."""
    parents, words = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            words[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:
            continue
    found = [leader]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return [pid for pid in found[1:] if word in words[pid]]


RUNS = [
    pytest.param(Method(solver=SGD, **ALL), 1, id="fedavg"),
    pytest.param(FDA, 2, id="fda", marks=pytest.mark.deploy),
    pytest.param(FEDAPM, 2, id="fedapm", marks=pytest.mark.deploy),
]


@needs_flwr
@pytest.mark.parametrize(("method", "rounds"), RUNS)
def test_deployed_is_simulated(tmp_path, method, rounds):
    with federation.Federation(tmp_path / "f") as held:
        one = Deployed(held, experiment(method, rounds), tmp_path)
        one.run()
        one.is_simulated()
        assert set(federation.alive(tmp_path / "f")) == {"superlink", "node-0", "node-1", "desk-0", "desk-1"}
        with pytest.raises(RunError, match="a federation is up"):
            federation.Federation(tmp_path / "f").start()
    assert not federation.alive(tmp_path / "f")
    secret = (tmp_path / "f" / "keys" / "node-0").read_text().splitlines()[1]
    for log in (tmp_path / "f" / "logs").iterdir():
        assert secret not in log.read_text(errors="replace"), "no key is in a log"


@needs_flwr
@pytest.mark.deploy
@pytest.mark.parametrize("victim", ["serverapp", "superlink"])
def test_a_server_that_is_killed_goes_on_in_the_same_bits(tmp_path, victim):
    with federation.Federation(tmp_path / "f") as held:
        one, began = Deployed(held, experiment(FEDAPM, 3), tmp_path), []

        def kill(line):
            if not began:
                began.append(line)
                leader = held.processes["superlink"].pid
                for pid in [leader] if victim == "superlink" else processes_of(leader, "flwr-serverapp"):
                    os.kill(pid, signal.SIGKILL)

        with pytest.raises(RunError, match="the run ended without a result"):
            one.run(kill)
        if victim == "superlink":
            held.processes["superlink"].wait()
            held.link()
        one.run()
        one.is_simulated()


@needs_flwr
@pytest.mark.deploy
@pytest.mark.parametrize("victim", ["supernode", "clientapp", "desk"])
def test_a_node_that_is_killed_costs_at_most_its_round(tmp_path, victim):
    with federation.Federation(tmp_path / "f") as held:
        one, began = Deployed(held, experiment(FEDAPM, 3), tmp_path), []

        def kill(line):
            if began:
                return
            began.append(line)
            leader, end = held.processes["node-1"].pid, time.monotonic() + 60
            pids = [held.processes["desk-1"].pid] if victim == "desk" else [leader]
            while victim == "clientapp" and not (pids := processes_of(leader, "flwr-clientapp")):
                assert time.monotonic() < end
                time.sleep(0.02)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

        result = one.run(kill)
        lost = [entry["client"] for line in result.history for entry in line["left_out"]]
        assert len(result.history) == 3 and len(lost) <= 1, lost
        assert all(torch.isfinite(t).all() for t in result.tensors.values())
        if not lost:  # killed in an evaluation, which then counts fewer clients; or its round waited for it
            wired = taciturn.run(one.mine)
            assert all(torch.equal(result.tensors[name], t) for name, t in wired.tensors.items())


# --------------------------------------------------------------------------------------------------- keys and folders


def test_keys_are_made_once_and_are_the_owners(tmp_path):
    pytest.importorskip("cryptography", reason="cryptography comes with taciturn[flower]")
    federation.make_keys(tmp_path, 2, ("server.example", "10.0.0.7"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"ca.crt", "server.crt", "server.key", "node-0", "node-0.pub", "node-1", "node-1.pub"}
    for name in ("server.key", "node-0", "node-1"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    federation.make_keys(tmp_path, 3)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before and (tmp_path / "node-2.pub").exists()


def test_what_was_left_behind_is_told_and_a_reused_pid_is_not_touched(tmp_path):
    assert federation.alive(tmp_path) == {} and federation.end_all(tmp_path) == []
    (tmp_path / "processes.json").write_text(json.dumps({"node-0": [[os.getpid(), "1"]]}))
    assert federation.end_all(tmp_path) == [], "this process was not started by it"
    (tmp_path / "processes.json").write_text("{")
    with pytest.raises(RunError, match="cannot read"):
        federation.alive(tmp_path)


def test_without_flwr(tmp_path, monkeypatch):
    monkeypatch.setattr(federation, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'taciturn\[flower\]'"):
        federation.Federation(tmp_path).start()
