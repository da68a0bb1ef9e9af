"""Modes of clients in a report."""

from __future__ import annotations

import json

from report.folders import make
from taciturn.report import read_run
from taciturn.report.modes import mode_figures, played
from taciturn.report.page import render
from taciturn.report.tables import methods


def hybrid(folder, trained):
    path = make(folder, [0.5, 0.6], cohort=range(2))
    lines = [json.loads(line) for line in (path / "record.jsonl").read_text().splitlines()]
    for line in lines:
        line["knobs"] = {"train": trained, "send": [3, 3]}
    (path / "record.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return read_run(path)


def test_each_client_is_shown_in_its_mode(tmp_path):
    run = hybrid(tmp_path / "a", [0, 3])
    assert played(run) == [(1, 0, "ptq3"), (1, 1, "qat3"), (2, 0, "ptq3"), (2, 1, "qat3")]
    (figure,) = mode_figures(methods([run]))
    assert [trace.name for trace in figure.plot.data] == ["ptq3", "qat3"]
    assert list(figure.plot.data[1].x) == [1, 2] and list(figure.plot.data[1].y) == [1, 1]
    assert "Modes of the clients" in render([run])


def test_one_mode_for_all_needs_no_figure(tmp_path):
    assert mode_figures(methods([hybrid(tmp_path / "a", [3, 3])])) == []
    assert mode_figures(methods([read_run(make(tmp_path / "b", [0.5]))])) == []
