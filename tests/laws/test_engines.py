"""The law of the engines: one text, three places; same bits, same bytes, same draws.

sequential = loopback in every bit of model and client state and in every byte; stacked, layer by layer and by vmap,
= sequential within 1e-5 (norm-relative) after three rounds, and in every byte, for every solver, partition, codec and
broadcast, on clients of unlike sizes.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from conftest import Net, make_federation, make_task
from drive import drive
from taciturn import Task, aggregation, codecs, participation, partition, server, solvers, sync
from taciturn.core.broadcast import Broadcast
from taciturn.core.state import equal
from taciturn.engines.fused import Fused
from taciturn.method import Method
from taciturn.solvers import schedules

SOLVERS = {
    "sgd": solvers.sgd(lr=0.1),
    "momentum": solvers.sgd(lr=0.05, momentum=0.9, weight_decay=0.01, clip=1.0, schedule=schedules.cosine(rounds=9)),
    "nesterov": solvers.sgd(lr=0.05, momentum=0.5, nesterov=True),
    "adamw": solvers.adamw(lr=0.01, weight_decay=0.1, schedule=schedules.constant(warmup=3)),
    "prox": solvers.prox(mu=0.5, solver=solvers.sgd(lr=0.1)),
    "prox-adamw": solvers.prox(mu=0.5, solver=solvers.adamw(lr=0.01)),
}
PARTITIONS = {
    "full": partition.full(),
    "head": partition.layers(personal="head"),
    "norms": partition.layers(personal=("norms",)),
    "shared-stem": partition.layers(shared=("stem*",)),
}
OTHERS = {
    "cast": {"codec": codecs.cast(), "broadcast": Broadcast(codecs.cast())},
    "bfloat16-change": {"codec": codecs.cast("bfloat16"), "broadcast": Broadcast(codecs.cast("bfloat16"), "change")},
    "longest": {"sync": sync.every(epochs=1, pace="longest")},
    "steps": {"sync": sync.every(steps=3)},
    "mean": {"aggregator": aggregation.mean()},
    "cyclic": {"participation": participation.cyclic(count=3)},
    "available": {"participation": participation.available(count=4, probability=0.5, swing=1.0, period=3)},
    "all": {"participation": participation.all()},
    "recent": {"server": server.recent()},
    "start-adamw": {"codec": codecs.error_feedback(codecs.lowrank(rank=1), into="start"), "solver": solvers.adamw(lr=0.01)},
} | {name: {"server": getattr(server, name)(lr=0.1)} for name in ("adagrad", "adam", "adamw", "momentum", "sgd", "yogi")}
COMPRESSED = {
    "chain": codecs.chain(codecs.top_k(share=0.2), codecs.quantize8()),
    "difference": codecs.difference(codecs.quantize4()),
    "ef21": codecs.ef21(codecs.top_k(share=0.2)),
    "error_feedback": codecs.error_feedback(codecs.top_k(share=0.1)),
    "error_feedback-start": codecs.error_feedback(codecs.top_k(share=0.1), into="start"),
    "lossless": codecs.lossless(codecs.quantize2()),
    "lowrank": codecs.error_feedback(codecs.lowrank(rank=2)),
    "partial": codecs.partial(p=0.7),
    "per_tensor": codecs.per_tensor(codecs.quantize4(), least=10),
    "qsgd": codecs.qsgd(levels=8),
    "quantize": codecs.quantize(),
    "quantize2": codecs.quantize2("channel"),
    "quantize4": codecs.quantize4("block"),
    "quantize8": codecs.quantize8(),
    "rand_k": codecs.rand_k(share=0.5),
    "rotated": codecs.rotated(codecs.quantize4()),
    "sign": codecs.error_feedback(codecs.sign()),
    "sketch": codecs.sketch(share=0.5),
    "sparsify": codecs.sparsify(),
    "ternary": codecs.ternary(),
    "top_k": codecs.top_k(share=0.3),
}
COMPRESSED = {f"codec-{name}": {"codec": codec} for name, codec in COMPRESSED.items()} | {
    "codec-running": {
        "codec": codecs.difference(codecs.quantize4(), alpha=0.4, memory="mean"),
        "aggregator": aggregation.running(alpha=0.4, update="unbiased"),
    },
    "codec-ef21-running": {
        "codec": codecs.difference(codecs.top_k(share=0.3), alpha=1.0, memory="mean"),
        "aggregator": aggregation.running(weights="samples"),
    },
    "down-quantize8": {"broadcast": Broadcast(codecs.quantize8(), "change"), "codec": codecs.quantize8()},
    "down-quantize8-model": {"broadcast": Broadcast(codecs.quantize8())},
    "down-sparsify": {"broadcast": Broadcast(codecs.sparsify(p=0.9), "change")},
    "down-known": {"broadcast": Broadcast(codecs.sparsify(p=0.3), "change", "known"), "codec": codecs.quantize8()},
    "averaged": {"server": server.averaged(server.momentum(lr=0.5))},
}
TWINS = {"partition": partition.twins()}
SCAFFOLD = {"solver": solvers.scaffold(lr=0.1), "aggregator": aggregation.controlled()}
PEERS = {
    "ditto": TWINS | {"solver": solvers.ditto(0.5, solvers.sgd(0.1), solvers.adamw(0.01))},
    "pfedme": TWINS | {"solver": solvers.pfedme(5.0, 2, 0.1, 0.05), "server": server.sgd(lr=0.5)},
    "scaffold": SCAFFOLD,
    "scaffold/head": SCAFFOLD | {"partition": PARTITIONS["head"]},
    "scaffold-ef": SCAFFOLD | {"codec": codecs.error_feedback(codecs.top_k(share=0.3))},
}
ROWS = {f"{s}/{p}": {"solver": SOLVERS[s], "partition": PARTITIONS[p]} for s, p in itertools.product(SOLVERS, PARTITIONS)}
METHODS = ROWS | OTHERS | COMPRESSED | PEERS
ALIKE = {name for place, name in enumerate(ROWS) if (place // len(PARTITIONS) + place) % 2} | {
    f"codec-{name}" for name in ("qsgd", "quantize2", "quantize8", "ternary")
}  # to others: left to the slow laws
BASE = Method(participation=participation.uniform(count=4), sync=sync.every(epochs=2), batch_size=8)


@pytest.fixture(scope="module")
def shared_task():
    return make_task(lambda: Net(dropout=0.2))


@pytest.fixture(scope="module")
def vmap_task():
    """The same task, called by a forward of its own: the stacked engine takes torch.vmap."""
    return Task(lambda: Net(dropout=0.2), make_federation(), forward=lambda model, batch: model(batch["input"])).build(0)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in ALIKE else []) for n in METHODS])
def test_engines_agree(name, shared_task, vmap_task):
    method = BASE.replace(**METHODS[name])
    x, engine, stats, traffic = drive(shared_task, method, "sequential", rounds=3)
    x_wire, wire, _, wire_traffic = drive(shared_task, method, "loopback", rounds=3)
    assert torch.equal(x.x, x_wire.x), "loopback changed the model"
    assert equal(engine.store.export(), wire.store.export()), "loopback changed client state"
    assert traffic == wire_traffic and engine.post.ledger.totals == wire.post.ledger.totals
    for task, layers in ((shared_task, True), (vmap_task, False)):
        x_stacked, stacked, stacked_stats, stacked_traffic = drive(task, method, "stacked", block=3, rounds=3)
        layers = layers and METHODS[name].get("partition") != partition.twins()  # two models of each client
        assert isinstance(stacked.crew.trainer.way, Fused) is layers, "each way of the stacked engine is looked at"
        assert float((x.x - x_stacked.x).norm() / x.x.norm()) <= 1e-5
        assert traffic == stacked_traffic
        for one, many in zip(stats, stacked_stats, strict=True):
            assert torch.equal(one.ids, many.ids) and torch.equal(one.steps, many.steps)
    assert not torch.equal(x.x, method.partition.split(shared_task.model, shared_task.tracked).x0), "nothing was learnt"


def test_block_size_changes_no_draw_and_no_byte(shared_task):
    method = BASE.replace(participation=participation.all())
    runs = [drive(shared_task, method, "stacked", block=block, rounds=2) for block in (1, 2, 5, 8)]
    for state, _, _, traffic in runs[1:]:
        assert float((state.x - runs[0][0].x).norm() / state.x.norm()) <= 1e-6
        assert traffic == runs[0][3]


def test_personal_and_only_personal_parameters_stay(shared_task):
    method = BASE.replace(partition=PARTITIONS["head"], participation=participation.cyclic(count=4))
    _, engine, _, _ = drive(shared_task, method, rounds=2)
    v = engine.store.export()["rows"]["v"]
    assert len(v) == 8 and v.shape[1] == 8 * 3 + 3
    assert len(torch.unique(v, dim=0)) == 8, "personal heads must differ"


@pytest.mark.parametrize("parts", [{"partition": PARTITIONS["head"]}, PEERS["ditto"], PEERS["pfedme"]], ids=str)
def test_personal_parameters_are_in_no_message(shared_task, parts):
    """Bytes of the heads, of personal models or of data appear in nothing that crosses the line."""
    seen: list[bytes] = []
    method = BASE.replace(participation=participation.all(), **parts)
    split = method.split(shared_task.model, shared_task.tracked)
    _, engine, _, _ = drive(shared_task, method, "loopback", rounds=1, tap=seen.append)
    wire = b"".join(seen)
    assert split.x0.numpy().tobytes()[:64] in wire, "the tap sees the shared model"
    for v in engine.store.export()["rows"]["v"]:
        assert v.numpy().tobytes()[:16] not in wire
    for sample in shared_task.data.train.fields["input"]:
        assert sample.numpy().tobytes()[:16] not in wire


def test_batchnorm_with_personal_norms_runs_and_one_by_one():
    task = make_task(lambda: Net(norm=nn.BatchNorm1d(8)), sizes=(16, 8, 24, 32))
    method = BASE.replace(partition=PARTITIONS["norms"], participation=participation.all())
    state, engine, _, _ = drive(task, method, "auto", rounds=2)
    other, loop, _, _ = drive(task, method, "loopback", rounds=2)
    assert torch.equal(state.x, other.x) and equal(engine.store.export(), loop.store.export())
    means = engine.store.export()["rows"]["b"]
    assert len(torch.unique(means, dim=0)) == 4 and not torch.equal(means[0], torch.zeros_like(means[0]))


@pytest.mark.parametrize(("name", "vectors"), [("", 1), ("ditto", 1), ("pfedme", 1), ("scaffold", 2)])
def test_bytes_are_the_formula(shared_task, name, vectors):
    """In float32: 4 d up and down per client and round, 8 d of SCAFFOLD; 8 bytes of statistics; frames of 28 bytes."""
    _, engine, _, _ = drive(shared_task, BASE.replace(**PEERS.get(name, {})), rounds=3)
    d, messages = 99 * vectors, 3 * 4
    totals = engine.post.ledger.totals
    assert totals["up/update"] == {"payload": 4 * d * messages, "frame": 28 * messages, "messages": messages}
    assert totals["down/model"] == totals["up/update"]
    assert totals["up/stats"] == {"payload": 8 * messages, "frame": 0, "messages": 0}
