"""The parts of an advice beside the codec, on tasks where the answer is known."""

from __future__ import annotations

import functools
import io
import json
import math
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import taciturn
from advisor.toys import experiment, least_squares
from taciturn import Experiment, Method, Task, fleet, server, solvers, sync
from taciturn.advisor import adapters, advice, homes, rounds, show
from taciturn.advisor.bits import precision_part
from taciturn.advisor.part import line_of, timing
from taciturn.advisor.pilot import run_pilot
from taciturn.cli import app
from taciturn.core import random
from taciturn.core.errors import UnknownName
from taciturn.experiment import config
from taciturn.experiment.simulated import Times
from taciturn.partition import layers, lora
from taciturn.tasks.data.clients import Federation, TableClients

runner = CliRunner()


def table(x, y, share=0.75):
    """x [N, n, ..], y [N, n, ..] -> a federation that keeps the last of each client's samples for validation."""
    clients, n = x.shape[:2]
    rows, cut = np.arange(clients * n).reshape(clients, n), int(share * n)
    fields = {"input": x.flatten(0, 1), "target": y.flatten(0, 1)}
    parts = (
        TableClients.of(fields, {f"c{i}": rows[i, where] for i in range(clients)}) for where in (slice(cut), slice(cut, n))
    )
    return Federation(next(parts), "toy", 4, validation=next(parts))


def classes(clients=8, samples=60, permuted=False, skew=False, names=4, seed=1):
    """Gaussian classes [16] around centres that all share; each client may name them its own way, or have few of them."""
    key, xs, ys = random.key(seed), [], []
    centres = 1.2 * random.normal(random.fold(key, "centres"), names, 16)
    for i in range(clients):
        own = random.fold(key, i)
        y = (random.uniform(random.fold(own, "y"), samples) * names).long()
        y = torch.where(random.uniform(random.fold(own, "skew"), samples) < 0.85, i % names, y) if skew else y
        xs.append(centres[y] + random.normal(random.fold(own, "x"), samples, 16) * (2.5 if skew else 1.0))
        ys.append(random.permutation(random.fold(own, "names"), names)[y] if permuted else y)
    data = table(torch.stack(xs), torch.stack(ys))
    return Task(lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, names)), data)


def on(task, **parts):
    """FedAvg of two epochs on it."""
    method = {"solver": solvers.sgd(lr=0.1), "batch_size": 15, "sync": sync.every(epochs=2)} | parts
    return Experiment(task, Method(**method), rounds=12)


@functools.cache
def piloted(**kind):
    """(experiment, its pilot) of a task of `classes`; the tests look at it on many lines."""
    made = on(classes(**kind))
    return made, run_pilot(made, 2, 48)


def advised(monkeypatch, experiment, found, **options):
    """`advise` on a pilot that was run before."""
    monkeypatch.setattr(advice, "run_pilot", lambda *_: found)
    return taciturn.advise(experiment, codecs=["identity", "quantize4"], **options)


def moved(experiment, found, *profiles):
    """The same pilot on other devices."""
    experiment = experiment.replace(fleet=fleet.Fleet(profiles))
    times = Times.of(experiment, found.curvature.work, random.key(0))
    return experiment, replace(found, end=replace(found.end, times=times))


# ---------------------------------------------------------------------------------------------------------------- sync


def test_a_rounds_seconds_are_those_of_hand():
    """20 steps of 0.01 s, 100 bytes each way at 1000 and 2000 bytes a second, half of 0.4 s each way."""
    task, _ = least_squares(d=8, clients=6, samples=64)
    device = fleet.Profile("toy", launch=0.0, up=1000.0, down=2000.0, latency=0.4)
    found = run_pilot(experiment(task, steps=20, batch=16).replace(fleet=fleet.Fleet((device,))), 2, 24)
    clock = replace(found.end.times.clock, steps=torch.tensor([[0.01]], dtype=torch.float64))
    now = timing(found, clock, 100.0, 100.0)
    assert now.work == pytest.approx(20 * 0.01) and now.epoch == pytest.approx(4 * 0.01)
    assert now.seconds == pytest.approx(0.2 + 0.1 + 0.05 + 0.4)
    assert now.share == pytest.approx(0.55 / 0.75) and now.rho == pytest.approx(0.55 / 0.04)
    assert now.epochs == pytest.approx(5)


