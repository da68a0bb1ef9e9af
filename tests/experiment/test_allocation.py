"""Precision on a fleet: the allocation by hand and by brute force, its seconds, the deployed model, resume, TOML."""

from __future__ import annotations

import dataclasses
import itertools
import tomllib

import pytest
import torch
from torch import nn

import taciturn
from conftest import make_federation
from drive import resumes
from taciturn import Experiment, Method, Task, codecs, participation, precision, solvers, sync
from taciturn.core.errors import ConfigError
from taciturn.experiment import allocation, config
from taciturn.experiment.runner import prepare
from taciturn.experiment.simulated import counted, one_step
from taciturn.fleet import Fleet, Profile, count
from taciturn.precision.forward import KNOBS
from taciturn.precision.modes import mode
from taciturn.precision.penalty import divergence, penalties
from taciturn.precision.policies import told

SIZES = (40, 8, 24, 16)
FAST = Profile("fast", float32=1.0, bandwidth=1.0, launch=1e-6, up=1e5, down=1e6, latency=0.01)
SLOW = dataclasses.replace(FAST, name="slow", bandwidth=0.2, up=2e4)
MODES = ("ptq3", "qat3", "ptq8")
METHOD = Method(
    solver=solvers.sgd(lr=0.1),
    codec=codecs.error_feedback(codecs.quantize(bits=3, rounding="nearest", scale="channel")),
    precision=precision.coarse(modes=MODES, lam=3.0),
    sync=sync.every(epochs=2),
    batch_size=8,
)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 3))


def experiment(policy=METHOD.precision, **fields) -> Experiment:
    task = Task(net, fields.pop("data", None) or make_federation(SIZES, features=16))
    base = {"task": task, "method": METHOD.replace(precision=policy), "rounds": 3, "fleet": Fleet((FAST, SLOW))}
    return Experiment(**base | fields)


def tables(run, policy):
    """Times and penalties [N, n_m] of a prepared run, and T_ref."""
    method, sizes, row = run.method.replace(precision=policy), run.task.train.sizes, told(policy)
    each = [{name: t[place] for name, t in row.items()} for place in range(len(policy.modes))]
    each.append({name: t[0] * 0 for name, t in row.items()})
    *times, plain = (allocation.predicted(method, run.work, sizes, run.times, run.key, knobs) for knobs in each)
    skew = divergence(allocation.labels(run.task))
    cost = penalties(sizes.double(), skew, [mode(name) for name in policy.modes], kappa=policy.kappa)
    return torch.stack(times, 1), cost, float(plain.max())


@pytest.mark.parametrize("lam", [0.0, 1.0, 4.0, 40.0])
def test_coarse_is_the_best_of_all_assignments(lam):
    policy = precision.coarse(modes=MODES, lam=lam)
    run = prepare(experiment(policy))
    times, cost, reference = tables(run, policy)
    every = torch.tensor(list(itertools.product(range(len(MODES)), repeat=len(SIZES))))
    values = times.mT.gather(0, every).max(1).values / reference + lam * cost.mT.gather(0, every).sum(1)
    assert isinstance(run.method.precision, precision.fixed) and run.experiment.method.precision == policy
    chosen = torch.tensor([MODES.index(name) for name in run.method.precision.modes])
    mine = times.gather(1, chosen.unsqueeze(1)).max() / reference + lam * cost.gather(1, chosen.unsqueeze(1)).sum()
    assert float(mine) == pytest.approx(float(values.min()), rel=1e-12)


def test_the_predicted_round_is_the_round():
    """Of a client in its mode, in a round without messages that are sent once; "train" is a byte where a mode needs it."""
    for name in ("ptq3", "qat3", "ptq8"):
        policy = precision.fixed(modes=(name,) * 3 + ("qat2",), inputs=4)
        run, result = prepare(experiment(policy)), taciturn.run(experiment(policy))
        times, line = tables(run, precision.coarse(modes=policy.modes, inputs=4))[0], result.history[1]["simulated"]
        spent = [sum(parts) for parts in zip(line["down"], line["compute"], line["up"], strict=True)]
        assert line["round"] == pytest.approx(max(spent), rel=1e-5)
        assert spent == pytest.approx([float(times[i, i]) for i in result.history[1]["cohort"]], rel=1e-5)


