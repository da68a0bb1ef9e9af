"""The ledger against a plain list of messages."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taciturn.wire.ledger import Ledger

KINDS = ("setup", "model", "update", "stats", "monitor", "evaluate")
calls = st.tuples(
    st.sampled_from(["up", "down"]),
    st.sampled_from(KINDS),
    st.lists(st.integers(0, 5), unique=True, max_size=4),
    st.integers(0, 100),
    st.booleans(),  # one size for all, or one for each
    st.sampled_from([0, 28]),
    st.sampled_from([0, 1, 2]),
)
rounds = st.lists(st.lists(calls, max_size=8), min_size=1, max_size=4)


def by_kind(entries: list[tuple]) -> dict[str, dict[str, int]]:
    """Naive sums of (direction, kind, client, payload, frame, messages)."""
    table: dict[str, dict[str, int]] = {}
    for direction, kind, _, payload, frame, messages in entries:
        entry = table.setdefault(f"{direction}/{kind}", {"payload": 0, "frame": 0, "messages": 0})
        entry["payload"] += payload
        entry["frame"] += frame
        entry["messages"] += messages
    return table


@settings(max_examples=60, deadline=None)
@given(rounds)
def test_the_ledger_is_a_sum_of_messages(rounds):
    ledger, everything = Ledger(), []
    for number, round in enumerate(rounds):
        entries = []
        for direction, kind, ids, size, same, frame, messages in round:
            sizes = [size if same else size + place for place in range(len(ids))]
            payload = size if same else torch.tensor(sizes, dtype=torch.int64)
            ledger.count(direction, kind, torch.tensor(ids, dtype=torch.int64), payload, frame, messages)
            entries += [(direction, kind, i, n, frame, messages) for i, n in zip(ids, sizes, strict=True)]
        for _ in range(number):
            ledger.exchange()
        everything += entries
        line = ledger.close_round()
        for name, counted in (("up", "up"), ("down", "down"), ("monitor", None)):
            spent = Counter()
            for direction, kind, client, payload, frame, _ in entries:
                if direction == counted or (counted is None and kind == "monitor"):
                    spent[client] += payload + frame
            assert line[name] == sum(spent.values())
            assert line["clients"][name] == [spent[i] for i in line["clients"]["ids"]]
        assert line["clients"]["ids"] == sorted({client for _, _, client, *_ in entries})
        assert line["exchanges"] == number
        used = {name: entry for name, entry in line["by_kind"].items() if any(entry.values())}
        assert used == {name: entry for name, entry in by_kind(entries).items() if any(entry.values())}
        assert json.loads(json.dumps(line)) == line, "plain numbers"
    total = {name: entry for name, entry in ledger.totals.items() if any(entry.values())}
    assert total == {name: entry for name, entry in by_kind(everything).items() if any(entry.values())}


def test_a_closed_round_does_not_move():
    ledger, ids = Ledger(), torch.tensor([2, 0])
    ledger.count("up", "update", ids, torch.tensor([10, 20]), 28)
    ledger.count("up", "stats", ids, 8, 0, messages=0)
    line = ledger.close_round()
    expected = {
        "up": 10 + 20 + 2 * 28 + 2 * 8, "down": 0, "monitor": 0, "exchanges": 0,
        "by_kind": {
            "up/update": {"payload": 30, "frame": 56, "messages": 2},
            "up/stats": {"payload": 16, "frame": 0, "messages": 0},
        },
        "clients": {"ids": [0, 2], "up": [56, 46], "down": [0, 0], "monitor": [0, 0]},
    }  # fmt: skip
    assert line == expected
    ledger.count("up", "update", ids, 5, 28)
    assert line == expected
    assert ledger.totals["up/update"] == {"payload": 40, "frame": 112, "messages": 4}


def test_an_empty_round_costs_nothing():
    assert Ledger().close_round() == {
        "up": 0, "down": 0, "monitor": 0, "exchanges": 0, "by_kind": {},
        "clients": {"ids": [], "up": [], "down": [], "monitor": []},
    }  # fmt: skip


def test_sizes_must_fit_the_clients():
    with pytest.raises(RuntimeError):
        Ledger().count("up", "update", torch.tensor([1, 2, 3]), torch.tensor([1, 2]), 28)


def test_what_each_client_did_in_each_exchange():
    ledger, ids = Ledger(), torch.tensor([7, 3])
    ledger.count("down", "model", ids, 100, 28)
    ledger.exchange()
    ledger.count("down", "monitor", ids, 4, 28)
    ledger.worked(ids, torch.tensor([5, 6]))
    ledger.count("up", "monitor", ids, torch.tensor([8, 9]), 28)
    ledger.exchange()
    ledger.count("up", "update", torch.tensor([3]), 50, 28)
    ledger.exchange()
    ledger.count("down", "evaluate", ids, 1000, 28)
    assert ledger.work(ids).tolist() == [[[160, 160], [5, 6], [36, 37]], [[0, 0], [0, 0], [0, 78]]]
    assert ledger.work(torch.tensor([3])).tolist() == [[[160], [6], [37]], [[0], [0], [78]]]
    ledger.close_round()
    assert ledger.work(ids).shape == (0, 3, 2), "the next round begins with nothing"
