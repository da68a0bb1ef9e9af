"""The tables of docs/privacy.md name every part and every statistic, and say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from conftest import make_task
from drive import drive
from taciturn import Method, aggregation, codecs, methods, participation, partition, precision, solvers, sync
from taciturn.core import random
from taciturn.core.vector import Layout
from taciturn.precision.adjust import adjusted
from taciturn.sensitivity import MEASURED
from taciturn.sync.monitors import MONITORS, Sizes, directions, estimate
from taciturn.wire.format import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
LAYOUT = Layout(("w", "b"), ((12, 10), (8,)))


def rows(heading):
    """First column's names -> second column, of the table that starts so."""
    table = PAGE[PAGE.index(f"| {heading}") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {name: row[1] for row in cells for name in (re.findall(r"`(\w+)`", row[0]) or [row[0]])}


CODECS, AGGREGATORS = rows("codec | adds up"), rows("aggregator | sums")
LOOKS, REST, SAID = rows("sync, monitor"), rows("partition, policy"), rows("what | when")


def test_the_tables_are_complete():
    assert CODECS.keys() == set(codecs.__all__) and AGGREGATORS.keys() == set(aggregation.__all__)
    assert LOOKS.keys() == {*sync.__all__, *MONITORS}
    assert REST.keys() == {*partition.__all__, *precision.__all__}


@pytest.mark.parametrize("name", CODECS)
def test_codecs_add_up_as_said(name):
    """The sum of two clients' payloads is the payload of a sum, or it is not; combinators as what is within."""
    wraps = "codec" in getattr(getattr(codecs, name), "__dataclass_fields__", {})
    more = {"alpha": 1.0, "memory": "mean"} if name == "difference" else {"norm": 1e6} if name == "clip" else {}
    more |= {"then": codecs.identity()} if name == "chain" else {}
    codec = getattr(codecs, name)(**({"codec": codecs.identity()} if wraps else {}), **more)
    assert CODECS[name] != "within" or wraps
    found = _adds_up(codec)
    assert found == (CODECS[name] in ("yes", "within")), (name, found)
    if CODECS[name] == "within":
        assert not _adds_up(getattr(codecs, name)(codec=codecs.quantize4(), **more) if name != "chain" else codecs.chain())


def _adds_up(codec):
    u = [random.normal(random.key(i), LAYOUT.d) for i in range(2)]
    sent = [codec.encode(v, codec.init(LAYOUT)[0], random.key(7 + i), layout=LAYOUT, knobs={})[0] for i, v in enumerate(u)]
    if any(not value.is_floating_point() or value.dtype != torch.float32 for value in sent[0].values()):
        return False  # codes, places, marks: no sum of them is one
    if codec.init(LAYOUT)[1]:
        return False  # the server keeps a memory of each
    total = {name: sent[0][name] + sent[1][name] for name in sent[0]}
    return torch.allclose(codec.decode(total, {}, layout=LAYOUT)[0], u[0] + u[1], atol=1e-5)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregators_need_sums_as_said(name):
    assert getattr(aggregation, name)().linear == (AGGREGATORS[name] == "yes")


@pytest.mark.parametrize("name", MONITORS)
def test_monitors_need_sums_as_said(name):
    """H of the weighted mean of what clients say, as if one had said it, is H of all of them."""
    sizes, signal = Sizes(3, 50, 0), {"xi": directions(0, 32)}
    said = [MONITORS[name].say(random.normal(random.key(i), 32), signal, sizes) for i in range(4)]
    payload = {key: torch.stack([one[key] for one in said]) for key in said[0]}
    mean = {key: value.double().mean(0, keepdim=True) for key, value in payload.items()}
    h = [float(estimate(MONITORS[name], p, torch.ones(m), sizes)) for p, m in ((payload, 4), (mean, 1))]
    assert (abs(h[0] - h[1]) < 1e-4 * h[0]) == (LOOKS[name] == "yes"), h


SGD = solvers.sgd(lr=0.1)
RUNS = {name: Method(solver=SGD, sync=sync.fda(monitor=name, max_blocks=2)) for name in MONITORS}
RUNS |= {
    "admm": methods.fedapm(u=SGD), "scaffold": methods.scaffold(),
    "private": Method(aggregator=aggregation.private(), participation=participation.all()),
    "clip": Method(codec=codecs.clip(noise=1.0), aggregator=aggregation.mean()),
}  # fmt: skip


def test_every_number_that_is_told_is_in_the_table(monkeypatch):
    """Whatever a run sends up beside the encoded update, and whatever a policy that learns asks for."""
    from taciturn.engines.post import Post

    said, plain = set(), Post.message

    def listens(post, way, kind, ids, payload, riders=None):
        if way == "up" and kind != "update":
            said.update(payload if kind != "evaluate" else {"evaluation"})
        said.update(name.removeprefix("stats.") for name in riders or {})
        return plain(post, way, kind, ids, payload, riders)

    monkeypatch.setattr(Post, "message", listens)
    task = make_task()
    for method in RUNS.values():
        drive(task, method, rounds=1)
    assert adjusted.learns
    said |= {*MEASURED, "labels"}  # of a policy that learns: sensitivity.py, experiment/allocation.py
    assert said == SAID.keys() - {"update", "evaluation", "places", "lengths", "seconds", "errors"}
    assert set(KINDS) == {"schema", "setup", "model", "update", "monitor", "evaluate", "plan"}, "a new kind needs a row"