@pytest.mark.parametrize(("h", "rho"), [(1.5, 0.5), (1.5, 50.0), (4.0, 7.0)])
def test_the_law_of_the_interval(h, rho):
    """C(n) of the module against rounds a / n + b times seconds n + rho, least at sqrt(h rho)."""
    best, n = math.sqrt(h * rho), torch.linspace(0.1, 60, 4000, dtype=torch.float64)
    naive = (h / n + 1) * (n + rho)
    assert float(n[naive.argmin()]) == pytest.approx(best, abs=0.02)
    for place in (0, 500, 3999):
        ratio = float(naive[place]) / ((h / best + 1) * (best + rho))
        assert rounds.cost(float(n[place]), best, rho) == pytest.approx(ratio)


def test_the_drifts_exponent_is_measured():
    """Straight ahead far from the optimum: p near 2; at the optimum gradients are noise and drift is a walk: p near 1."""
    task, _ = least_squares(d=8, shift=0.0, noise=0.0)
    far = run_pilot(experiment(task, steps=4, lr=1e-4, batch=64), 2, 24)
    noisy, _ = least_squares(d=40, shift=0.0, noise=20.0)
    near = run_pilot(experiment(noisy, steps=4, lr=1e-3, batch=2, rounds=80), 2, 24)
    assert far.end.drift[0] == 2 and rounds.exponent(far.end.drift) == pytest.approx(1.9, abs=0.06)
    assert rounds.exponent(near.end.drift) == pytest.approx(1.0, abs=0.35)
    assert rounds.exponent((1, 1.0, math.nan)) == 1.0


def test_a_fast_link_needs_nothing_and_a_slow_one_codec_and_sync(monkeypatch):
    pair = piloted()
    parts = {"parts": ["codec", "sync"]}
    fast = advised(monkeypatch, *moved(*pair, fleet.Profile("slow", launch=1e-3)), mbit=1000.0, **parts)
    assert fast.whole.plain.startswith("Plain FedAvg is enough") and fast.method == pair[0].method
    assert fast.whole.parts["sync"].numbers["share"] < 0.1 and fast.whole.parts["sync"].choice == "as it is"
    thin = advised(monkeypatch, *pair, mbit=0.01, **parts)
    assert not thin.whole.plain and thin.method.codec != Method().codec and isinstance(thin.method.sync, sync.fda)
    assert thin.method.sync.monitor == "naive" and thin.method.sync.price.up == pytest.approx(1250)
    far = advised(monkeypatch, *pair, mbit=0.1, latency=1.0, **parts)
    assert far.method.sync.monitor == "local"
    numbers = thin.whole.parts["sync"].numbers
    assert numbers["share"] == pytest.approx(1 - numbers["work_seconds"] / numbers["round_seconds"])
    assert numbers["rho"] * numbers["epoch_seconds"] == pytest.approx(numbers["round_seconds"] - numbers["work_seconds"])


def test_a_budget_that_does_not_bind_and_one_that_does(monkeypatch):
    experiment, found = piloted()
    sent = 12 * 8 * (4 * (16 * 24 + 24 + 24 * 4 + 4) + 64)
    wide = advised(monkeypatch, experiment, found, budget=2.0 * sent, parts=["codec"])
    assert "the budget is" in wide.whole.plain and wide.method == experiment.method
    tight = advised(monkeypatch, experiment, found, budget=0.2 * sent, parts=["codec"])
    assert not tight.whole.plain and tight.method.codec == tight.best.codec != Method().codec


