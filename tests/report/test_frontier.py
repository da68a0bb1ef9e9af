"""The frontier by hand, methods over data settings, clients by method, and the tables in files."""

from __future__ import annotations

import csv
import random

import pytest

from report.folders import EVIL, make
from taciturn.core.errors import RunError
from taciturn.report import read_run, write_report
from taciturn.report.cells import SHOWN, client_tables, markdown, summary_table
from taciturn.report.frontier import frontier_figures, pareto, robustness_figure
from taciturn.report.page import embed, outcome_figures, render
from taciturn.report.tables import methods, summary
from taciturn.report.words import say


@pytest.mark.parametrize(
    ("points", "frontier"),
    [
        ([(1, 1)], [0]),
        ([(1, 2), (2, 1)], [0, 1]),
        ([(2, 1), (1, 2)], [1, 0]),  # by cost
        ([(1, 1), (2, 2)], [0]),
        ([(1, 1), (1, 2), (2, 1)], [0]),  # as good in one, worse in the other
        ([(1, 1), (1, 1)], [0, 1]),  # equal points beat no one
        ([(5, 1), (4, 2), (3, 3), (4, 3), (6, 1), (3, 4)], [2, 1, 0]),
    ],
)
def test_the_frontier_by_hand(points, frontier):
    assert pareto(points) == frontier


def test_the_frontier_is_what_no_other_point_beats():
    draw = random.Random(0)
    for _ in range(50):
        points = [(draw.randrange(6), draw.randrange(6)) for _ in range(12)]
        kept = []
        for at, (cost, error) in enumerate(points):
            better = False
            for c, e in points:
                better |= c <= cost and e <= error and (c < cost or e < error)
            if not better:
                kept.append(at)
        assert sorted(pareto(points)) == kept


def grid(tmp_path, errors, *, metric=None, seeds=2):
    """Runs of (name, alpha) -> (bytes a round, value at the end); each seed is 0.01 apart."""
    runs = []
    for (name, alpha), (sent, value) in errors.items():
        for seed in range(seeds):
            label = f"{name}, alpha={alpha}" if len({a for _, a in errors}) > 1 else name
            more = {"metric": metric} if metric else {}
            asked = {"data": {"alpha": alpha}}
            folder = tmp_path / f"{name}-{alpha}-{seed}"
            values = [value / 2, value + 0.01 * seed]
            runs.append(read_run(make(folder, values, name=label, seed=seed, up=sent, down=sent, experiment=asked, **more)))
    return methods(runs)


TWO = {("a", 0.1): (100, 0.6), ("b", 0.1): (50, 0.5), ("c", 0.1): (200, 0.55)}
TWO |= {("a", 1.0): (100, 0.9), ("b", 1.0): (50, 0.9), ("c", 1.0): (200, 0.95)}


def test_points_are_means_over_seeds_with_bars_and_each_setting_has_its_frontier(tmp_path):
    groups = grid(tmp_path, TWO)
    (figure,) = frontier_figures(groups)  # no simulated time in old records
    first, second, *points = figure.plot.data
    assert [list(line.x) for line in (first, second)] == [[200.0, 400.0], [200.0, 800.0]]
    assert first.line.shape == "hv" and list(first.y) == pytest.approx([0.495, 0.395])
    assert [(p.name, p.x[0], p.showlegend) for p in points[:3]] == [("a", 400, True), ("b", 200, True), ("c", 800, True)]
    assert [p.showlegend for p in points[3:]] == [False] * 3 and points[0].marker.symbol != points[3].marker.symbol
    assert points[0].marker.color == points[3].marker.color != points[1].marker.color
    assert points[0].error_y.array[0] == pytest.approx(0.01 / 2**0.5)
    assert "final error (%)" in figure.plot.layout.yaxis.title.text and figure.plot.layout.xaxis.type == "log"


@pytest.mark.parametrize(("goal", "order"), [("max", [200.0, 400.0]), ("min", [200.0])])
def test_a_metric_that_is_no_fraction_has_its_own_better(tmp_path, goal, order):
    found = grid(
        tmp_path, {("a", 1): (100, 20.0), ("b", 1): (50, 10.0), ("c", 1): (200, 15.0)}, metric={"name": "x", "goal": goal}
    )
    assert list(frontier_figures(found)[0].plot.data[0].x) == order


def test_one_method_has_no_frontier_and_one_setting_no_robustness(tmp_path):
    groups = grid(tmp_path / "a", {("a", 1): (100, 0.5)})
    assert frontier_figures(groups) == [] and robustness_figure(groups) is None
    assert robustness_figure(grid(tmp_path / "b", {("a", 1): (100, 0.5), ("b", 1): (100, 0.5)})) is None


