"""A real federation: SuperLink and two SuperNodes as processes, TLS, node keys; and kill -9 of each of them.

`make test-deploy` runs all; where flwr is installed, `make test` runs the first.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from bench.flower import secure

import taciturn
from taciturn import Method, codecs, data, methods, participation, partition, precision, solvers, sync
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

    def __init__(self, held, mine: Experiment, place: Path, deadline: float = 300.0, nodes: int = 2) -> None:
        self.held, self.mine, self.out = held, mine, place / "run"
        told = {"out": str(self.out), "deadline": deadline, "min-available-nodes": nodes}
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


def no_key_is_told(held) -> None:
    """No line of a private key is in a log, or in what Flower keeps beside it."""
    private = [path for path in held.keys.iterdir() if stat.S_IMODE(path.stat().st_mode) == 0o600]
    secrets = [line for path in private for line in path.read_bytes().splitlines() if b"-----" not in line]
    places = [path for name in ("logs", "home-*", "node-*") for path in held.folder.glob(f"{name}/**/*") if path.is_file()]
    assert len(private) >= 2 and len(secrets) >= 6 and places
    for path in places:
        text = path.read_bytes()
        assert not any(secret in text for secret in secrets), f"{path} tells a private key"


@needs_flwr
def test_a_round_over_processes_is_the_simulated_one(tmp_path):
    """One node that has both clients, one round, nothing measured: what `make test` can spare."""
    with federation.Federation(tmp_path / "f", nodes=1) as held:
        mine = experiment(Method(solver=SGD, **ALL), 1).replace(evaluate_on="validation")
        one = Deployed(held, mine, tmp_path, nodes=1)
        one.run()
        assert set(federation.alive(tmp_path / "f")) == {"superlink", "node-0", "desk-0"}
        with pytest.raises(RunError, match="a federation is up"):
            federation.Federation(tmp_path / "f").start()
    one.is_simulated()
    assert not federation.alive(tmp_path / "f")
    no_key_is_told(held)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One federation for all methods; afterwards none of its logs tells a key."""
    with federation.Federation(tmp_path_factory.mktemp("shared") / "f") as held:
        yield held
    no_key_is_told(held)


METHODS = {
    "fedavg": Method(solver=SGD, **ALL),
    "fda": FDA,
    "lora": Method(solver=SGD, partition=partition.lora(rank=2), **ALL),
    "fedapm": FEDAPM,
    "quantized": Method(solver=SGD, codec=codecs.error_feedback(codecs.quantize4()), broadcast=CHANGE, **ALL),
    "precision": Method(solver=SGD, codec=codecs.quantize4(), precision=precision.fixed(("qat4", "ptq2")), **ALL),
}


@needs_flwr
@pytest.mark.deploy
@pytest.mark.parametrize("name", METHODS)
def test_deployed_is_simulated(shared, tmp_path, name):
    one = Deployed(shared, experiment(METHODS[name], 2), tmp_path)
    one.run()
    one.is_simulated()
    carried = json.loads((one.out / "carried.json").read_text())
    assert carried["nodes"] == 2 and not carried["broken"]


@needs_flwr
@pytest.mark.deploy
def test_plain_text_and_strangers_are_refused(shared):
    """Plain HTTP gets no answer, a node without TLS or without a registered key ends with an error."""
    assert secure(shared) == {"tls": True, "authentication": True}
    program = Path(sys.executable).with_name("flower-supernode")
    words = [
        program,
        "--superlink",
        f"127.0.0.1:{shared.port}",
        "--port",
        "0",
        "--max-retries",
        "1",
        "--max-wait-time",
        "5",
    ]
    for how in (["--insecure"], ["--insecure", "--auth-supernode-private-key", str(shared.keys / "node-0")]):
        told = subprocess.run([*words, *how], capture_output=True, timeout=120, check=False)
        assert told.returncode != 0, told


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
                for pid in [leader] if victim == "superlink" else held.started("superlink", "flwr-serverapp"):
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
            while victim == "clientapp" and not (pids := held.started("node-1", "flwr-clientapp")):
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


def certified(path: Path) -> list[str]:
    from cryptography import x509

    made = x509.load_pem_x509_certificate(path.read_bytes())
    found = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]


def test_a_key_that_a_site_has_made_stays_there(tmp_path):
    pytest.importorskip("cryptography", reason="cryptography comes with taciturn[flower]")
    (tmp_path / "node-0.pub").write_text("ecdsa-sha2-nistp384 AAAA site A")
    federation.make_keys(tmp_path, 2)
    assert (tmp_path / "node-0.pub").read_text().endswith("site A") and not (tmp_path / "node-0").exists()
    assert (tmp_path / "node-1").exists()


def test_keys_are_made_once_and_are_the_owners(tmp_path):
    pytest.importorskip("cryptography", reason="cryptography comes with taciturn[flower]")
    federation.make_keys(tmp_path, 2, ("server.example", "10.0.0.7"))
    names = certified(tmp_path / "server.crt")
    assert names == ["server.example", "localhost", "10.0.0.7", "127.0.0.1"], "a SuperLink talks to itself at 127.0.0.1"
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
