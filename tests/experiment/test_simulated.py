"""Runs in simulated time: alike on all engines, exact on resume; deadlines; fleets in TOML."""

from __future__ import annotations

import dataclasses
import json
import tomllib

import pytest
import torch

import taciturn
from conftest import Net, make_federation
from drive import drive, resumes
from taciturn import Experiment, Method, Task, aggregation, codecs, fleet, participation, partition, solvers, sync
from taciturn.core.errors import AllClientsFailed, ConfigError, UnknownName
from taciturn.core.state import equal
from taciturn.experiment import config
from taciturn.experiment.preview import preview
from taciturn.experiment.record import read_lines
from taciturn.experiment.runner import prepare
from taciturn.fleet import Fleet, Profile

FAST = Profile("fast", float32=1.0, bandwidth=10.0, launch=1e-5, up=1e6, down=1e6, latency=0.1)
SLOW = dataclasses.replace(FAST, name="slow", up=1e3)
METHOD = Method(
    partition=partition.layers(personal="head"),
    participation=participation.uniform(count=5),
    solver=solvers.sgd(lr=0.1, momentum=0.5),
    codec=codecs.error_feedback(codecs.quantize4()),
    batch_size=8,
)
SCAFFOLD = Method(solver=solvers.scaffold(), aggregator=aggregation.controlled())
ENGINES = ("sequential", "loopback", "stacked")


def experiment(**fields) -> Experiment:
    base = {"task": Task(Net, make_federation()), "method": METHOD, "rounds": 3, "fleet": Fleet((FAST, SLOW))}
    return Experiment(**base | fields)


def times(result):
    return [line["simulated"] for line in result.history]


def test_every_run_has_a_time_axis_and_the_fleet_decides_it():
    plain, named = taciturn.run(experiment(fleet=None)), taciturn.run(experiment(fleet="reference"))
    other = taciturn.run(experiment(fleet=Fleet((SLOW,))))
    assert times(plain) == times(named) and plain.summary["simulated_seconds"] < other.summary["simulated_seconds"]
    assert plain.header["fleet"]["profiles"] == ["reference"] and plain.header["fleet"]["clients"] == [8]
    assert [line["loss"] for line in plain.history] == [line["loss"] for line in other.history], "the world changes nothing"


def test_seconds_follow_the_bytes_of_the_ledger():
    result = taciturn.run(experiment(fleet=Fleet((SLOW,)), method=METHOD.replace(codec=codecs.identity())))
    step = result.header["fleet"]["step_seconds"][0]
    assert step > 0 and result.header["fleet"]["step_flops"] > 0
    total = 0.0
    for line in result.history:
        sent = line["traffic"]["clients"]
        rows = {i: (up, down) for i, up, down in zip(sent["ids"], sent["up"], sent["down"], strict=True)}
        found = line["simulated"]
        if line["spread"]:  # evaluation is in the counts of clients, and takes no time of the round
            continue
        for place, i in enumerate(line["cohort"]):
            assert found["up"][place] == pytest.approx(rows[i][0] / 1e3 + 0.05, rel=1e-5)
            assert found["down"][place] == pytest.approx(rows[i][1] / 1e6 + 0.05, rel=1e-5)
        busy = [sum(parts) for parts in zip(found["down"], found["compute"], found["up"], strict=True)]
        assert found["round"] == pytest.approx(max(busy), rel=1e-5)
        total += found["round"]
        assert found["total"] == pytest.approx(total)


@pytest.mark.parametrize("fields", [{}, {"deadline": 0.35}, {"deadline": 0.35, "late": "discount"}])
def test_engines_agree_on_seconds_and_on_who_is_late(fields):
    found = {engine: taciturn.run(experiment(engine=engine, **fields)) for engine in ENGINES}
    found["workers"] = taciturn.run(experiment(engine="stacked", workers=2, **fields))
    first = found["sequential"]
    late = [line["left_out"] for line in first.history]
    assert any(late) == (fields == {"deadline": 0.35})
    for result in found.values():
        assert times(result) == times(first) and [line["left_out"] for line in result.history] == late
    assert all(torch.equal(first.tensors[name], t) for name, t in found["loopback"].tensors.items())


