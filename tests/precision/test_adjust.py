"""The stage that learns: what clients measure, by hand; what the policy makes of it; that it costs bytes and no time."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest
import torch
from torch import nn

import taciturn
from conftest import make_federation
from drive import resumes
from taciturn import Experiment, Method, Task, codecs, participation, precision, solvers, sync
from taciturn.core import random
from taciturn.core.errors import ConfigError
from taciturn.core.types import LOST, OK
from taciturn.experiment import config
from taciturn.experiment.runner import _round, prepare
from taciturn.fleet import Fleet, Profile
from taciturn.precision import fake
from taciturn.precision.adjust import EXPLORE, adjusted
from taciturn.precision.modes import levels

SIZES = (24, 8, 24, 16, 24, 24)
FAST = Profile("fast", float32=1.0, bandwidth=0.01, launch=1e-6, up=1e5, down=1e6, latency=0.01)
SLOW = dataclasses.replace(FAST, name="slow", bandwidth=0.005, launch=2e-6)
MODES = ("ptq3", "qat3")
METHOD = Method(
    solver=solvers.sgd(lr=0.1),
    codec=codecs.error_feedback(codecs.quantize(bits=3, rounding="nearest", scale="channel")),
    precision=precision.coarse_fine(modes=MODES, settle=2),
    sync=sync.every(steps=4),
    batch_size=8,
)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 3))


def experiment(policy=METHOD.precision, **fields) -> Experiment:
    base = {"task": Task(net, make_federation(SIZES, features=16)), "rounds": 3, "fleet": Fleet((FAST, SLOW))}
    return Experiment(**base | {"method": METHOD.replace(precision=policy)} | fields)


def policy_of(**fields) -> adjusted:
    """Of a prepared run."""
    return prepare(experiment(precision.coarse_fine(**{"modes": MODES, "settle": 1} | fields))).method.precision


def stats(policy, ids, drawn, gap, **other):
    """What a cohort tells: gap of each mode; seconds as predicted."""
    n = len(ids)
    told = {"gap": torch.tensor(gap)[drawn], "quantized": torch.full((n,), 0.5), "moved": torch.full((n,), 0.1)}
    return told | {"status": torch.full((n,), OK), "seconds": policy.times[ids, drawn]} | other


def taught(policy, rounds, gap, **other):
    """The state after rounds of everybody."""
    state, ids = policy.init(), torch.arange(len(SIZES))
    for _ in range(rounds):
        drawn = policy.draw(ids, torch.tensor(0), state)
        state = policy.update(state, ids, drawn, stats(policy, ids, drawn, gap, **other))
    return state


@pytest.mark.parametrize("engine", ["sequential", "stacked", "loopback"])
def test_what_a_client_measures(engine):
    """By hand from its weights after a round of plain SGD; three numbers ride on the upload."""
    policy = precision.coarse_fine(modes=("ptq3",), settle=1)
    asked = experiment(policy, engine=engine, rounds=1, task=Task(net, make_federation((24,), features=16)))
    run, seen = prepare(asked), {}
    update = adjusted.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adjusted, "update", lambda self, s, i, d, told: seen.update(told) or update(self, s, i, d, told))
        _round(run)
    model, key, data = prepare(asked).task.model, random.fold(random.fold(run.key, "client"), 0), run.task.train
    size = torch.tensor([24])
    index, _ = random.batches(key.unsqueeze(0), size, torch.tensor([0]), 5, 8, 24)
    batches = [data.fetch(torch.tensor([0]), index[:, t]) for t in range(5)]
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    for batch in batches[:4]:
        model.zero_grad()
        nn.functional.cross_entropy(model(batch["input"][0]), batch["target"][0]).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad

    def loss(bits):
        tensors = fake.deployed({name: p.detach() for name, p in model.named_parameters()}, bits)
        output = torch.func.functional_call(model, tensors, (batches[4]["input"][0],))
        return float(nn.functional.cross_entropy(output, batches[4]["target"][0]))

    assert float(seen["quantized"]) == pytest.approx(loss(3), rel=1e-5)
    assert float(seen["gap"]) == pytest.approx(loss(3) - loss(0), abs=1e-6)
    u = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    assert float(seen["moved"]) == pytest.approx(float(u.norm() / start.norm()), rel=1e-5)
    assert run.engine.post.ledger.close_round()["by_kind"]["up/stats"]["payload"] == 4 * 5


def test_engines_agree_with_a_policy_that_learns():
    lines = {e: taciturn.run(experiment(engine=e, rounds=5)) for e in ("sequential", "loopback", "stacked")}
    one, wire, many = lines.values()
    assert all(torch.equal(one.tensors[name], t) for name, t in wire.tensors.items())
    for a, b, c in zip(one.history, wire.history, many.history, strict=True):
        assert a["precision"] == b["precision"] and a["traffic"] == b["traffic"]
        assert a["knobs"] == c["knobs"] and a["traffic"]["by_kind"] == c["traffic"]["by_kind"]
        assert a["precision"]["gap"] == pytest.approx(c["precision"]["gap"], abs=1e-4)


def test_layer_by_layer_measures_what_vmap_does():
    """No mode trains on few bits, so linear layers take their own path; with AdamW it keeps no local record of knobs."""
    policy = precision.coarse_fine(modes=("float32", "ptq3"), settle=1)
    method = METHOD.replace(precision=policy, solver=solvers.adamw(lr=0.01))
    asked = experiment(rounds=2).replace(method=method)
    one, many = (taciturn.run(asked.replace(engine=engine)) for engine in ("sequential", "stacked"))
    assert many.header["engine"]["path"] == "layer by layer"
    for a, b in zip(one.history, many.history, strict=True):
        assert a["knobs"] == b["knobs"] and a["precision"]["gap"] == pytest.approx(b["precision"]["gap"], abs=1e-4)


def test_the_first_rounds_play_coarse():
    """But for a client that has time to spare, once the explored weight allows one."""
    run = prepare(experiment(precision.coarse_fine(modes=MODES, settle=3)))
    policy, ids = run.method.precision, torch.arange(len(SIZES))
    plain = prepare(experiment(precision.coarse(modes=MODES))).method.precision
    assert [MODES[m] for m in policy.first.tolist()] == list(plain.modes)
    assert torch.equal(policy._decide(ids, policy.init())[0].modes, policy.first)
    state = taught(policy, 2, [5.0, 0.0])
    assert torch.equal(state["mode"], policy.first) and int(state["round"]) == 2


def test_it_learns_which_mode_hurts():
    """A gap of PTQ alone: all train quantization-aware if it is worth the time. No gap: everybody is as fast as can be."""
    hurts, spares = policy_of(lam=50.0), policy_of(lam=1.0)
    assert (taught(hurts, 12, [0.5, 0.0])["mode"] == 1).all()
    state = taught(spares, 12, [0.0, 0.0])
    slowest = spares.times[:, 0].argmax()
    assert int(state["mode"][slowest]) == 0
    found, _, _ = spares._decide(torch.arange(len(SIZES)), state)
    assert found.makespan == pytest.approx(float(spares.times[:, 0].max()), rel=1e-3), "the fastest round there is"
    told = hurts.tell(taught(hurts, 12, [0.5, 0.0]))["gap"]
    assert told["qat3"] == pytest.approx(0.0, abs=0.1) and told["ptq3"] > told["qat3"]


def test_of_gaps_the_new_one_counts_three_tenths():
    """The smoothed gap of each client, by hand; who was not there keeps its own."""
    policy, ids = policy_of(), torch.arange(4)
    state = policy.init()
    for gap in (0.4, 0.1):
        drawn = policy.draw(ids, torch.tensor(0), state)
        state = policy.update(state, ids, drawn, stats(policy, ids, drawn, [gap, gap]))
    expected = torch.tensor([0.7 * 0.3 * 0.4 + 0.3 * 0.1] * 4 + [0.0] * 2, dtype=torch.float64)
    assert torch.allclose(state["smooth"], expected, atol=1e-8)


def test_exploring_costs_no_time_and_little_weight():
    policy, ids = policy_of(lam=0.0), torch.arange(len(SIZES))
    state, share, spent = policy.init(), policy.facts["weight"] / policy.facts["weight"].sum(), 0.0
    for r in range(40):
        found, upper, _ = policy._decide(ids, state)
        drawn = policy.draw(ids, torch.tensor(0), state)
        changed = drawn != found.modes
        spent += float(share[changed].sum())
        assert bool((upper[ids, drawn][changed] <= found.makespan).all())
        assert spent <= EXPLORE * (r + 1) + 1e-9
        state = policy.update(state, ids, drawn, stats(policy, ids, drawn, [0.1, 0.0]))
    assert spent > 0, "nobody has tried anything: nothing is tested here"


def test_times_that_differ_from_the_clock_are_learned():
    """QAT takes thrice as long as predicted: T is then the observed."""
    policy, ids = policy_of(lam=0.0), torch.arange(len(SIZES))
    state = policy.init()
    for r in range(20):
        drawn = torch.full_like(ids, r % 2)
        seconds = policy.times[ids, drawn] * (1 + 2 * (r % 2))
        state = policy.update(state, ids, drawn, stats(policy, ids, drawn, [0.0, 0.0], seconds=seconds))
    _, upper, _ = policy._decide(ids, state)
    assert (upper[:, 1] / policy.times[:, 1]).tolist() == pytest.approx([3.0] * len(ids), rel=0.1)
    assert state["factor"][:, 1].tolist() == pytest.approx([3.0] * len(ids), rel=0.1)


def test_who_did_not_answer_teaches_nothing():
    policy, ids = policy_of(), torch.arange(len(SIZES))
    drawn, before = policy.first, policy.init()
    lost = stats(policy, ids, drawn, [9.0, 9.0], status=torch.full_like(ids, LOST))
    bad = stats(policy, ids, drawn, [float("nan"), float("nan")])
    for told in (lost, bad):
        after = policy.update(before, ids, drawn, told)
        for name in ("gap", "time", "factor", "smooth", "guard"):
            one, other = (taciturn.core.state.leaves(state[name]) for state in (before, after))
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), name


def test_lam_grows_while_the_deployed_model_gets_worse():
    policy, ids = policy_of(lam=2.0), torch.arange(len(SIZES))
    state = policy.init()
    for loss in (0.1, 0.3, 0.6, 0.9, 1.2, 1.5):
        told = stats(policy, ids, policy.first, [0.0, 0.0], quantized=torch.full((len(ids),), loss))
        state = policy.update(state, ids, policy.first, told)
    assert policy.tell(state)["lam"] == 4.0


def test_labels_are_sent_once_and_counted():
    def setup(policy):
        run = prepare(experiment(policy))
        _round(run)
        return run.engine.post.ledger.close_round()["by_kind"]["up/setup"]["payload"]

    for policy in (precision.coarse, precision.coarse_fine):
        more = setup(policy(modes=MODES)) - setup(policy(modes=MODES, kappa=0.0))
        assert more >= 4 * 3 * len(SIZES), "three classes of four bytes, and their name in the schema"
    loopback = taciturn.run(experiment(engine="loopback", rounds=1)).history[0]["traffic"]
    assert loopback == taciturn.run(experiment(rounds=1)).history[0]["traffic"]


def test_a_resumed_run_has_learned_the_same(tmp_path):
    method = METHOD.replace(participation=participation.uniform(count=4))
    whole = resumes(experiment(rounds=3, evaluate_clients_every=1).replace(method=method), tmp_path / "run", rounds=6)
    assert whole.history[-1]["precision"]["predicted"] > 0


def test_toml_and_errors():
    asked = taciturn.recipe("hybrid-fleet")
    asked = asked.replace(method=asked.method.replace(precision=precision.coarse_fine(modes=MODES, lam=0.5)))
    assert config.from_table(tomllib.loads(config.to_toml(asked))) == asked
    for fields, said in (
        ({"lam": -1.0}, "precision.lam"),
        ({"settle": 0}, "precision.settle: rounds, at least 1; got 0"),
        ({"modes": ("float32",)}, "one with bits at least"),
    ):
        with pytest.raises(ConfigError, match=said):
            precision.coarse_fine(**fields)
    with pytest.raises(ConfigError, match=r"use taciturn.run"):
        precision.coarse_fine().draw(torch.arange(2), torch.tensor(0), {})
    assert levels(3) == 3
