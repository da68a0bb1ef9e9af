"""Bits as data: clients of one block train and send at their own bits, on every engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import taciturn
from conftest import make_federation
from drive import drive, resumes
from taciturn import Experiment, Task, codecs, participation, partition, precision, solvers, sync
from taciturn.client import Work
from taciturn.core import random
from taciturn.core.errors import ConfigError
from taciturn.core.payload import nbytes
from taciturn.core.state import equal
from taciturn.engines import build
from taciturn.engines.modes import LAYERS, VMAP
from taciturn.experiment import config
from taciturn.method import Method
from taciturn.precision.fake import quantized
from taciturn.precision.policies import knobs
from taciturn.round import plan_round, start, train

MIXED = precision.fixed(modes=("float32", "qat2", "ptq3", "bfloat16", "qat8"), inputs=8)
BASE = Method(
    participation=participation.uniform(count=5), sync=sync.every(epochs=2), solver=solvers.sgd(lr=0.1), batch_size=8
)
CODECS = {
    "identity": codecs.identity(),
    "quantize": codecs.quantize(bits=8, rounding="nearest", scale="channel"),
    "memory": codecs.error_feedback(codecs.quantize(bits=8, rounding="nearest", scale="channel")),
    "lossless": codecs.lossless(codecs.quantize8()),
}


def net(features: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, 24), nn.Tanh(), nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 3))


@pytest.fixture(scope="module")
def wide():
    return Task(net, make_federation(features=16)).build(0)


@pytest.mark.parametrize("codec", CODECS)
def test_bits_of_each_client_are_the_same_on_every_engine(codec, wide):
    """Loopback in every bit and byte; stacked in every byte that packing does not shrink, and to rounding."""
    method = BASE.replace(precision=MIXED, codec=CODECS[codec])
    alone, engine, _, traffic = drive(wide, method, rounds=2)
    wired, other, _, wire_traffic = drive(wide, method, "loopback", rounds=2)
    stacked, _, _, stacked_traffic = drive(wide, method, "stacked", rounds=2, block=3)
    assert torch.equal(alone.x, wired.x) and equal(engine.store.export(), other.store.export())
    assert traffic == wire_traffic and traffic[0]["by_kind"]["down/plan"]["payload"] == 5 * 4
    assert stacked_traffic == traffic or codec == "lossless"
    near = 1e-6 if codec == "identity" else 1e-2  # a value may fall on the other side of the edge of a step
    assert float((alone.x - stacked.x).norm() / alone.x.norm()) <= near


@pytest.mark.parametrize("personal", [None, "head"])
def test_float_clients_are_those_of_a_run_without_precision(personal, wide):
    part = partition.full() if personal is None else partition.layers(personal=("4.*",))
    method = BASE.replace(partition=part)
    plain = drive(wide, method)[0]
    modes = ("float32",) * 8 + ("qat4", "bfloat16")  # 8 clients
    told = drive(wide, method.replace(precision=precision.fixed(modes, inputs=8)))[0]
    assert torch.equal(plain.x, told.x)
    assert not torch.equal(plain.x, drive(wide, method.replace(precision=precision.all("qat4")))[0].x)


def test_a_client_alone_is_a_client_of_a_block(wide):
    """One round, each client's own update: by itself in its mode, and in one stacked block with all others."""
    method = BASE.replace(participation=participation.all(), solver=solvers.adamw(lr=0.01), precision=MIXED)
    single, together = (_updates(wide, method, engine) for engine in ("sequential", "stacked"))
    torch.testing.assert_close(single, together, rtol=0, atol=1e-6)
    for i, mode in enumerate(MIXED.modes):
        same = _updates(wide, method.replace(precision=precision.all(mode, inputs=8)), "sequential")
        assert torch.equal(same[i], single[i])


def _updates(task, method, engine):

    split = method.split(task.model, task.tracked)
    key, sizes = random.key(0), task.train.sizes
    runner, _ = build(engine, Work(task, split, method.solver, method.codec), method, key, each=True)
    ids = torch.arange(len(sizes))
    server = start(split.x0, sizes, method)
    cast = method.broadcast.publish(server.x, 0, None, split.layout, key)
    plan, stride = plan_round(server, ids, sizes, method, key)
    train(runner, method.sync, server.sync, cast, plan, stride)
    found = list(runner.collect())
    order = torch.argsort(torch.cat([block.ids for block in found]))
    return torch.cat([block.updates for block in found])[order]