def test_momentum_on_the_server_gets_no_long_rounds():
    found = run_pilot(on(classes(), server=server.adam(lr=0.01)), 1, 24)
    part = rounds.sync_part(found, line_of(found, 0.001, 0.0, ""), 1e4)
    assert part.change(found.end.method).sync == sync.every(epochs=rounds.LONGEST) and "swing" in " ".join(part.said)


# ------------------------------------------------------------------------------------------------------------ personal


@pytest.mark.parametrize(
    ("task", "choice"),
    [({"permuted": True}, homes.HEAD), ({}, homes.NONE), ({"skew": True}, homes.FINE)],
    ids=["permuted labels", "iid", "unlike shares of classes"],
)
def test_what_should_stay_at_home(monkeypatch, task, choice):
    told = advised(monkeypatch, *piloted(**task), parts=["personal"])
    part = told.whole.parts["personal"]
    assert part.choice == choice, part.said
    assert (told.method.partition == layers(personal="head")) == (choice == homes.HEAD)
    assert set(part.numbers["rho"]) == {"0", "2"} and part.numbers["clients"] == 8
    if choice == homes.HEAD:
        assert part.numbers["metric"]["own"] > part.numbers["metric"]["one"] + 0.25


def test_a_head_is_fitted_to_its_optimum():
    """Squared error with a pull is ridge regression, which has a closed form."""
    task, _ = least_squares(d=5, clients=6)
    built = task.build(0)
    z, y, start = torch.randn(40, 5), torch.randn(40, 1), torch.randn(1, 5)
    gram = 2 * z.T @ z / 40 + 0.1 * torch.eye(5)
    exact = torch.linalg.solve(gram, 2 * z.T @ y / 40 + 0.1 * start.T).T
    torch.testing.assert_close(homes.fitted(built, start, z, y, 0.1), exact, atol=1e-4, rtol=1e-4)


def test_where_no_head_can_be_tried():
    task, _ = least_squares()
    whole = homes.personal_part(run_pilot(experiment(task), 2, 24))
    assert "to share nothing" in " ".join(whole.said) and not whole.changes
    kept = homes.personal_part(run_pilot(on(classes(), partition=layers(personal="head")), 1, 24))
    assert "where all is shared" in " ".join(kept.said)


# ---------------------------------------------------------------------------------------------------------------- rank


def test_the_rank_of_an_update_by_construction():
    w = torch.outer(torch.arange(1.0, 7), torch.ones(5)) + 2 * torch.outer(torch.ones(6), torch.tensor([1.0, -1, 1, -1, 0]))
    spectrum = adapters.energies({"w": w})["w"]
    assert float(spectrum.sum()) == pytest.approx(float(w.square().sum()))
    assert adapters.captured([spectrum], 2) == pytest.approx(1.0) and adapters.captured([spectrum], 1) < 0.99
    assert adapters.least_rank([torch.tensor([1.0, 1.0, 1.0, 1.0])]) == 4
    assert adapters.least_rank([torch.ones(100)]) is None


def through(rank, clients=6, samples=80):
    """y = B A x with B A [12, 12] of that rank, isotropic x; the model starts at 0."""
    key = random.key(5)
    x = random.normal(random.fold(key, "x"), clients, samples, 12)
    product = random.normal(random.fold(key, "b"), 12, rank) @ random.normal(random.fold(key, "a"), rank, 12)

    def model():
        made = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Identity(), nn.Linear(12, 12, bias=False))
        nn.init.zeros_(made[0].weight)
        nn.init.eye_(made[2].weight)
        made[2].requires_grad_(False)
        return made

    return Task(model, table(x, x @ product.T), F.mse_loss)