def test_a_deadline_drops_exactly_the_late_as_if_their_uploads_were_lost():
    whole = taciturn.run(experiment())
    dropped = taciturn.run(experiment(deadline=0.35))
    late = {(line["round"], entry["client"]) for line in dropped.history for entry in line["left_out"]}
    assert late and {entry["why"] for line in dropped.history for entry in line["left_out"]} == {"after the deadline"}
    for line in dropped.history:
        found = line["simulated"]
        busy = [sum(parts) for parts in zip(found["down"], found["compute"], found["up"], strict=True)]
        assert [f"site-{i}" for i, t in zip(line["cohort"], busy, strict=True) if t > 0.35] == [
            entry["client"] for entry in line["left_out"]
        ]
        assert found["round"] == 0.35 if line["left_out"] else found["round"] < 0.35
    assert dropped.summary["simulated_seconds"] < whole.summary["simulated_seconds"]
    lost = taciturn.run(experiment(), lose=lambda round, i: (round + 1, f"site-{i}") in late)
    assert all(torch.equal(dropped.tensors[name], t) for name, t in lost.tensors.items())


def test_blocks_that_would_arrive_summed_do_not_with_a_deadline():
    plain = Method(participation=participation.uniform(count=5), solver=solvers.sgd(lr=0.1), batch_size=8)
    found = [taciturn.run(experiment(method=plain, engine=engine, deadline=0.4)) for engine in ("sequential", "stacked")]
    assert found[0].summary["left_out"] > 0 and found[0].summary["left_out"] == found[1].summary["left_out"]
    for name, tensor in found[0].tensors.items():
        assert torch.allclose(tensor, found[1].tensors[name], atol=1e-5)


def test_a_client_that_was_late_is_as_if_it_had_not_been_drawn():
    task = Task(Net, make_federation()).build(0)
    late = [1, 4]

    def share(ids, work, knobs):
        return torch.isin(ids, torch.tensor(late), invert=True).double()

    method = METHOD.replace(participation=participation.all())
    before = drive(task, method, rounds=1)[1]
    once = drive(task, method, rounds=1, share=share)[1]
    for i in range(8):
        own = once.store.read(torch.tensor([i]))
        assert equal(own, before.store.read(torch.tensor([i]))) == (i not in late)
        assert (int(once.post.versions(torch.tensor([i]))) < 0) == (i in late) == (int(own["steps"]) == 0)


def test_a_discount_changes_the_weights():
    whole, less = taciturn.run(experiment()), taciturn.run(experiment(deadline=0.35, late="discount"))
    assert not any(torch.equal(whole.tensors[name], less.tensors[name]) for name in ("stem.weight", "norm.weight"))
    assert less.summary["left_out"] == 0 and less.history[0]["simulated"] == whole.history[0]["simulated"]


def test_nobody_in_time_is_an_error_that_says_so():
    with pytest.raises(
        AllClientsFailed, match=r"round 1: none of the 5 clients answered before the deadline.*Raise deadline"
    ):
        taciturn.run(experiment(deadline=0.01))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"deadline": 0.0}, "deadline: simulated seconds above 0; got 0.0"),
        ({"late": "never"}, "late: drop or discount; got 'never'"),
        ({"deadline": 1.0, "method": METHOD.replace(sync=sync.fda())}, "at every look of the server"),
        (
            {"deadline": 1.0, "late": "discount", "method": SCAFFOLD},
            "adds up what it knows of them",
        ),
    ],
)  # fmt: skip
def test_deadlines_that_make_no_sense(fields, message):
    with pytest.raises(ConfigError, match=message):
        experiment(**fields)


def test_devices_need_memory():
    small = Fleet((FAST, dataclasses.replace(SLOW, memory=100.0)))
    with pytest.raises(ConfigError, match=r"fleet.profiles\[1\].memory: 'slow' has 100 bytes; this model .* needs"):
        prepare(experiment(fleet=small))