def test_each_method_is_a_line_over_the_settings(tmp_path):
    groups = grid(tmp_path, TWO)
    plot = robustness_figure(groups).plot
    drawn = [trace for trace in plot.data if trace.showlegend]
    assert [trace.name for trace in drawn] == ["a", "b", "c"] and len(plot.data) == 6
    assert list(drawn[0].y) == pytest.approx([0.395, 0.095]) and list(plot.layout.xaxis.ticktext) == [
        "alpha=0.1",
        "alpha=1.0",
    ]
    keys = [figure.key for figure in outcome_figures(groups, {"alpha=0.1": 0.5, "alpha=1.0": 0.9})]
    assert keys[:2] == ["frontier", "robustness"] and {"bytes", "bytes-1", "loss-1"} <= set(keys)
    page = render([run for group in groups for run in group.runs])
    assert "How it holds over the data settings" in page and page.count("plotly.js v") == 1


def test_many_methods_have_looks_of_their_own(tmp_path):
    groups = grid(tmp_path, {(f"m{k}", 1): (100 + k, 0.5 + k / 100) for k in range(8)}, seeds=1)
    points = [trace for trace in frontier_figures(groups)[0].plot.data if trace.mode == "markers"]
    assert len({(point.marker.color, point.marker.symbol) for point in points}) == 8


def test_clients_stand_by_method_the_worst_served_on_top(tmp_path):
    seeds = [[0.9, 0.5, 0.7], [0.9, 0.6, 0.7]]
    runs = [read_run(make(tmp_path / f"a{s}", [0.5], name="a", seed=s, per_client=row)) for s, row in enumerate(seeds)]
    runs.append(read_run(make(tmp_path / "b", [0.5], name="b", per_client=[0.3, 0.8, None])))
    (table,) = client_tables(methods(runs))
    assert table.heads == [say("head_client"), "a", "b"] and table.more == 0
    assert table.rows == [
        ["client-000", "90.0\u00a0%", "30.0\u00a0%"],
        ["client-001", "55.0\u00a0%", "80.0\u00a0%"],
        ["client-002", "70.0\u00a0%", "\u2013"],
    ]
    assert client_tables(methods([read_run(make(tmp_path / "c", [0.5]))])) == []


def test_fifty_clients_are_shown_and_the_others_counted(tmp_path):
    metric = {"name": "mae", "goal": "min"}
    run = read_run(make(tmp_path / "a", [9.0], metric=metric, per_client=[float(k) for k in range(SHOWN + 7)]))
    (table,) = client_tables(methods([run]))
    assert (len(table.rows), table.more) == (SHOWN, 7) and table.rows[0][:2] == [f"client-0{SHOWN + 6}", f"{SHOWN + 6}"]
    assert "And 7 more." in render([run])


def test_the_tables_are_written_beside_the_page(tmp_path):
    folders = [make(tmp_path / "a", [0.5, 0.9], name=f"a|{EVIL}", per_client=[0.25, 0.75], seed=3)]
    folders.append(make(tmp_path / "b", [0.5, 0.9], name="b", up=50, per_client=[0.5] * 60))
    write_report(folders, tmp_path / "report.html", 0.9, tmp_path / "tables")
    names = sorted(path.name for path in (tmp_path / "tables").iterdir())
    assert names == [f"{name}.{end}" for name in ("clients", "summary", "traffic") for end in ("csv", "md")]
    rows = list(csv.DictReader((tmp_path / "tables" / "summary.csv").read_text().splitlines()))
    assert (rows[1]["name"], float(rows[1]["bytes_to_target"]), float(rows[1]["ratio"])) == ("b", 500, 1.2)
    clients = list(csv.DictReader((tmp_path / "tables" / "clients.csv").read_text().splitlines()))
    assert len(clients) == 62 and clients[0]["accuracy"] == "0.25" and clients[0]["seed"] == "3"
    traffic = list(csv.DictReader((tmp_path / "tables" / "traffic.csv").read_text().splitlines()))
    assert {(row["direction"], row["kind"]) for row in traffic} == {("up", "update"), ("down", "model")}
    text = (tmp_path / "tables" / "summary.md").read_text()
    assert "<script" not in text.replace("\\<", "") and "a\\|" in text
    assert len({line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        write_report(folders, tmp_path / "report.html", 0.9, tmp_path / "file" / "tables")


def test_markdown_holds_what_the_page_holds(tmp_path):
    rows = summary([read_run(make(tmp_path / "a", [0.5, 0.9]))], 0.9)
    table = summary_table(rows, True)
    lines = markdown([table]).splitlines()
    assert lines[0] == "### Summary" and len(lines) == 5 and lines[2].count("|") == len(table.heads) + 1


def test_two_languages_do_not_double_the_figures(tmp_path):
    groups = grid(tmp_path, TWO)
    plots = outcome_figures(groups, {})
    other = sum(len(str(figure.plot.layout.meta["ja"])) for figure in plots if figure.plot is not None)
    assert 0 < other < 0.1 * len(embed(plots)), "titles twice, data once"
