"""Clients held together by duals (ADMM) in a report: how far their copies of the model are apart, and how it settles.

Read from "aggregate" of a line of the record (`aggregation/running.py` says what each value is); runs without duals have
none, and a report without any such run has none of these figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from taciturn.report.plot import Curve, Figure, line_figure, lines
from taciturn.report.read import Run, number
from taciturn.report.tables import Method
from taciturn.report.words import say

HEIGHT = 280
FIGURES = ("consensus", "dual", "lagrangian")


def told(run: Run, value: str) -> Curve:
    """A value of each round that has it; "dual" is rho, which a round tells or else the configuration, times what moved."""
    found = []
    for line in run.rounds:
        aggregate = line.get("aggregate")
        row = aggregate if isinstance(aggregate, Mapping) else {}
        known = number(row.get("moved" if value == "dual" else value))
        factor = number(row.get("rho", _rho(run))) if value == "dual" else 1.0
        if known is not None and factor is not None:
            found.append((int(line["round"]), factor * known, 0.0))
    return found


def _rho(run: Run) -> Any:
    """method.solver.rho of the run's configuration, None where there is none."""
    value: Any = run.header
    for name in ("experiment", "method", "solver", "rho"):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def consensus_figures(groups: Sequence[Method]) -> list[Figure]:
    """The figures of the consensus, in the order of the page; none where no run has them."""
    if not any(told(run, "consensus") for group in groups for run in group.runs):
        return []
    heading = Figure("duals", say("duals"), say("duals_note"), None)
    return [heading, *(_figure(groups, key) for key in FIGURES)]


def _figure(groups: Sequence[Method], key: str) -> Figure:
    traces = lines(groups, lambda run: told(run, key), over_spent=False, value=".3g")
    y: dict[str, Any] = {"title": say(f"{key}_axis")}
    y |= {} if key == "lagrangian" else {"type": "log", "exponentformat": "power"}
    return Figure(key, say(key), say(f"{key}_note"), line_figure(traces, {"title": say("axis_round")}, y, HEIGHT))