def test_rare_devices_are_drawn_among_those_that_are_there():
    rare = Fleet((dataclasses.replace(FAST, availability=0.4),))
    one, same = (taciturn.run(experiment(fleet=rare, rounds=4)) for _ in range(2))
    assert [line["cohort"] for line in one.history] == [line["cohort"] for line in same.history]
    assert min(len(line["cohort"]) for line in one.history) < 5


def test_looks_of_a_rule_take_time():
    watched = METHOD.replace(sync=sync.fda(max_blocks=3, theta=sync.thresholds.fixed(1e9), price=fleet.Price(0.01)))
    results = [taciturn.run(experiment(method=watched, rounds=2, engine=engine)) for engine in ENGINES]
    assert times(results[0]) == times(results[1]) == times(results[2])
    exchanges = results[0].history[1]["traffic"]["exchanges"]
    assert exchanges > 2 and min(results[0].history[1]["simulated"]["down"]) > 0.05 * 1.9
    work = drive(Task(Net, make_federation()).build(0), watched, rounds=1)
    assert work[2][0].exchanges == work[3][0]["exchanges"]


def test_resume_is_exact(tmp_path):
    resumes(experiment(rounds=2, deadline=0.35), tmp_path, rounds=4)
    lines = read_lines(tmp_path)
    assert [line["simulated"]["total"] for line in lines] == sorted(line["simulated"]["total"] for line in lines)


def test_the_dry_run_tells_the_first_round():
    facts = preview(experiment())
    assert facts["simulated_seconds_per_round"] == taciturn.run(experiment(rounds=1)).summary["simulated_seconds"]


# ---------------------------------------------------------------------------------------------------------------- TOML


def table(**fields):
    found = tomllib.loads(config.to_toml(taciturn.recipe("quickstart").replace(rounds=1)))
    return found | fields


@pytest.mark.parametrize("given", [None, "mixed", Fleet((FAST, SLOW))])
def test_toml_and_back(given):
    before = taciturn.recipe("quickstart").replace(fleet=given, deadline=None if given is None else 3.0, late="discount")
    assert config.from_table(tomllib.loads(config.to_toml(before))) == before


def test_a_file_of_profiles(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(config.fleet_toml(Fleet((FAST, SLOW))))
    assert taciturn.read_fleet(file) == Fleet((FAST, SLOW))
    found = config.from_table(table(fleet=str(file)))
    assert found.fleet == Fleet((FAST, SLOW)) and json.dumps(config.to_table(found)), "its numbers are in the configuration"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("phone", ConfigError, "fleet: there is no fleet 'phone'; did you mean 'phones'"),
        ({"profiles": [{}, {"upp": 3.0}]}, UnknownName, r"fleet.profiles\[1\]: there is no field 'upp'"),
        ({"profiles": [{"up": "fast"}]}, ConfigError, r"fleet.profiles\[0\].up: got 'fast'"),
        ({"profiles": [{"up": -1.0}]}, ConfigError, r"fleet.profiles\[0\]: up: a finite number above 0; got -1.0"),
        ({"profiles": ["phone"]}, ConfigError, r"fleet.profiles\[0\]: a table with the fields of Profile; got 'phone'"),
        ({"profiles": []}, ConfigError, "fleet: profiles: at least one"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_fleet_is_said(given, error, message):
    with pytest.raises(error, match=message):
        config.from_table(table(fleet=given))


def test_a_file_without_profiles(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("rounds = 3\n")
    with pytest.raises(ConfigError, match=r"mine.toml: a fleet is a list of \[\[fleet.profiles\]\]"):
        taciturn.read_fleet(file)
    file.write_text("[[fleet.profiles]]\nspeed = 3\n")
    with pytest.raises(ConfigError, match=r"mine.toml: fleet.profiles\[0\]: there is no field 'speed'"):
        taciturn.read_fleet(file)
