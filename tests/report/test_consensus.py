"""ADMM in a report: numbers by hand, records with holes, and pages without it that stay as they were."""

from __future__ import annotations

import math

import pytest

from report.folders import make
from taciturn.report import read_run
from taciturn.report.consensus import consensus_figures, told
from taciturn.report.page import embed, render
from taciturn.report.tables import methods

ROW = {"consensus": 0.5, "moved": 0.25, "lagrangian": 2.0}


def run_of(folder, *aggregate, **header):
    return read_run(make(folder, [0.5] * len(aggregate), aggregate=aggregate, **header))


def test_a_report_without_duals_has_none_of_it(tmp_path):
    runs = [
        run_of(tmp_path / "old", None, None),
        run_of(tmp_path / "other", {"kept": 3.0}, {"a": {"product": 1.0}}, name="b"),
    ]
    assert consensus_figures(methods(runs)) == [] and "What holds the clients together" not in render(runs)


def test_the_dual_residual_takes_rho_of_the_round_or_else_of_the_configuration(tmp_path):
    solver = {"experiment": {"method": {"solver": {"name": "admm", "rho": 0.2}}}}
    run = run_of(tmp_path / "a", ROW, ROW | {"rho": 4.0}, {"moved": math.nan}, None, **solver)
    assert told(run, "dual") == [(1, pytest.approx(0.05), 0.0), (2, pytest.approx(1.0), 0.0)]
    assert told(run, "lagrangian") == [(1, 2.0, 0.0), (2, 2.0, 0.0)]
    assert told(run_of(tmp_path / "b", ROW), "dual") == [], "no rho, no residual"


def test_the_page_shows_three_figures(tmp_path):
    solver = {"experiment": {"method": {"solver": {"rho": 0.2}}}}
    runs = [run_of(tmp_path / "a", ROW, ROW, **solver), run_of(tmp_path / "b", None, None, name="mean")]
    found = consensus_figures(methods(runs))
    assert [figure.key for figure in found] == ["duals", "consensus", "dual", "lagrangian"]
    assert [figure.plot.layout.yaxis.type for figure in found[1:]] == ["log", "log", None]
    assert all(len(figure.plot.data) == 1 for figure in found[1:])
    assert embed(found) and "What holds the clients together" in render(runs)
