"""Averaged iterates: what is averaged, what is trained, what is measured and kept.

Symbols: w_r the model after r rounds; K rounds.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from conftest import Net, make_federation
from drive import drive
from taciturn import Experiment, Method, Task, codecs, participation, run, server
from taciturn.core import random
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import ConfigError
from taciturn.core.state import equal, load_state, save_state

D, K = 5, 9


def updates() -> list[torch.Tensor]:
    return list(random.normal(random.key(1), K, D).double().unbind())


@pytest.mark.parametrize("inner", [server.sgd(), server.adam(lr=0.1)], ids=["sgd", "adam"])
@pytest.mark.parametrize("skip", [0, 4])
def test_the_average_is_of_the_iterates_before_each_step(inner, skip, tmp_path):
    x = plain = torch.ones(D)
    rule = server.averaged(inner, skip=skip)
    state, plain_state, path = rule.init(x), inner.init(x), []
    assert torch.equal(state["average"], x.double())
    for r, u in enumerate(updates()):
        path.append(x)
        x, state = rule.step(x, u, state)
        plain, plain_state = inner.step(plain, u, plain_state)
        assert torch.equal(x, plain), "averaging changed the training"
        kept = torch.stack(path[skip:] if r >= skip else path[-1:]).double().mean(0)
        torch.testing.assert_close(state["average"], kept, rtol=1e-12, atol=1e-12)
        save_state(tmp_path / "s", {"opt": state}, {})
        state = load_state(tmp_path / "s")[0]["opt"]
    assert int(state["rounds"]) == K


def test_bad_numbers():
    with pytest.raises(ConfigError, match=r"averaged\.skip: at least 0 rounds; got -1"):
        server.averaged(skip=-1)
    with pytest.raises(ConfigError, match=r"recent\.order: at least 0; got -0\.5"):
        server.recent(order=-0.5)


@pytest.mark.parametrize("order", [0, 1, 8])
def test_recent_models_count_by_a_polynomial_of_their_round(order):
    """The weight of w_i is proportional to i (i + 1) .. (i + order - 1), and the training is as without."""
    rule, plain = server.recent(server.momentum(lr=0.5), order=order), server.momentum(lr=0.5)
    x = y = torch.ones(D)
    state, other, path = rule.init(x), plain.init(y), []
    for r, u in enumerate(updates(), start=1):
        x, state = rule.step(x, u, state)
        y, other = plain.step(y, u, other)
        assert torch.equal(x, y)
        path.append(x.double())
        weights = torch.tensor([math.prod(range(i, i + order)) for i in range(1, r + 1)], dtype=torch.float64)
        torch.testing.assert_close(state["average"], weights @ torch.stack(path) / weights.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "down", [Broadcast(codecs.identity()), Broadcast(codecs.quantize8(), "change")], ids=["model", "change"]
)
@pytest.mark.parametrize("central", [True, False])
def test_the_average_is_measured_and_kept(down, central, tmp_path):
    """On the server's data and on the clients', which get it as a message of its own; training is as without."""
    data = make_federation()
    data = data if central else replace(data, central=None)
    method = Method(participation=participation.uniform(count=4), broadcast=down, batch_size=8)
    runs = {}
    for name, rule in (("plain", server.sgd()), ("averaged", server.averaged())):
        experiment = Experiment(Task(Net, data), method.replace(server=rule), rounds=4, evaluate_clients_every=1)
        runs[name] = run(experiment, out=tmp_path / name)
    plain, mean = runs["plain"], runs["averaged"]
    assert [line["loss"] for line in plain.history] == [line["loss"] for line in mean.history], "training changed"
    assert [line["bytes_up"] for line in plain.history] == [line["bytes_up"] for line in mean.history]
    assert plain.history[-1]["metrics"] != mean.history[-1]["metrics"]
    state, _, _, _ = drive(Task(Net, data).build(0), method.replace(server=server.averaged()), rounds=4, seed=0)
    kept = torch.cat([t.reshape(-1) for t in mean.model.state_dict().values()])
    torch.testing.assert_close(kept, state.model, rtol=1e-6, atol=1e-7)
    assert not torch.equal(kept, state.x)


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    experiment = Experiment(Task(Net, make_federation()), Method(server=server.averaged(), batch_size=8), rounds=4)
    whole = run(experiment, out=tmp_path / "whole")
    run(experiment.replace(rounds=2), out=tmp_path / "half")
    resumed = run(experiment, out=tmp_path / "half", resume=True)
    assert equal(whole.model.state_dict(), resumed.model.state_dict())
