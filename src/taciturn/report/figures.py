"""The figures of every report, as plotly figures: the metric, the traffic, the clients, the loss.

Bytes have SI units: 1 kB = 1000 B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from taciturn.report.plot import COLORS, NAME, Curve, Figure, layout, line_figure, lines, rows_axis, text
from taciturn.report.read import Run, number
from taciturn.report.tables import Method, by_kind, clients_of, curve, human_bytes, is_fraction, time_curve, time_unit

KINDS = ("model", "update", "stats", "monitor", "setup", "evaluate")


def _title(metric: str, rest: str) -> str:
    return f"{metric[:1].upper()}{metric[1:]} {rest}"


def _log_bytes_axis(title: str, traces: Sequence[Any]) -> dict[str, Any]:
    """A logarithmic axis with ticks at 1, 2 and 5 times powers of ten, or at fewer where they would crowd."""
    counts = [count for trace in traces for count in trace.x]
    low, high = min(counts), max(counts)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    step = -(-len(decades) // 8)
    steps = (1, 2, 5) if high < 300 * low else (1,)
    ticks = [digit * 10.0**power for power in decades[::step] for digit in steps]
    return {
        "title": {"text": f"{title} (1 kB = 1000 B)"},
        "type": "log",
        "range": [math.log10(low) - 0.05, math.log10(high) + 0.05],
        "tickvals": ticks,
        "ticktext": [human_bytes(tick) for tick in ticks],
    }


def _metric_axis(runs: Sequence[Run]) -> dict[str, Any]:
    name = text(runs[0].metric)
    if is_fraction(runs):
        return {"title": {"text": f"{name} (%)"}, "tickformat": "~%"}
    better = "higher" if runs[0].goal == "max" else "lower"
    return {"title": {"text": f"{name} ({better} is better)"}}


def _add_target(figure: Any, target: float, runs: Sequence[Run]) -> None:
    label = f"target {100 * target:.1f} %" if is_fraction(runs) else f"target {target:.4g}"
    corner = "top left" if runs[0].goal == "max" else "bottom left"
    line = {"line_dash": "dot", "line_width": 1.5, "line_color": "#888888"}
    figure.add_hline(y=target, **line, annotation_text=label, annotation_position=corner)


def metric_figures(groups: Sequence[Method], target: float | None) -> list[Figure]:
    """The metric over rounds, over cumulative bytes up + down (logarithmic axis), over simulated time; the target."""
    runs = [run for group in groups for run in group.runs]
    value = ".2%" if is_fraction(runs) else ".4g"
    several = any(len(group.runs) > 1 for group in groups)
    band = " Bands: one standard deviation over seeds." if several else ""
    rounds = lines(groups, lambda run: list(curve(run)), over_spent=False, value=value)
    wire = lines(groups, lambda run: [point for point in curve(run) if point[2] > 0], over_spent=True, value=value)
    unit, second = time_unit(max((run.simulated or 0.0 for run in runs), default=0.0))

    def timed(run: Run) -> Curve:
        return [(at, known, seconds / second) for at, known, seconds in time_curve(run)]

    times = lines(groups, timed, over_spent=True, value=value, spent=lambda spent: f"{spent:.3g} {unit}")
    plots = [
        line_figure(rounds, {"title": {"text": "communication round"}}, _metric_axis(runs)) if rounds else None,
        line_figure(wire, _log_bytes_axis("bytes", wire), _metric_axis(runs)) if wire else None,
        line_figure(times, {"title": {"text": f"simulated time ({unit})"}, "rangemode": "tozero"}, _metric_axis(runs))
        if times
        else None,
    ]
    notes = [
        f"Each point is an evaluated round.{band}",
        f"Bytes on the line, up and down, until that round; without evaluation. Logarithmic axis.{band}",
        f"Seconds that the rounds until then take on the fleet's devices and lines, from steps and bytes.{band}",
    ]
    if not wire:
        notes[1] = "No run sent a byte."
    if not rounds:
        notes = ["No run was evaluated."] * 3
    for plot in plots:
        if plot is not None and target is not None:
            _add_target(plot, target, runs)
    shown = ("rounds", "bytes", "time") if times else ("rounds", "bytes")  # old records have no simulated time
    titles = [_title(runs[0].metric, f"over {'simulated time' if key == 'time' else key}") for key in shown]
    return [Figure(*row) for row in zip(shown, titles, notes, plots, strict=False)]


def loss_figure(groups: Sequence[Method]) -> Figure:
    """The mean training loss of the cohort over rounds."""

    def points(run: Run) -> Curve:
        values = [(line["round"], number(line.get("loss")), line["bytes_up"] + line["bytes_down"]) for line in run.rounds]
        return [(at, value, count) for at, value, count in values if value is not None]

    traces = lines(groups, points, over_spent=False, value=".4g")
    if not traces:
        return Figure("loss", "Training loss over rounds", "No run recorded a training loss.", None)
    y = {"title": {"text": "mean training loss (unit of the loss)"}}
    plot = line_figure(traces, {"title": {"text": "communication round"}}, y)
    return Figure("loss", "Training loss over rounds", "Mean over the clients of each round's cohort.", plot)


def traffic_figure(groups: Sequence[Method]) -> Figure:
    """Bytes by direction and kind: one bar a method and direction, payload by kind, then the frames of all kinds."""
    title = "Bytes by direction and kind"
    totals: dict[tuple[int, str], dict[str, float]] = {}
    for index, group in enumerate(groups):
        for run in group.runs:
            for kind, counts in by_kind(run).items():
                direction, _, what = kind.partition("/")
                bar = totals.setdefault((index, direction), {})
                bar[what] = bar.get(what, 0) + counts["payload"] / len(group.runs)
                bar["frames"] = bar.get("frames", 0) + counts["frame"] / len(group.runs)
    if not totals:
        return Figure("traffic", title, "No run recorded its traffic by kind.", None)
    seen = {what for bar in totals.values() for what in bar}
    kinds = [kind for kind in KINDS if kind in seen] + sorted(seen - {*KINDS, "frames"})
    bars = sorted(totals, key=lambda bar: (bar[0], bar[1] != "up", bar[1]))
    labels = [f"{groups[index].label}, {direction}" for index, direction in bars]
    names = [f"payload: {text(kind)}" for kind in kinds] + ["frames (headers, checksums)"]
    traces = []
    for index, (kind, name) in enumerate(zip([*kinds, "frames"], names, strict=True)):
        x = [totals[bar].get(kind, 0) for bar in bars]
        color = COLORS[-1] if kind == "frames" else COLORS[index % (len(COLORS) - 1)]
        traces.append(
            go.Bar(
                x=x,
                y=list(range(len(bars))),
                name=name,
                orientation="h",
                marker={"color": color, "pattern": {"shape": "/" if kind == "frames" else ""}},
                customdata=[[text(label), human_bytes(count)] for label, count in zip(labels, x, strict=True)],
                hovertemplate=f"{NAME}%{{customdata[0]}}<br>%{{customdata[1]}}<extra></extra>",
            )
        )
    x_axis = {"tickformat": "~s", "ticksuffix": "B", "rangemode": "tozero", "nticks": 5, "tickangle": 0}
    x_axis |= {"title": {"text": "bytes (1 kB = 1000 B)"}}
    look = layout(x_axis, rows_axis(labels), names, height=130 + 52 * len(bars))
    plot = go.Figure(traces, look | {"barmode": "stack", "bargap": 0.3})
    many = " Mean over seeds." if any(len(group.runs) > 1 for group in groups) else ""
    many += " Evaluation is shown here, but no total and no target counts it." if "evaluate" in seen else ""
    caption = f"Whole run; payload by kind, then the frames (headers, checksums) of all kinds. Exact counts below.{many}"
    return Figure("traffic", title, caption, plot)


def spread_figure(groups: Sequence[Method]) -> Figure:
    """The metric of each client in the last per-client evaluation, as a box and points a method."""
    runs = [run for group in groups for run in group.runs]
    title, value = _title(runs[0].metric, "of each client"), ".2%" if is_fraction(runs) else ".4g"
    pairs_of = {group.label: [pair for run in group.runs for pair in clients_of(run)] for group in groups}
    shown = [(index, group.label) for index, group in enumerate(groups) if pairs_of[group.label]]
    traces = []
    for row, (index, label) in enumerate(shown):
        pairs = pairs_of[label]
        traces.append(
            go.Box(
                x=[value for _, value in pairs],
                y=[row] * len(pairs),
                width=0.6,
                orientation="h",
                name=text(label),
                text=[text(client) for client, _ in pairs],
                boxpoints="all" if len(pairs) <= 300 else "outliers",
                jitter=0.5,
                pointpos=0,
                marker={"color": COLORS[index % len(COLORS)], "size": 4, "opacity": 0.6},
                line={"width": 1.6},
                hovertemplate=f"{NAME}%{{text}}<br>%{{x:{value}}}<extra></extra>",
            )
        )
    if not traces:
        return Figure("clients", title, "No run was evaluated client by client.", None)
    axes = _metric_axis(runs), rows_axis([label for _, label in shown])
    plot = go.Figure(traces, layout(*axes, [], height=130 + 70 * len(shown)) | {"showlegend": False})
    caption = "Last per-client evaluation of each run: box from the first to the third quartile, line at the median."
    pooled = " Clients of all seeds together." if any(len(group.runs) > 1 for group in groups) else ""
    return Figure("clients", title, caption + pooled, plot)


def figures(groups: Sequence[Method], target: float | None) -> list[Figure]:
    """The figures that every report has, in the order of the page."""
    return [*metric_figures(groups, target), traffic_figure(groups), spread_figure(groups), loss_figure(groups)]