def test_uploads_have_the_bits_of_their_client():
    codec, u = codecs.quantize(bits=8, rounding="nearest", scale="channel"), torch.randn(600)
    layout = partition.full().split(nn.Linear(24, 24), frozenset()).layout
    for bits, levels in ((2, 1), (3, 3), (4, 7), (8, 127)):
        want, _ = codecs.quantize(bits=bits, rounding="nearest", scale="channel").encode(
            u, {}, torch.tensor(0), layout=layout, knobs={}
        )
        knobs = {"send": torch.tensor(levels, dtype=torch.uint8)}
        got, _ = codec.encode(u, {}, torch.tensor(0), layout=layout, knobs=knobs)
        assert equal(got, want) and int(nbytes(got)) == int(nbytes(want))
        decoded = codec.decode(got, {}, layout=layout)[0]
        assert torch.equal(decoded[:576].view(24, 24), quantized(u[:576].view(24, 24), torch.tensor(levels)))
    off, _ = codec.encode(u, {}, torch.tensor(0), layout=layout, knobs={"send": torch.tensor(0, dtype=torch.uint8)})
    assert equal(off, got)


def test_ptq_keeps_the_fast_path_and_the_others_say_why_not(wide):
    for mode, path, why in (("ptq4", LAYERS, ""), ("qat4", VMAP, "quantized weights"), ("bfloat16", VMAP, "in bfloat16")):
        method = BASE.replace(precision=precision.all(mode), codec=codecs.quantize8())
        split = method.split(wide.model, wide.tracked)
        found = build("stacked", Work(wide, split, method.solver, method.codec), method, random.key(0))[1]
        assert found.path == path and why in found.why
    stacked, alone = (drive(wide, method, engine, rounds=3)[0].x for engine in ("stacked", "sequential"))
    assert float((stacked - alone).norm() / alone.norm()) <= 2e-2  # a value may fall on the other side of a step's edge


def test_policies_are_exact():
    ids, key = torch.arange(10) * 3, random.key(1)
    assert knobs(precision.all(), ids, key, {}) == {} and set(knobs(precision.all("ptq4"), ids, key, {})) == {"send"}
    found = knobs(precision.fixed(modes=("float32", "qat4")), ids, key, {})
    assert found["train"].tolist() == found["send"].tolist() == [7 * (i % 2) for i in ids.tolist()]
    rule = precision.random(modes=("ptq8", "qat4", "qat2"), share=(0.5, 0.3, 0.2))
    drawn = [rule.draw(ids, random.fold(key, r), {}) for r in range(2)]
    assert all(torch.bincount(one).tolist() == [5, 3, 2] for one in drawn) and not torch.equal(*drawn)
    assert torch.equal(drawn[0], rule.draw(ids, random.fold(key, 0), {}))
    with pytest.raises(ConfigError, match="share: a positive number for each of 2 modes"):
        precision.random(share=(0.5, 0.6))
    for policy in (precision.all, precision.fixed, precision.random, precision.coarse):
        with pytest.raises(ConfigError, match=r"precision.inputs: 2 to 8 bits for the inputs of layers, or 0; got 1"):
            policy(inputs=1)
    told = knobs(precision.fixed(modes=("float32", "qat4", "ptq4", "bfloat16"), inputs=8), torch.arange(4), key, {})
    assert {name: row.tolist() for name, row in told.items()} == {
        "train": [0, 7, 0, 0], "send": [0, 7, 7, 0], "inputs": [0, 127, 0, 0], "bfloat16": [0, 0, 0, 1],
    }  # fmt: skip
    assert set(knobs(precision.all("bfloat16"), ids, key, {})) == {"bfloat16"}
    assert set(knobs(precision.all("ptq4", inputs=8), ids, key, {})) == {"send"}


def test_a_run_goes_on_and_workers_change_nothing(tmp_path):
    task = Task(net, make_federation(features=16))
    rule = precision.random(modes=("float32", "ptq4", "qat2", "bfloat16"), inputs=8)
    method = BASE.replace(precision=rule, codec=codecs.error_feedback(CODECS["quantize"]))
    experiment = Experiment(task, method, rounds=2, engine="stacked", block=3, evaluate_clients_every=1)
    whole = resumes(experiment, tmp_path / "run", rounds=4)
    shared = taciturn.run(experiment.replace(rounds=4, workers=2))
    assert all(torch.equal(shared.tensors[name], t) for name, t in whole.tensors.items())
    assert [line["knobs"] for line in shared.history] == [line["knobs"] for line in whole.history]
    again = config.from_table(config.to_table(experiment) | {"data": "digits", "model": "mlp"})
    assert again.method.precision == rule
