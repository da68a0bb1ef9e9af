"""What the server knows of a client: rows that a restart finds again."""

from __future__ import annotations

import pytest
import torch

from taciturn.codecs import identity
from taciturn.core.broadcast import Broadcast
from taciturn.core.errors import WireError
from taciturn.core.random import key
from taciturn.core.vector import Layout
from taciturn.engines.modes import Direct, Wired
from taciturn.engines.post import Post
from taciturn.engines.store import ClientStore

X = torch.arange(3.0)
LAYOUT = Layout.of({"w": X})
BROADCAST = Broadcast(identity(), "change")


def make(folder, round=None, wired=False):
    clients = ClientStore(6)
    post = Post(Wired() if wired else Direct(), BROADCAST, LAYOUT, clients, X, copies=wired)
    if round is None:
        clients.create(folder)
    else:
        clients.recover(folder, round)
    return post, clients


def setups(post):
    return post.ledger.close_round()["by_kind"].get("down/setup", {"messages": 0})["messages"]


@pytest.mark.parametrize("wired", [False, True])
def test_a_restart_knows_who_has_met_what(tmp_path, wired):
    post, clients = make(tmp_path, wired=wired)
    cast = BROADCAST.publish(X, 0, None, LAYOUT, key(0))
    for i in (4, 1):
        one = torch.tensor([i])
        post.begin(0)
        assert torch.equal(post.model("model", one, cast)["x"], X)
        post.acknowledge(one, cast)
    assert setups(post) == 2
    clients.flush()
    clients.commit(1, oldest=1)
    state = post.export()
    post.model("model", torch.tensor([5]), cast)  # after the checkpoint: never was
    post, _ = make(tmp_path, 1, wired=wired)
    post.restore(state)
    assert post.versions(torch.arange(6)).tolist() == [-1, 0, -1, -1, 0, -1]
    later = BROADCAST.publish(X + 1, 1, cast, LAYOUT, key(1))
    assert torch.equal(post.model("model", torch.tensor([1]), later)["x"], X + 1)
    assert setups(post) == 1, "the change's schema is new; the first round's is known"
    assert torch.equal(post.model("model", torch.tensor([5]), later)["x"], X + 1)
    assert setups(post) == 1, "the snapshot's schema is new to this client"


def test_there_is_room_for_63_things(tmp_path):
    post, _ = make(tmp_path)
    ids = torch.tensor([2, 0])
    for n in range(63):
        assert post._first_time(f"thing-{n}", ids).tolist() == [2, 0]
        assert post._first_time(f"thing-{n}", torch.tensor([0, 3, 2])).tolist() == [3]
    with pytest.raises(WireError, match="more than 63 schemas"):
        post._first_time("one more", ids)