@pytest.mark.parametrize("rank", [1, 4])
def test_the_mean_update_has_the_rank_of_the_task(rank):
    found = run_pilot(on(through(rank), solver=solvers.sgd(lr=0.01), batch_size=60), 2, 48)
    part = adapters.rank_part(found, on(through(rank)))
    assert part.choice == "no adapters" and "from scratch" in part.said[0]
    values = part.numbers["captured"]
    assert values[str(rank)] > adapters.KEEP and (rank == 1 or values[str(rank // 2)] < adapters.KEEP)
    assert part.numbers["bytes"]["2"] == 4 * 2 * 24
    naive = torch.linalg.svdvals(found.messages.double().mean(0).view(12, 12))  # clients are alike in size
    assert values["1"] == pytest.approx(float(naive[0] ** 2 / naive.square().sum()), rel=1e-6)


@pytest.mark.slow
def test_adapters_of_a_rank_that_is_not_in_use():
    pytest.importorskip("peft")
    part = lora(rank=4, alpha=8.0, targets=("0",))
    made = on(through(1), partition=part, solver=solvers.sgd(lr=0.05), batch_size=30)
    found = adapters.rank_part(run_pilot(made, 8, 24), made)
    assert found.choice == "rank 1", found.numbers
    assert found.change(Method(partition=part)).partition == replace(part, rank=1, alpha=2.0)


# ----------------------------------------------------------------------------------------------------------- precision


def test_precision_follows_the_fleet():
    plain, pair = fleet.Profile("plain", launch=0.0), piloted()
    fleets = {"none": plain, "int8": replace(plain, int8=200.0), "bfloat16": replace(plain, bandwidth=1e4, bfloat16=5000.0)}
    parts = {}
    for name, profile in fleets.items():
        _, found = moved(*pair, profile)
        parts[name] = precision_part(found, line_of(found, 1000.0, 0.0, name), Method().codec, 2000.0)
    none = parts["none"]
    assert none.choice == "float32" and not none.changes and none.gain == 1.0 and "nothing is gained" in none.said[-1]
    assert parts["int8"].choice.startswith("ptq8") and parts["int8"].numbers["seconds"]["qat8"] > 0
    assert parts["int8"].numbers["seconds"]["qat8"] > parts["int8"].numbers["seconds"]["ptq8"]
    seconds = parts["bfloat16"].numbers["seconds"]
    assert (parts["bfloat16"].choice == "all(bfloat16)") == (seconds["bfloat16"] < 0.9 * seconds["float32"])
    assert none.numbers["quantized"] == pytest.approx(16 * 24 / (16 * 24 + 24 + 24 * 4 + 4))


# --------------------------------------------------------------------------------------------------------------- whole


def test_the_fragment_loads_and_runs_and_json_has_every_part(monkeypatch):
    monkeypatch.setattr(advice, "run_pilot", lambda experiment, rounds: run_pilot(experiment, rounds, 24))
    given = ["quickstart", "--set", "data.clients=4", "--set", "method.participation=all", "--set", "data.limit=300"]
    given += ["--codecs", "identity,quantize4", "--pilot", "2", "--fleet", "factory", "--set", "rounds=8"]
    done = runner.invoke(app, ["advise", *given, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.strip().splitlines()[-1])
    for name in ("codec", "sync", "rank", "personal", "precision", "lean"):
        assert told[name]["choice"] and told[name]["certainty"], name
    table = config.to_table(taciturn.recipe("quickstart")) | tomllib.loads(told["method"])
    loaded = config.from_table(table | {"rounds": 1})
    result = taciturn.run(loaded.replace(fleet="factory"))
    assert len(result.history) == 1 and result.bytes_up > 0
    assert tomllib.loads(told["lean"]["numbers"]["toml"])["method"]["sync"]["monitor"] == "local"


def test_words_and_names(monkeypatch):
    told = advised(monkeypatch, *piloted(), parts=["sync", "personal"])
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(show(told))
    text = console.export_text()
    for said in ("sync: ", "personal: ", "certainty:", "[method.sync]", "the other parts took"):
        assert said in text, said
    assert "recommended:" not in text and list(told.whole.parts) == ["sync", "personal"]
    with pytest.raises(UnknownName, match="personal"):
        taciturn.advise(piloted()[0], parts=["persnal"])
