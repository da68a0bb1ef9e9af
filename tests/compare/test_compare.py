"""Comparisons: cells and their names, fair tuning, what is done is not done again, what fails is said, files agree."""

from __future__ import annotations

import csv
import json

import pytest
from typer.testing import CliRunner

import taciturn
from taciturn.cli import app
from taciturn.compare import compare, grid, parse_vary
from taciturn.compare import jobs as jobs_of
from taciturn.compare.jobs import FAILED, Job, play
from taciturn.core.errors import ConfigError, RunError, UnknownName
from taciturn.experiment import config

TABLE = config.to_table(taciturn.recipe("quickstart").replace(rounds=2))
config.set_path(TABLE, "data.clients", 4)
CODECS = parse_vary("method.codec=identity,quantize(bits=2)")
ALPHAS = parse_vary("data.alpha=0.1,1.0")


def test_cells_are_all_combinations():
    cells = grid(TABLE, [CODECS, ALPHAS, parse_vary("method.batch_size=8,16")])
    assert len(cells) == 8 and [cell.scenario for cell in cells] == ["alpha=0.1"] * 4 + ["alpha=1.0"] * 4
    assert cells[0].method == "codec=identity, batch_size=8" and cells[3].label == (
        "codec=quantize(bits=2), batch_size=16, alpha=0.1"
    )
    last = config.from_table(cells[-1].table)
    assert last.method.codec == taciturn.codecs.quantize(bits=2) and last.method.batch_size == 16
    assert last.task.data.split.alpha == 1.0
    assert [cell.method for cell in grid(TABLE, [CODECS])] == ["identity", "quantize(bits=2)"]
    assert [cell.method for cell in grid(TABLE, [])] == ["quickstart"]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["method.codec"], "write path=value,value"),
        (["method.codec=identity,identity"], "a value stands twice"),
        (["method.codec=identity", "method.codec=quantize4"], "method.codec stands twice"),
        (["method.codec=quantize(bits=2"], "lacks a closing bracket"),
        (["data.alpa=1"], "alpa"),
        (["method.codec=quantise4"], "quantize4"),
    ],
)
def test_wrong_input_is_named(texts, said):
    with pytest.raises((ConfigError, UnknownName), match=said):
        grid(TABLE, [parse_vary(text) for text in texts])


def test_runs_are_tuned_with_one_budget_and_end_in_files_that_agree(tmp_path):
    tune = parse_vary("solver.lr=0.001,0.1,0.2", "--tune")
    found = compare(TABLE, [CODECS], out=tmp_path, seeds=2, tune=tune)
    assert len(list(tmp_path.glob("tuning/*/*/result.json"))) == 6 and len(found.folders) == 4 and not found.missing
    for row in found.rows:
        trials = [taciturn.report.read_run(tmp_path / "tuning" / slug(row) / str(k)) for k in range(3)]
        best = max(range(3), key=lambda k: (max(line["metrics"]["accuracy"] for line in trials[k].rounds), -k))
        assert row["tuned"] == tune.values[best] and row["at_edge"] == (best != 1)
        runs = [taciturn.report.read_run(tmp_path / "runs" / slug(row) / f"seed-{k}") for k in (0, 1)]
        assert {run.header["experiment"]["method"]["solver"]["lr"] for run in runs} == {row["tuned"]}
        assert [run.seed for run in runs] == row["seeds"] == [0, 1]
        assert row["final"] == pytest.approx(sum(run.rounds[-1]["metrics"]["accuracy"] for run in runs) / 2)
        assert row["bytes"] == pytest.approx(sum(run.bytes_up + run.bytes_down for run in runs) / 2)
    assert found.rows[0]["target"] == found.rows[1]["target"] and found.rows[1]["bytes"] < found.rows[0]["bytes"]
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == json.loads(json.dumps(found.rows))
    with open(tmp_path / "tables" / "summary.csv") as file:
        told = list(csv.DictReader(file))
    assert [row["name"] for row in told] == ["identity", "quantize(bits=2)"]
    assert [float(row["final"]) for row in told] == pytest.approx([row["final"] for row in found.rows])
    text = (tmp_path / "tables" / "summary.md").read_text()
    assert all(row["method"] in text for row in found.rows) and (tmp_path / "report.html").exists()


def slug(row):
    return "identity" if row["method"] == "identity" else "quantize-bits=2"


