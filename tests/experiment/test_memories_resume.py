"""Memories of codecs and solvers survive a crash: a resumed run ends in the bits of one never stopped, on every engine."""

from __future__ import annotations

import pytest

from conftest import Net, make_federation
from taciturn import Experiment, Method, Task, aggregation, codecs, participation, partition, run, server, solvers
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import RunError
from taciturn.core.state import equal
from taciturn.experiment.experiment import StopAt
from taciturn.experiment.record import MAY_DIFFER

PARTS = {
    "error_feedback": {"codec": codecs.error_feedback(codecs.top_k(share=0.1))},
    "remainder": {
        "codec": codecs.error_feedback(codecs.lowrank(rank=2), into="start"),
        "server": server.recent(),
    },
    "difference": {"codec": codecs.difference(codecs.quantize4())},
    "running": {
        "codec": codecs.difference(codecs.top_k(share=0.2), alpha=1.0, memory="mean"),
        "aggregator": aggregation.running(),
    },
    "lowrank": {"codec": codecs.ef21(codecs.lowrank(rank=2))},
    "down": {"codec": codecs.lossless(codecs.quantize2()), "broadcast": Broadcast(codecs.quantize8(), "change")},
    "ditto": {"partition": partition.twins(), "solver": solvers.ditto()},
    "scaffold": {"solver": solvers.scaffold(), "aggregator": aggregation.controlled()},
}


@pytest.mark.parametrize("engine", ["stacked", "loopback"])
@pytest.mark.parametrize("name", PARTS)
def test_resumed_is_whole(name, engine, tmp_path):
    method = Method(participation=participation.uniform(count=4), batch_size=8, **PARTS[name])
    experiment = Experiment(Task(Net, make_federation()), method, rounds=5, engine=engine)
    whole = run(experiment, out=tmp_path / "whole")
    run(experiment.replace(rounds=2), out=tmp_path / "half")
    resumed = run(experiment, out=tmp_path / "half", resume=True)
    assert equal(whole.model.state_dict(), resumed.model.state_dict())
    assert equal(whole.client("site-3").state_dict(), resumed.client("site-3").state_dict())
    told = [(line["loss"], line["bytes_up"], line["bytes_down"], line["metrics"]) for line in whole.history]
    assert told == [(line["loss"], line["bytes_up"], line["bytes_down"], line["metrics"]) for line in resumed.history]


OTHER = {
    "rounds": 3,
    "workers": 2,
    "stop_at": StopAt(bytes=10**9),
    "checkpoint_every": 2,
    "target": 0.5,
    "name": "another",
    "evaluate_every": 2,
    "evaluate_clients_every": 1,
}


@pytest.mark.parametrize("field", OTHER)
def test_what_may_change_when_a_run_is_resumed(field, tmp_path):
    assert OTHER.keys() == {*MAY_DIFFER}
    experiment = Experiment(Task(Net, make_federation()), Method(batch_size=8), rounds=2, checkpoint_every=1)
    run(experiment.replace(rounds=1), out=tmp_path / "run")
    resumed = run(experiment.replace(**{field: OTHER[field]}), out=tmp_path / "run", resume=True)
    assert len(resumed.history) == (3 if field == "rounds" else 2)


def test_what_may_not(tmp_path):
    experiment = Experiment(Task(Net, make_federation()), Method(batch_size=8), rounds=1)
    run(experiment, out=tmp_path / "run")
    with pytest.raises(RunError, match="was run with another seed"):
        run(experiment.replace(rounds=2, seed=1), out=tmp_path / "run", resume=True)