def test_a_step_takes_the_seconds_of_its_operators_in_its_mode():
    """As counted with the knobs of the mode; of bfloat16 under autocast, its products at the device's rate for it."""
    half = dataclasses.replace(FAST, name="half", bfloat16=4.0)
    policy = precision.fixed(modes=("ptq3", "qat3", "bfloat16", "qat8"), inputs=8)
    run = prepare(experiment(policy, fleet=Fleet((half, SLOW))))
    result = taciturn.run(experiment(policy, fleet=Fleet((half, SLOW))))
    quantizer = {"train": torch.tensor(3, dtype=torch.uint8), "inputs": torch.tensor(127, dtype=torch.uint8)}
    plain, aware = (count(one_step(run.work, METHOD.batch_size, knobs)) for knobs in ({}, quantizer))
    low = counted(run.work, METHOD.batch_size, [name == "bfloat16" for name in KNOBS])
    ways = [plain, aware, low, aware]
    for line in result.history:
        for place, i in enumerate(line["cohort"]):
            step = (half, SLOW)[line["simulated"]["device"][place]].step_seconds(ways[i])
            assert line["simulated"]["compute"][place] == pytest.approx(2 * (SIZES[i] // 8) * step, rel=1e-5)
    facts = result.header["fleet"]
    assert facts["step_seconds"] == [profile.step_seconds(plain) for profile in (half, SLOW)]
    assert facts["way_seconds"] == {
        "train and inputs": [profile.step_seconds(aware) for profile in (half, SLOW)],
        "bfloat16": [profile.step_seconds(low) for profile in (half, SLOW)],
    }
    other = taciturn.run(experiment(precision.all("ptq3"))).header["fleet"]
    assert "way_seconds" not in other and other["step_seconds"][1] == facts["step_seconds"][1]


def test_what_is_counted_of_a_step_in_bfloat16():
    """Net 16-40-3, batch 8: all products in bfloat16, and only they and casts; each weight is cast there and back."""
    run = prepare(experiment(precision.all()))
    plain, low = (counted(run.work, METHOD.batch_size, [False, False, on]) for on in (False, True))
    products = [[one.flops * one.times for one in found if one.flops] for found in (plain, low)]
    assert sum(products[0]) == sum(products[1]) and {one.dtype for one in low if one.flops} == {"bfloat16"}
    casts = sum(one.times for one in low if (one.flops, one.bytes) == (0, 40 * 16 * 6))
    assert casts == 2, "float32 to bfloat16 before the product, and back for the gradient"
    assert {one.dtype for one in plain} == {"float32"}


def test_nobody_is_given_a_mode_without_its_kernel():
    """bfloat16 is far faster where there is a kernel for it, and costs no accuracy in the prior: all get it who can."""
    half = dataclasses.replace(FAST, name="half", bfloat16=1e3, float32=1e-3)
    policy = precision.coarse(modes=("float32", "bfloat16"), lam=0.0)
    run = prepare(experiment(policy, fleet=Fleet((half, dataclasses.replace(half, name="none", bfloat16=None)))))
    want = [("bfloat16", "float32")[device] for device in run.times.clock.device.tolist()]
    assert list(run.method.precision.modes) == want and len(set(want)) == 2
    with pytest.raises(ConfigError, match="can run no mode"):
        prepare(experiment(precision.coarse(modes=("bfloat16",))))


def test_bfloat16_is_emulated_in_float32():
    with pytest.raises(ConfigError, match=r"bfloat16 is emulated in dtype = \"float32\"; got 'float64'"):
        prepare(experiment(precision.all("bfloat16"), dtype="float64"))
    prepare(experiment(precision.all("qat3"), dtype="float64"))


def test_a_deadline_counts_the_longer_step():
    slow = dataclasses.replace(SLOW, bandwidth=1e-3)
    policy = precision.fixed(modes=("ptq3", "qat3"))
    free = taciturn.run(experiment(policy, fleet=Fleet((slow,)))).history[0]["simulated"]
    spent = [sum(parts) for parts in zip(free["down"], free["compute"], free["up"], strict=True)]
    line = taciturn.run(experiment(policy, fleet=Fleet((slow,)), deadline=spent[0] * 0.999, rounds=1)).history[0]
    assert [entry["client"] for entry in line["left_out"]] == ["site-0"]


def test_what_is_deployed_is_what_the_result_gives():
    result = taciturn.run(experiment())
    test = make_federation(SIZES, features=16).central
    batch = test.fetch(torch.zeros(1, dtype=torch.int64), torch.arange(int(test.sizes[0])).unsqueeze(0))
    for model, value in ((result.quantized(3), "accuracy_deployed"), (result.model, "accuracy")):
        with torch.no_grad():
            right = (model(batch["input"][0]).argmax(1) == batch["target"][0]).float().mean()
        assert result.summary[value] == pytest.approx(float(right))
    assert all(set(line["deployed"]) == {"accuracy", "loss"} for line in result.history)
    assert result.header["deployed_bits"] == 3, "the fewest bits of the modes"


def test_nothing_is_deployed_without_bits_and_nothing_known_without_a_test_set():
    plain = taciturn.run(experiment(precision.all()))
    assert "accuracy_deployed" not in plain.summary and "deployed" not in plain.history[-1]
    data = dataclasses.replace(make_federation(SIZES, features=16), central=None)
    result = taciturn.run(experiment(data=data))
    assert result.summary["accuracy_deployed"] is None and result.history[-1]["deployed"] is None


def test_labels_are_counted_and_where_there_are_none_nobody_is_unlike():
    data = make_federation(SIZES, features=16)
    counts = allocation.labels(Task(net, data).build(0))
    target = data.train.fields["target"]
    assert counts[1].tolist() == torch.bincount(target[40:48], minlength=3).tolist()
    assert counts.sum(1).tolist() == list(SIZES)
    pairs = [[(torch.randn(16), torch.randn(1)) for _ in range(n)] for n in (3, 5)]
    plain = Task(lambda: nn.Linear(16, 1), pairs, loss=nn.functional.mse_loss, hold_out=0.0).build(0)
    assert divergence(allocation.labels(plain)).tolist() == [0.0, 0.0]


def test_a_resumed_run_has_the_same_allocation(tmp_path):
    method = METHOD.replace(participation=participation.uniform(count=3))
    asked = experiment(rounds=2, evaluate_clients_every=1).replace(method=method)
    whole = resumes(asked, tmp_path / "run", rounds=4)
    told_to = {(i, send) for line in whole.history for i, send in zip(line["cohort"], line["knobs"]["send"], strict=True)}
    assert len(told_to) == len({i for i, _ in told_to}), "a client has one mode"


def test_it_survives_toml_and_says_what_is_wrong():
    asked = taciturn.recipe("hybrid-fleet")
    assert isinstance(asked.method.precision, precision.coarse_fine)
    assert config.from_table(tomllib.loads(config.to_toml(asked))) == asked
    with pytest.raises(ConfigError, match=r"precision.lam: a number of at least 0"):
        precision.coarse(lam=-1.0)
    with pytest.raises(ConfigError, match="decided from the fleet and data"):
        precision.coarse().draw(torch.arange(2), torch.tensor(0), {})


def test_the_recipe_runs():
    result = taciturn.run(taciturn.recipe("hybrid-fleet").replace(rounds=2))
    assert result.summary["accuracy_deployed"] > 0.1 and result.summary["simulated_seconds"] > 0
    assert set(result.history[0]["knobs"]["send"]) == {3}
