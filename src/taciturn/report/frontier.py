"""What was reached for how much: final error against bytes and simulated time, and how it holds over scenarios.

Symbols: a point is a method in a scenario, mean over seeds with one standard deviation each way. A point is on the Pareto
frontier if no other point of its scenario is at least as good in both and better in one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go

from taciturn.report.figures import bytes_axis, metric_axis
from taciturn.report.plot import (
    DASHES,
    NAME,
    SYMBOLS,
    Figure,
    band,
    bands,
    color_of,
    line_figure,
    shown,
    symbol_of,
    worded,
)
from taciturn.report.read import Run
from taciturn.report.tables import (
    Method,
    by_scenario,
    final_error,
    human_bytes,
    human_seconds,
    is_fraction,
    mean_spread,
    time_unit,
)
from taciturn.report.tables import final as final_metric
from taciturn.report.words import passage, say

GREY = "#8C8C8C"
Point = tuple[Method, float, float, float, float]  # cost, its deviation, value, its deviation


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the (cost, error) on the frontier, by cost: no other costs and errs as little or less, one of them less.

    >>> pareto([(3, 1), (1, 2), (2, 2), (4, 1), (2, 1.5)])
    [1, 4, 0]
    """

    def beaten(cost: float, error: float) -> bool:
        return any(c <= cost and e <= error and (c, e) != (cost, error) for c, e in points)

    return sorted((at for at, point in enumerate(points) if not beaten(*point)), key=lambda at: points[at])


def _points(
    groups: Sequence[Method], cost: Callable[[Run], float | None], value: Callable[[Run], float | None]
) -> list[Point]:
    found = []
    for group in groups:
        x, dx = mean_spread([cost(run) for run in group.runs])
        y, dy = mean_spread([value(run) for run in group.runs])
        if x is not None and y is not None and x > 0:
            found.append((group, x, dx or 0.0, y, dy or 0.0))
    return found


def _value(runs: Sequence[Run]) -> tuple[Callable[[Run], float | None], dict[str, Any], str]:
    """What a method is judged by, its axis, and its format: the final error of a metric in [0, 1], else the metric."""
    if is_fraction(runs):
        return final_error, {"title": say("axis_error"), "tickformat": "~%", "rangemode": "tozero"}, ".2%"
    return final_metric, metric_axis(runs), ".4g"


def frontier_figures(groups: Sequence[Method]) -> list[Figure]:
    """Final error over bytes and over simulated time; none where there are no two methods to compare."""
    runs = [run for group in groups for run in group.runs]
    value, axis, form = _value(runs)
    wire = _points(groups, lambda run: float(run.bytes_up + run.bytes_down), value)
    unit, second = time_unit(max((run.simulated or 0.0 for run in runs), default=0.0))
    timed = _points(groups, lambda run: None if run.simulated is None else run.simulated / second, value)
    found = []
    note = passage(say("frontier_note"), say("frontier_seeds") if bands(groups) else None)
    if len(wire) > 1:
        x = bytes_axis(min(x - min(dx, x / 2) for _, x, dx, *_ in wire), max(x + dx for _, x, dx, *_ in wire))
        found.append(Figure("frontier", say("frontier_bytes"), note, _frontier(wire, x, axis, form, human_bytes)))
    if len(timed) > 1:
        x = {"title": say("axis_time", unit=unit), "rangemode": "tozero"}
        plot = _frontier(timed, x, axis, form, lambda spent: human_seconds(spent * second))
        found.append(Figure("frontier-time", say("frontier_time"), note, plot))
    return found


def _frontier(
    points: Sequence[Point], x: dict[str, Any], y: dict[str, Any], form: str, read: Callable[[float], str]
) -> Any:
    traces: list[Any] = []
    scenarios = list(dict.fromkeys(group.scenario for group, *_ in points))
    for place, scenario in enumerate(scenarios):
        mine = [point for point in points if point[0].scenario == scenario]
        sign = -1 if mine[0][0].runs[0].goal == "max" and form != ".2%" else 1
        order = pareto([(cost, sign * value) for _, cost, _, value, _ in mine])
        traces.append(
            go.Scatter(
                x=[mine[at][1] for at in order],
                y=[mine[at][3] for at in order],
                **worded(say("frontier_of", scenario=scenario) if scenario else say("frontier_line"), ""),
                hoverinfo="skip",
                showlegend=True,
                mode="lines+markers" if scenario else "lines",
                line={"color": GREY, "width": 1.4, "shape": "hv", "dash": DASHES[(place + 1) % len(DASHES)]},
                marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 8, "color": GREY},
            )
        )
    said: set[str] = set()
    for group, cost, dx, value, dy in points:
        traces.append(
            go.Scatter(
                x=[cost],
                y=[value],
                error_x=_bar([dx], [min(dx, cost / 2)], group),
                error_y=_bar([dy], [dy], group),
                **worded(
                    group.short, f"{NAME}{shown(group.scenario).en}<br>%{{y:{form}}}<br>%{{customdata}}<extra></extra>"
                ),
                customdata=[read(cost)],
                legendgroup=str(group.place),
                showlegend=group.short not in said,
                mode="markers",
                marker={"color": color_of(group), "size": 11, "symbol": symbol_of(group, scenarios.index(group.scenario))},
            )
        )
        said.add(group.short)
    return line_figure(traces, x, y)


def _bar(up: Sequence[float], down: Sequence[float], group: Method) -> dict[str, Any]:
    both = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "visible": any(up)}
    return both | {"color": color_of(group), "thickness": 1.4, "width": 4}


def robustness_figure(groups: Sequence[Method]) -> Figure | None:
    """Final error of each method over the scenarios; None unless a method was run in several."""
    tables = by_scenario(groups)
    if len(tables) < 2 or len({group.short for group in groups}) == len(groups):
        return None
    value, axis, form = _value([run for group in groups for run in group.runs])
    traces: list[Any] = []
    for name in dict.fromkeys(group.short for group in groups):
        mine = [group for group in groups if group.short == name]
        seen = [(list(tables).index(g.scenario), *mean_spread([value(run) for run in g.runs])) for g in mine]
        line = [(at, middle, spread or 0.0) for at, middle, spread in seen if middle is not None]
        x, y, spread = ([point[place] for point in line] for place in range(3))
        if any(spread):
            traces.append(band(x, y, spread, color_of(mine[0]), str(mine[0].place)))
        traces.append(
            go.Scatter(
                x=x,
                y=y,
                **worded(name, f"{NAME}%{{y:{form}}} (%{{customdata}})<extra></extra>"),
                customdata=[shown(list(tables)[int(at)]).en for at in x],
                legendgroup=str(mine[0].place),
                showlegend=True,
                mode="lines+markers",
                line={"color": color_of(mine[0]), "dash": DASHES[mine[0].place % len(DASHES)], "width": 2.2},
                marker={"size": 8, "symbol": symbol_of(mine[0])},
            )
        )
    ticks = {"tickvals": list(range(len(tables))), "ticktext": [shown(name, 16).en for name in tables]}
    x_axis = {"title": say("axis_scenario"), **ticks, "range": [-0.3, len(tables) - 0.7]}
    return Figure(
        "robustness", say("robustness"), passage(say("robustness_note"), bands(groups)), line_figure(traces, x_axis, axis)
    )
