"""Method.lean: what is the user's stays, what is sent is little, and it still learns."""

from __future__ import annotations

import pytest
from torch import nn

import taciturn
from conftest import make_federation, make_task
from drive import drive
from taciturn import Experiment, Method, Task, aggregation, codecs, methods, participation, partition, server, solvers, sync
from taciturn.core.errors import ConfigError, MethodError

USERS = Method(
    participation=participation.uniform(count=3), solver=solvers.sgd(lr=0.3, clip=1.0), aggregator=aggregation.mean(),
    batch_size=7, partition=partition.layers(personal="head"),
)  # fmt: skip
KEPT = ("partition", "participation", "solver", "aggregator", "batch_size", "precision")


@pytest.mark.parametrize("base", [USERS, USERS.replace(partition=partition.lora(rank=1))], ids=["layers", "lora"])
def test_only_what_is_sent_and_when_is_changed(base):
    loud = base.replace(codec=codecs.cast(), server=server.adam(), sync=sync.every(epochs=3))
    found = Method.lean(loud)
    assert all(getattr(found, part) == getattr(base, part) for part in KEPT)
    assert found == Method.lean(base) == Method.lean(found)
    assert found.server == (
        server.sgd() if isinstance(base.partition, partition.lora) else server.recent(server.momentum(momentum=0.5))
    )
    assert isinstance(found.sync, sync.fda) and found.broadcast.start == "known"
    assert Method.lean() == Method.lean(Method())


def test_vectors_of_adapters_are_sent_whole():
    few, many = Method.lean(USERS.replace(partition=partition.lora())).codec, Method.lean(USERS).codec
    assert few == codecs.error_feedback(codecs.quantize4())
    assert isinstance(many, codecs.error_feedback) and "lowrank" in repr(many)


def test_a_matrix_costs_its_factors_in_three_bits():
    """Up rank 4 of 300 x 16 and all of 3 x 300, down rank 2 of both; 7 levels, 4 bytes for 256 values; zstd on top."""
    method = Method.lean(Method(participation=participation.all(), solver=solvers.sgd(lr=0.1), batch_size=8))
    task = Task(lambda: nn.Sequential(nn.Linear(16, 300), nn.Tanh(), nn.Linear(300, 3)), make_federation(features=16))
    _, first, second = taciturn.run(Experiment(task, method, rounds=3, evaluate_every=3)).history
    up, down = (3 * values / 8 + 4 * values / 256 for values in (4 * 316 + 900 + 303, 2 * 316 + 2 * 303 + 303))
    for name, most in (("bytes_up", up), ("bytes_down", down)):
        spent = (second[name] - first[name]) / len(second["cohort"])
        assert 0.5 * most < spent < 0.95 * most, name  # with its frame; without zstd a message has some 0.99 of it


@pytest.mark.parametrize(
    ("solver", "clip", "into"),
    [
        (solvers.sgd(lr=0.25), 4.0, "start"),
        (solvers.sgd(lr=0.25, clip=9.0), 9.0, "start"),
        (solvers.adamw(lr=0.25), None, "start"),
        (solvers.prox(0.1, solvers.sgd(lr=0.25)), None, "message"),
    ],
)
def test_no_step_of_sgd_is_longer_than_one_and_who_measures_from_the_start_starts_there(solver, clip, into):
    found = Method.lean(Method(solver=solver))
    assert Method.lean(Method(solver=solver, codec=codecs.clip())).codec.codec.into == "message", "clip stands outermost"
    assert getattr(found.solver, "clip", None) == clip and found.codec.into == into


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"solver": solvers.prox()}, "solver = prox measures from where it starts"),
        ({"codec": codecs.lossless(codecs.error_feedback(into="start"))}, "let it stand outermost"),
        ({"codec": codecs.clip(codecs.error_feedback(into="start"))}, "let it stand outermost"),
    ],
    ids=["prox", "lossless", "clip"],
)
def test_where_no_client_may_train_on_from_what_was_lost(parts, said):
    with pytest.raises(MethodError, match=said):
        Method(**{"codec": codecs.error_feedback(into="start")} | parts)


def test_what_was_lost_goes_to_one_of_two_places():
    with pytest.raises(ConfigError, match=r"error_feedback\.into: message or start; got 'end'"):
        codecs.error_feedback(into="end")


def test_a_memory_of_a_mean_gives_way_and_points_are_refused():
    kept = Method(
        codec=codecs.difference(codecs.quantize4(), alpha=0.2, memory="mean"), aggregator=aggregation.running(alpha=0.2)
    )
    assert Method.lean(kept).aggregator == aggregation.mean(kept.aggregator.weights)
    with pytest.raises(MethodError, match="a solver that sends points"):
        Method.lean(methods.fedapm())


def test_clients_stop_by_themselves_and_no_round_is_longer_than_twenty_epochs():
    method = Method.lean(Method(participation=participation.uniform(count=4), solver=solvers.sgd(lr=0.05), batch_size=8))
    _, _, stats, _ = drive(make_task(), method, rounds=4)
    blocks = [stat.sync["blocks"] for stat in stats]
    assert stats[0].exchanges == 1 and blocks[0] <= 10 and max(blocks) <= 20 and min(blocks[1:]) > 2


@pytest.mark.slow
def test_it_learns_what_fedavg_learns_with_a_fraction_of_the_bytes():
    experiment = taciturn.recipe("quickstart")
    loud = taciturn.run(experiment.replace(rounds=12, evaluate_every=12))
    lean = taciturn.run(experiment.replace(method=Method.lean(experiment.method), rounds=24, evaluate_every=24))
    assert lean.metrics["accuracy"] > 0.95 * loud.metrics["accuracy"]
    assert 20 * (lean.bytes_up + lean.bytes_down) < loud.bytes_up + loud.bytes_down