def test_a_step_size_without_values_is_tried_at_a_third_one_and_three_times(tmp_path):
    found = compare(TABLE, [], out=tmp_path, seeds=1, tune="solver.lr")
    lr = TABLE["method"]["solver"]["lr"]
    tried = [
        json.loads(path.read_text())["experiment"]["method"]["solver"]["lr"]
        for path in tmp_path.glob("tuning/*/*/run.json")
    ]
    assert sorted(tried) == pytest.approx([lr / 3, lr, 3 * lr], rel=1e-2) and found.rows[0]["tuned"] in tried
    with pytest.raises(ConfigError, match=r"--tune method.codec: of 'quickstart' it is .*write the values"):
        compare(TABLE, [], out=tmp_path / "other", tune="method.codec")


def test_what_is_done_is_not_done_again_and_another_experiment_is_refused(tmp_path, monkeypatch):
    first = compare(TABLE, [CODECS], out=tmp_path, seeds=1)
    monkeypatch.setattr(jobs_of, "run", lambda *_, **__: pytest.fail("a run was repeated"))
    assert compare(TABLE, [CODECS], out=tmp_path, seeds=1).rows == first.rows
    with pytest.raises(RunError, match="was run with another"):
        compare(TABLE | {"dtype": "float64"}, [CODECS], out=tmp_path, seeds=1)


def test_a_run_that_was_stopped_goes_on(tmp_path):
    whole = compare(TABLE | {"rounds": 3}, [], out=tmp_path / "whole", seeds=1)
    table = config.to_table(config.from_table(TABLE | {"seed": 0, "name": "quickstart"}))
    folder = tmp_path / "half" / "runs" / "quickstart" / "seed-0"
    taciturn.run(config.from_table(table), out=folder)
    (folder / "result.json").unlink()
    assert compare(TABLE | {"rounds": 3}, [], out=tmp_path / "half", seeds=1).rows[0]["final"] == whole.rows[0]["final"]


def test_a_method_that_diverges_is_a_row_and_said(tmp_path):
    found = compare(TABLE, [parse_vary("method.solver.lr=0.1,1e30")], out=tmp_path, seeds=1)
    good, bad = found.rows
    assert good["final"] is not None and bad["final"] is None and bad["seeds"] == []
    assert [gap["run"] for gap in found.missing] == ["runs/lr=1e30/seed-0"] and "learning rate" in found.missing[0]["why"]
    assert (tmp_path / "runs/lr=1e30/seed-0" / FAILED).exists()
    assert compare(TABLE, [parse_vary("method.solver.lr=0.1,1e30")], out=tmp_path, seeds=1).missing == found.missing


def test_no_run_begins_after_the_budget(tmp_path):
    job = Job(config.to_table(config.from_table(TABLE)), tmp_path / "run")
    assert play([job], 1, until=0.0) == {job: "no time was left"} and not job.folder.exists()
    with pytest.raises(ConfigError, match="no run has a result: no time was left"):
        compare(TABLE, [], out=tmp_path / "out", seeds=1, budget_minutes=0.0)


def test_scenarios_have_targets_of_their_own(tmp_path):
    found = compare(TABLE, [CODECS, ALPHAS], out=tmp_path, seeds=1)
    assert [row["baseline"] for row in found.rows] == ["identity"] * 4
    targets = [row["target"] for row in found.rows]
    assert targets[0] == targets[1] and targets[2] == targets[3]
    best = max(line["metrics"]["accuracy"] for line in taciturn.report.read_run(found.folders[2]).rounds)
    assert targets[2] == pytest.approx(0.98 * best)


def test_the_command(tmp_path):
    arguments = ["compare", "quickstart", "--vary", "method.codec=identity,quantize4", "--seeds", "1", "--rounds", "1"]
    result = CliRunner().invoke(app, [*arguments, "--set", "data.clients=4", "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    assert [row["method"] for row in json.loads(result.stdout)["rows"]] == ["identity", "quantize4"]
    again = CliRunner().invoke(app, [*arguments, "--set", "data.clients=4", "--out", str(tmp_path)])
    assert again.exit_code == 0 and "quantize4" in again.output


def test_a_report_holds_each_scenario_to_its_own_target(tmp_path):
    found = compare(TABLE, [CODECS, ALPHAS], out=tmp_path, seeds=1)
    rows = taciturn.report.summary([taciturn.report.read_run(folder) for folder in found.folders])
    assert [row["scenario"] for row in rows] == ["alpha=0.1"] * 2 + ["alpha=1.0"] * 2
    assert [row["baseline"] for row in rows] == ["identity, alpha=0.1"] * 2 + ["identity, alpha=1.0"] * 2
    assert [row["target"] for row in rows] == [row["target"] for row in found.rows]
    page = (tmp_path / "report.html").read_text()
    assert "where alpha=0.1;" in page and "where alpha=1.0" in page
