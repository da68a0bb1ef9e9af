"""flower = loopback, in every bit and byte: the same rounds over letters, with clients that keep nothing in memory."""

from __future__ import annotations

import pytest
import torch

from conftest import Net, make_task
from drive import drive
from engines.fake_line import line_of, sites_of
from taciturn import Method, aggregation, codecs, methods, participation, partition, precision, server, solvers, sync
from taciturn.core import random
from taciturn.core.broadcast import Broadcast
from taciturn.core.state import equal

SGD = solvers.sgd(lr=0.1)
HALF = {"participation": participation.uniform(count=4), "batch_size": 8}
CHANGE = Broadcast(codecs.quantize8(), of="change")
METHODS = {
    "fedavg": Method(solver=SGD, **HALF),
    "momentum": Method(solver=solvers.sgd(lr=0.1, momentum=0.9), **HALF),
    "change": Method(solver=SGD, broadcast=CHANGE, **HALF),
    "known": Method(solver=SGD, broadcast=Broadcast(codecs.top_k(share=0.1), of="change", start="known"), **HALF),
    "fda": Method(solver=SGD, sync=sync.fda(max_blocks=2), broadcast=CHANGE, **HALF),
    "fda-linear": Method(solver=solvers.adamw(lr=0.01), sync=sync.fda(monitor="linear"), **HALF),
    "fda-sketch": Method(solver=SGD, sync=sync.fda.published(), **HALF),
    "fda-local": Method(solver=SGD, sync=sync.fda(monitor="local"), **HALF),
    "error-feedback": Method(solver=SGD, codec=codecs.error_feedback(codecs.top_k(share=0.2)), broadcast=CHANGE, **HALF),
    "remainder": Method(
        solver=SGD, codec=codecs.error_feedback(codecs.top_k(share=0.2), into="start"), server=server.recent(), **HALF
    ),
    "lossless": Method(solver=SGD, codec=codecs.lossless(codecs.quantize4()), **HALF),
    "lora": Method(solver=SGD, partition=partition.lora(rank=2), **HALF),
    "lora-ranks": Method(
        solver=SGD, partition=partition.lora(rank=2, ranks=(1, 2)), aggregator=aggregation.low_rank("product_svd"), **HALF
    ),
    "lora-merges": Method(solver=SGD, partition=partition.lora(rank=2), aggregator=aggregation.low_rank("fedex"), **HALF),
    "fedapm": methods.fedapm(u=SGD, rho=0.2, **HALF),
    "fedapm-fda": methods.fedapm(u=SGD, codec=codecs.top_k(share=0.3), **HALF).replace(sync=sync.fda()),
    "scaffold": methods.scaffold(**HALF),
    "precision": Method(
        solver=SGD, codec=codecs.quantize4(), precision=precision.fixed(("qat4", "ptq2", "float32", "qat2") * 2), **HALF
    ),
}  # fmt: skip


def both(tmp_path, method, rounds=4, **task_args):
    task = make_task(lambda: method.partition.prepare(Net(dropout=0.2)), **task_args)
    line = line_of(task, method, tmp_path)
    sites = sites_of(line, method)
    wired = drive(task, method, "loopback", rounds=rounds)
    return line, sites, wired, drive(task, method, "flower", rounds=rounds, sites=lambda *_: sites)


SLOW = (
    "momentum",
    "change",
    "lora-merges",
    "fda-linear",
    "fda-sketch",
    "lossless",
    "lora",
    "lora-ranks",
    "fedapm-fda",
    "scaffold",
)
CASES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in METHODS]


@pytest.mark.parametrize("name", CASES)
def test_flower_is_loopback(tmp_path, name):
    line, sites, wired, flown = both(tmp_path, METHODS[name])
    assert torch.equal(wired[0].x, flown[0].x) and equal(wired[0].cast.held, flown[0].cast.held)
    assert wired[3] == flown[3], "every byte of every client, by kind"
    for one, other in zip(wired[2], flown[2], strict=True):
        assert torch.equal(one.loss, other.loss) and torch.equal(one.steps, other.steps) and one.sync == other.sync
        assert one.aggregate == other.aggregate
    found = [_evaluated(engine, line.site.work.split, METHODS[name], server) for server, engine, *_ in (wired, flown)]
    assert equal(*found), sites.silent
    counted = flown[1].post.ledger.totals
    assert wired[1].post.ledger.totals == counted
    told = {"up": 0, "down": 0}
    for kind, entry in counted.items():
        told[kind.split("/")[0]] += entry["payload"] + entry["frame"]
    unseen = sum(line.greetings[i] for i in range(8) if "enrolled" not in flown[1].post.met(i))  # who was never drawn
    assert sites.carried == {"up": told["up"] + unseen, "down": told["down"]}, "all that crossed the line is in the ledger"
    assert sites.exchanges == 2 + sum(stat.exchanges for stat in flown[2]), "one greeting, one evaluation"


def _evaluated(engine, split, method, server):
    cast = method.broadcast.publish(
        server.x, server.round, server.cast, split.layout, random.key(9), server.merges, split.kinds
    )
    return engine.evaluate(torch.arange(8), cast, "test")
