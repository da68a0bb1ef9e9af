"""The ledger of a run of Flower, against counts by hand."""

from __future__ import annotations

import json
import sys

import pytest

from dropin.nodes import app, grid_of, ordered, random_model
from taciturn.core.errors import ConfigError
from taciturn.flower import Compressed, Ledgered, ledger_mod
from taciturn.flower.accounts import totals_of
from taciturn.flower.between import Between, sizes
from taciturn.flower.between import app as door

strategies = pytest.importorskip("flwr.serverapp.strategy")
used = ordered
SETTINGS = {"min_train_nodes": 3, "min_evaluate_nodes": 3, "min_available_nodes": 3}


def test_totals_are_counts_by_hand(tmp_path):
    grid, one = grid_of(ledger_mod()), Ledgered(strategies.FedAvg(**SETTINGS), tmp_path / "ledger.json")
    result = one.start(grid, random_model(), num_rounds=2)
    model = 6 * 5 * 4 + 6 * 4 + 3 * 6 * 4 + 8 + 4 * 128  # NumPy's own header is 128 bytes an array
    assert one.totals["down/model"]["payload"] == 2 * 3 * model == grid.size(grid.sent, "train")
    assert one.totals["up/update"]["payload"] == 2 * 3 * model == grid.size(grid.came, "train")
    assert one.totals["down/evaluate"]["payload"] == 2 * 3 * model and one.totals["up/evaluate"]["payload"] == 0
    assert {name: entry["messages"] for name, entry in one.totals.items()} == dict.fromkeys(one.totals, 6)
    flowers = sum(sum(r.count_bytes() for r in m.content.values()) for m in grid.sent)
    assert sum(e["payload"] + e["frame"] for n, e in one.totals.items() if n.startswith("down")) == flowers
    file = json.loads((tmp_path / "ledger.json").read_text())
    assert file["totals"] == one.totals == result.ledger and len(file["rounds"]) == 2 == len(one.rounds)
    assert sum(line["up"] for line in one.rounds) == sum(
        e["payload"] + e["frame"] for n, e in one.totals.items() if n.startswith("up")
    )
    nodes = [totals_of(grid.context(node)) for node in grid.clients]
    for name, entry in one.totals.items():
        assert {key: sum(book[name][key] for book in nodes) for key in entry} == entry, "each node has its share"


def test_lost_replies_and_errors_are_not_bytes():
    grid = grid_of(lost={(1, 2)})
    one = Ledgered(strategies.FedAvg(**SETTINGS))
    one.start(grid, random_model(), num_rounds=1)
    assert one.totals["up/update"]["messages"] == 2 and one.totals["down/model"]["messages"] == 3


def test_what_flower_cannot_count_is_counted_by_its_serialization():
    config = app.ConfigRecord({"empty": "", "none": []})
    assert sizes(app.RecordDict({"config": config})) == (0, len(config.deflate()))


def test_messages_that_would_go_around_are_refused():
    with pytest.raises(ConfigError, match="push_messages goes around"):
        Between(grid_of(), lambda messages, send: send(messages)).push_messages([])


def test_without_flwr(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    with pytest.raises(ConfigError, match=r"taciturn.flower needs flwr .*pip install 'taciturn\[flower\]'"):
        door()
    assert Compressed and ledger_mod(), "naming them needs nothing"
