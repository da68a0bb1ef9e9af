"""What a run with many clients writes, evaluates and keeps; and folders that cannot be resumed."""

from __future__ import annotations

import json

import pytest
import torch
from test_run import METHOD, experiment, without_clock

import taciturn
from taciturn import participation
from taciturn.core.errors import ConfigError, RunError
from taciturn.core.state import load_state, save_state
from taciturn.engines.rows import Rows
from taciturn.experiment import record, runner
from taciturn.experiment.config import from_table, to_table
from taciturn.experiment.record import read_header
from taciturn.report.read import read_run
from taciturn.report.tables import clients_of


def test_evaluate_count_draws_some_and_moves_no_byte_of_training():
    whole, some = (taciturn.run(experiment(rounds=5, evaluate_count=count)) for count in (None, 3))
    assert whole.bytes_up == some.bytes_up and whole.bytes_down == some.bytes_down
    drawn = [line["spread"]["ids"] for line in some.history]
    assert all(len(ids) == 3 and ids == sorted(ids) for ids in drawn) and len({tuple(ids) for ids in drawn}) > 1
    for one, all_of in zip(some.history, whole.history, strict=True):
        values = dict(zip(all_of["spread"]["ids"], all_of["spread"]["accuracy"], strict=True))
        assert one["spread"]["accuracy"] == pytest.approx([values[i] for i in one["spread"]["ids"]])
    assert "3 of them at a time" in some.header["measured_on"]
    assert taciturn.run(experiment(rounds=1, evaluate_count=99)).history[0]["spread"]["ids"] == list(range(8))


def test_evaluate_count_in_a_configuration():
    table = to_table(taciturn.recipe("quickstart").replace(evaluate_count=7))
    assert table["evaluate_count"] == 7 and from_table(table).evaluate_count == 7
    with pytest.raises(ConfigError, match="evaluate_count: at least 1 client; got 0"):
        experiment(evaluate_count=0)


def test_with_many_clients_evaluations_name_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LISTED", 7)
    result = taciturn.run(experiment(rounds=2, evaluate_count=3), out=tmp_path)
    header = read_header(tmp_path)
    assert header["clients"] == [] and header["clients_total"] == 8
    names = [f"site-{i}" for i in result.history[-1]["spread"]["ids"]]
    assert [name for name, _ in clients_of(read_run(tmp_path))] == names
    assert result.client("site-5") is not None


def test_a_checkpoint_does_not_grow_with_who_took_part(tmp_path):
    method = METHOD.replace(participation=participation.cyclic(count=2))
    for rounds in (2, 4):
        taciturn.run(experiment(method=method, rounds=rounds), out=tmp_path, resume=rounds > 2)
    sizes = {path.stat().st_size for path in tmp_path.glob("checkpoint-*")}
    state, _ = load_state(tmp_path / "checkpoint-000004.safetensors")
    assert set(state["engine"]) == {"post"} and set(state["engine"]["post"]) == {"schemas", "bits"}
    assert max(sizes) < 2 * min(sizes)


def test_rows_are_on_the_disk_before_the_checkpoint_that_counts_them(tmp_path, monkeypatch):
    events, flush, save = [], Rows.flush, record.save_state
    monkeypatch.setattr(Rows, "flush", lambda rows: (events.append("flush"), flush(rows)))
    monkeypatch.setattr(record, "save_state", lambda *a: (events.append("save"), save(*a)))
    taciturn.run(experiment(rounds=2), out=tmp_path)
    tables = len(json.loads((tmp_path / "clients.json").read_text())["tables"])
    assert events == (["flush"] * tables + ["save"]) * 2


def test_a_broken_checkpoint_is_set_aside_and_clients_go_back_with_the_server(tmp_path):
    whole = taciturn.run(experiment(), out=tmp_path / "whole")
    folder = tmp_path / "cut"
    taciturn.run(experiment(rounds=4), out=folder)
    newest = sorted(folder.glob("checkpoint-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    cut = taciturn.run(experiment(), out=folder, resume=True)
    assert without_clock(cut.history) == without_clock(whole.history)
    assert (folder / "clients.own").read_bytes() == (tmp_path / "whole/clients.own").read_bytes()
    assert (folder / (newest.name + ".unreadable")).exists()


def test_a_checkpoint_of_an_older_format_is_named(tmp_path):
    taciturn.run(experiment(rounds=1), out=tmp_path)
    path = tmp_path / "checkpoint-000001.safetensors"
    state, meta = load_state(path)
    save_state(path, state, meta | {"format": 1})
    with pytest.raises(RunError, match=r"checkpoint-000001.* format 1; this version resumes format 2: end the run with"):
        taciturn.run(experiment(), out=tmp_path, resume=True)


def test_rows_of_another_shape_are_named(tmp_path):
    taciturn.run(experiment(rounds=1), out=tmp_path)
    path = tmp_path / "clients.json"
    path.write_text(path.read_text().replace('"clients": 8', '"clients": 9'))
    with pytest.raises(RunError, match="rows of other clients or another shape"):
        taciturn.run(experiment(), out=tmp_path, resume=True)


def test_a_clients_own_model_is_found_by_name():
    result = taciturn.run(experiment(rounds=1))
    cohort = result.history[0]["cohort"]
    own = {name: result.client(name).state_dict()["head.weight"] for name in result.header["clients"]}
    fresh = result.tensors["head.weight"]
    assert [i for i, head in enumerate(own.values()) if not torch.equal(head, fresh)] == sorted(cohort)


def test_a_result_does_not_speak_for_clients_that_moved_on(tmp_path):
    first = taciturn.run(experiment(rounds=2), out=tmp_path)
    assert first.client("site-0") is not None
    second = taciturn.run(experiment(rounds=6), out=tmp_path, resume=True)
    with pytest.raises(RunError, match="ask the result of the resumed run"):
        first.client("site-0")
    assert second.client("site-0") is not None
