"""Bytes of every single message: what the simulator computes is what the bytes are, whatever decides them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from bench.fuzz_wire import canonical, valid_payload

from conftest import Net, make_task
from drive import drive
from taciturn import participation, sync
from taciturn.codecs import cast, identity, lossless
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import WireError
from taciturn.core.payload import LOSSLESS, controlled, nbytes
from taciturn.core.state import equal, row, stack
from taciturn.core.vector import Layout
from taciturn.engines.modes import Direct, Wired
from taciturn.engines.post import Post
from taciturn.engines.store import ClientStore
from taciturn.method import Method
from taciturn.wire.format import FRAME, Schema

X = torch.arange(3.0)
LAYOUT = Layout.of({"w": X})


def post(carrier) -> Post:
    return Post(carrier, Broadcast(identity()), LAYOUT, ClientStore(9), X, copies=False)


def stacked(seed: int, m: int = 4) -> dict[str, torch.Tensor]:
    """m rows of one schema whose control fields differ, so that their sizes do."""
    rng = np.random.default_rng(seed)
    first = valid_payload(rng, most=40)
    rows = []
    for _ in range(m):
        mine = dict(first)
        for name in first:
            if name.endswith(".count"):
                mine[name] = torch.tensor(
                    int(rng.integers(0, len(first[name.removesuffix(".count")]) + 1)), dtype=torch.int32
                )
            elif name.endswith(".mask"):
                mine[name] = torch.from_numpy(np.asarray(rng.random(first[name].shape) < 0.5))
        rows.append(mine)
    return stack(rows)


@pytest.mark.parametrize("seed", range(40))
def test_direct_and_wired_count_the_same(seed):
    payload, ids = stacked(seed), torch.tensor([4, 0, 2, 8])
    riders = {"stats.loss": torch.rand(4), "stats.steps": torch.arange(4, dtype=torch.int32)} if seed % 2 else {}
    posts, arrived = (post(Direct()), post(Wired())), []
    for one in posts:
        one.begin(0)
        arrived.append(one.message("up", "update", ids, payload, riders))
    totals = posts[0].ledger.totals
    assert totals == posts[1].ledger.totals
    lines = [one.ledger.close_round() for one in posts]
    assert lines[0] == lines[1]
    extra = totals.get("up/stats", {"payload": 0})["payload"]
    _, sizes = Wired(posts[1].carrier.schemas, posts[1].carrier.largest).move("up", "update", payload | riders, 0, ids)
    assert totals["up/update"]["payload"] + extra == int(sizes.sum()), "update and stats are what crosses the line"
    assert extra <= 8 * 4
    for place in range(4):
        got = {name: tensor for name, tensor in row(arrived[1], place).items() if name != LOSSLESS}
        assert equal(got, canonical(row(payload | riders, place)))
    if LOSSLESS not in payload:
        assert torch.equal(sizes, torch.stack([nbytes(row(payload | riders, place)) for place in range(4)]))


def test_stats_are_never_more_than_the_message():
    """Zeros compress to less than the two numbers that ride along."""
    marker = torch.full((2,), 1, dtype=torch.uint8)
    payload = {"v": torch.zeros(2, 3000), LOSSLESS: marker}
    riders = {f"stats.{number}": torch.zeros(2, dtype=torch.float64) for number in range(9)}
    for carrier in (Direct(), Wired()):
        one = post(carrier)
        one.message("up", "update", torch.arange(2), payload, riders)
        totals = one.ledger.totals
        assert 0 <= totals["up/update"]["payload"] < 40 and 0 < totals["up/stats"]["payload"] <= 2 * 72


def test_a_wire_expects_what_was_announced_and_no_more():
    """A few bytes that stand for many zeros are rebuilt if their schema came from this side."""
    payload = {"v": torch.zeros(1, 1000), "v.count": torch.zeros(1, dtype=torch.int32)}
    carrier = Wired()
    one = post(carrier)
    one.message("up", "update", torch.tensor([3]), payload)
    assert carrier.largest == 4004 and one.ledger.totals["up/update"]["payload"] == 4
    larger = Schema.of({"v": torch.zeros(1001), "v.count": torch.zeros((), dtype=torch.int32)})
    carrier.schemas[larger.id] = larger
    with pytest.raises(WireError, match="tensors of 4008 bytes; at most 4004 are rebuilt here"):
        carrier.move("up", "update", {"v": torch.zeros(1, 1001), "v.count": payload["v.count"]}, 0, torch.tensor([3]))


@dataclass(frozen=True, slots=True)
class some:
    """Only the values above a threshold travel: sizes differ from client to client."""

    lossy: bool = True

    def init(self, layout):
        return {}, {}

    def encode(self, u, tx, key, *, layout, knobs):
        return {"values": u, "values.mask": u.abs() > 0.02}, tx

    def decode(self, payload, rx, *, layout):
        return torch.where(payload["values.mask"], payload["values"], 0.0), rx


METHODS = {
    "masked": Method(codec=some()),
    "zstd": Method(codec=lossless(cast()), broadcast=Broadcast(lossless(cast("bfloat16")))),
    "rans": Method(codec=lossless(some(), "rans")),
    "lossless of the drift": Method(codec=lossless(identity())),
}


@pytest.mark.parametrize("name", METHODS)
def test_engines_agree_on_bytes_that_depend_on_values(name):
    task = make_task(Net)
    method = METHODS[name].replace(participation=participation.uniform(count=4), sync=sync.every(epochs=1), batch_size=8)
    x, plain, _, traffic = drive(task, method, "sequential", rounds=2)
    x_wire, wire, _, wire_traffic = drive(task, method, "loopback", rounds=2)
    assert torch.equal(x.x, x_wire.x) and traffic == wire_traffic
    assert plain.post.ledger.totals == wire.post.ledger.totals
    x_stacked, many, _, _ = drive(task, method, "stacked", rounds=2)
    assert float((x.x - x_stacked.x).norm() / x.x.norm()) <= 1e-4
    sent, same = (engine.post.ledger.totals["up/update"] for engine in (plain, many))
    assert sent["messages"] == same["messages"] and abs(sent["payload"] / same["payload"] - 1) < 0.02
    dense = 4 * len(x.x) * sent["messages"]
    assert sent["payload"] < dense and controlled(dict.fromkeys(["values", "values.mask"]))
    assert FRAME * sent["messages"] == sent["frame"]
