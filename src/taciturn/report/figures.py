"""The figures of every report, as plotly figures: the metric, the traffic, the clients, the loss.

Bytes have SI units: 1 kB = 1000 B.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go

from taciturn.report.plot import (
    COLORS,
    NAME,
    Curve,
    Figure,
    annotate,
    bands,
    color_of,
    layout,
    line_figure,
    lines,
    row_height,
    rows_axis,
    text,
    worded,
)
from taciturn.report.read import Run, number
from taciturn.report.tables import (
    Method,
    by_kind,
    by_scenario,
    clients_of,
    curve,
    human_bytes,
    is_fraction,
    time_curve,
    time_unit,
)
from taciturn.report.words import Text, Words, known, passage, say

KINDS = ("model", "update", "stats", "monitor", "plan", "setup", "evaluate")
DIGITS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)  # of the ticks of a short logarithmic axis
SCENARIOS = 4  # with figures and tables of their own


def _title(metric: str, key: str) -> Words:
    name = known("metric", metric)
    name = name if isinstance(name, Words) else Words(metric, metric)
    return say(key, metric=Words(f"{name.en[:1].upper()}{name.en[1:]}", name.ja))


def within(groups: Sequence[Method]) -> list[Method]:
    """The methods of one scenario, named without it."""
    return [replace(group, label=group.short) for group in groups]


def of_scenario(title: Words, scenario: str) -> Words:
    """A title with the scenario where there is one."""
    return say("title_of_scenario", title=title, scenario=scenario) if scenario else title


def bytes_axis(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis with ticks at 1, 2 and 5 times powers of ten, at more or fewer where it is short or long."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    step = -(-len(decades) // 8)
    steps = DIGITS if high < 5 * low else (1, 2, 5) if high < 300 * low else (1,)
    every = [float(digit * 10.0**power) for power in decades[::step] for digit in steps]
    ticks = [tick for tick in every if low / 1.2 <= tick <= high * 1.2]
    return {
        "title": say("axis_bytes"),
        "type": "log",
        "range": [math.log10(low) - 0.05, math.log10(high) + 0.05],
        "tickvals": ticks,
        "ticktext": [human_bytes(tick) for tick in ticks],
    }


def metric_axis(runs: Sequence[Run]) -> dict[str, Any]:
    """The axis of the metric: percent where it is a fraction, else which way is better."""
    name = known("metric", runs[0].metric)
    if is_fraction(runs):
        return {"title": say("axis_percent", name=_safe(name)), "tickformat": "~%"}
    return {"title": say("axis_higher" if runs[0].goal == "max" else "axis_lower", name=_safe(name))}


def _safe(name: Text) -> Text:
    return name if isinstance(name, Words) else text(name)


def _add_target(figure: Any, target: float, runs: Sequence[Run]) -> None:
    value = f"{100 * target:.1f} %" if is_fraction(runs) else f"{target:.4g}"
    corner = "top left" if runs[0].goal == "max" else "bottom left"
    annotate(figure, say("target_line", value=value), y=target, annotation_position=corner)


def metric_figures(groups: Sequence[Method], target: float | None, place: int = 0) -> list[Figure]:
    """The metric over rounds, over cumulative bytes up + down (logarithmic axis), over simulated time; the target.

    groups: of one scenario, the one with this place.
    """
    runs, mine = [run for group in groups for run in group.runs], within(groups)
    value = ".2%" if is_fraction(runs) else ".4g"
    rounds = lines(mine, lambda run: list(curve(run)), over_spent=False, value=value)
    wire = lines(mine, lambda run: [point for point in curve(run) if point[2] > 0], over_spent=True, value=value)
    unit, second = time_unit(max((run.simulated or 0.0 for run in runs), default=0.0))

    def timed(run: Run) -> Curve:
        return [(at, known, seconds / second) for at, known, seconds in time_curve(run)]

    times = lines(mine, timed, over_spent=True, value=value, spent=lambda spent: f"{spent:.3g} {unit}")
    axis, spent = metric_axis(runs), [count for trace in wire for count in trace.x]
    plots = [
        line_figure(rounds, {"title": say("axis_round")}, axis) if rounds else None,
        line_figure(wire, bytes_axis(min(spent), max(spent)), axis) if wire else None,
        line_figure(times, {"title": say("axis_time", unit=unit), "rangemode": "tozero"}, axis) if times else None,
    ]
    notes = [passage(say(f"metric_over_{what}_note"), bands(groups)) for what in ("rounds", "bytes", "time")]
    if not wire:
        notes[1] = say("no_byte")
    if not rounds:
        notes = [say("not_evaluated")] * 3
    for plot in plots:
        if plot is not None and target is not None:
            _add_target(plot, target, runs)
    keys = ("rounds", "bytes", "time") if times else ("rounds", "bytes")  # old records have no simulated time
    titles = [of_scenario(_title(runs[0].metric, f"metric_over_{key}"), groups[0].scenario) for key in keys]
    names = [key + (f"-{place}" if place else "") for key in keys]
    return [Figure(*row) for row in zip(names, titles, notes, plots, strict=False)]


def loss_figure(groups: Sequence[Method], place: int = 0) -> Figure:
    """The mean training loss of the cohort over rounds, in one scenario."""

    def points(run: Run) -> Curve:
        values = [(line["round"], number(line.get("loss")), line["bytes_up"] + line["bytes_down"]) for line in run.rounds]
        return [(at, value, count) for at, value, count in values if value is not None]

    key, title = f"loss-{place}" if place else "loss", of_scenario(say("loss"), groups[0].scenario)
    traces = lines(within(groups), points, over_spent=False, value=".4g")
    if not traces:
        return Figure(key, title, say("no_loss"), None)
    plot = line_figure(traces, {"title": say("axis_round")}, {"title": say("axis_loss")})
    return Figure(key, title, say("loss_note"), plot)


def traffic_figure(groups: Sequence[Method]) -> Figure:
    """Bytes by direction and kind: one bar a method and direction, payload by kind, then the frames of all kinds."""
    title, totals = say("traffic"), _totals(groups)
    if not totals:
        return Figure("traffic", title, say("no_traffic"), None)
    seen = {what for bar in totals.values() for what in bar}
    kinds = [kind for kind in KINDS if kind in seen] + sorted(seen - {*KINDS, "frames"})
    bars = sorted(totals, key=lambda bar: (bar[0], bar[1] != "up", bar[1]))
    labels = [say("way_of", name=groups[at].label, way=known("way", direction)) for at, direction in bars]
    names = [say("payload_of", kind=known("kind", kind)) for kind in kinds] + [say("frames")]
    traces = []
    for index, (kind, name) in enumerate(zip([*kinds, "frames"], names, strict=True)):
        x = [totals[bar].get(kind, 0) for bar in bars]
        color = COLORS[-1] if kind == "frames" else COLORS[index % (len(COLORS) - 1)]
        traces.append(
            go.Bar(
                x=x,
                y=list(range(len(bars))),
                **worded(name, f"{NAME}%{{customdata[0]}}<br>%{{customdata[1]}}<extra></extra>"),
                showlegend=True,
                orientation="h",
                marker={
                    "color": color,
                    "pattern": {"shape": "/" if kind == "frames" else "x" if index >= len(COLORS) - 1 else ""},
                },
                customdata=[[text(label.en), human_bytes(count)] for label, count in zip(labels, x, strict=True)],
            )
        )
    x_axis = {"tickformat": "~s", "ticksuffix": "B", "rangemode": "tozero", "nticks": 5, "tickangle": 0}
    x_axis, y_axis = x_axis | {"title": say("axis_bytes")}, rows_axis(labels)
    plot = line_figure(traces, x_axis, y_axis, 130 + row_height(y_axis, 10 if len(bars) > 8 else 18))
    plot.update_layout(barmode="stack", bargap=0.3)
    several = any(len(group.runs) > 1 for group in groups)
    many = say("mean_over_seeds") if several else None
    return Figure(
        "traffic", title, passage(say("traffic_note"), many, say("evaluate_note") if "evaluate" in seen else None), plot
    )


def _totals(groups: Sequence[Method]) -> dict[tuple[int, str], dict[str, float]]:
    """(place of the method, direction) -> kind -> payload, and the "frames" of all kinds; bytes, means over seeds."""
    totals: dict[tuple[int, str], dict[str, float]] = {}
    for index, group in enumerate(groups):
        for run in group.runs:
            for kind, counts in by_kind(run).items():
                direction, _, what = kind.partition("/")
                bar = totals.setdefault((index, direction), {})
                bar[what] = bar.get(what, 0) + counts["payload"] / len(group.runs)
                bar["frames"] = bar.get("frames", 0) + counts["frame"] / len(group.runs)
    return totals


def spread_figure(groups: Sequence[Method]) -> Figure:
    """The metric of each client in the last per-client evaluation, as a box and points a method."""
    runs = [run for group in groups for run in group.runs]
    title, value = _title(runs[0].metric, "metric_of_clients"), ".2%" if is_fraction(runs) else ".4g"
    pairs_of = [(group, [pair for run in group.runs for pair in clients_of(run)]) for group in groups]
    boxes = [(group, pairs) for group, pairs in pairs_of if pairs]
    traces = []
    for row, (group, pairs) in enumerate(boxes):
        traces.append(
            go.Box(
                x=[value for _, value in pairs],
                y=[row] * len(pairs),
                width=0.6,
                orientation="h",
                name=text(group.label),
                text=[text(client) for client, _ in pairs],
                boxpoints="all" if len(pairs) <= 300 else "outliers",
                jitter=0.5,
                pointpos=0,
                marker={"color": color_of(group), "size": 4, "opacity": 0.6},
                line={"width": 1.6},
                hovertemplate=f"{NAME}%{{text}}<br>%{{x:{value}}}<extra></extra>",
            )
        )
    if not traces:
        return Figure("clients", title, say("not_by_client"), None)
    y = rows_axis([group.label for group, _ in boxes])
    plot = go.Figure(traces, layout(metric_axis(runs), y, [], height=130 + row_height(y, 20)) | {"showlegend": False})
    pooled = say("pooled") if any(len(group.runs) > 1 for group in groups) else None
    return Figure("clients", title, passage(say("boxes"), pooled), plot)


def figures(groups: Sequence[Method], targets: Mapping[str, float | None]) -> list[Figure]:
    """The figures that every report has, in the order of the page; targets: of each scenario."""
    tables = list(by_scenario(groups).items())[:SCENARIOS]
    curves = [metric_figures(mine, targets.get(scenario), place) for place, (scenario, mine) in enumerate(tables)]
    losses = [loss_figure(mine, place) for place, (_, mine) in enumerate(tables)]
    return [*itertools.chain(*curves), traffic_figure(groups), spread_figure(groups), *losses]
