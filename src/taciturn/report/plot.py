"""What the figures of a report share: looks, names, axes, and lines with a band over seeds.

Figures have no fixed colors for text and background: the page's CSS sets those. Colors are those of Okabe and Ito (distinct
for color-blind readers; black and yellow vanish on a dark or a light page and are left out); lines also differ in dash.
Names are escaped, because plotly reads markup in text.
"""

from __future__ import annotations

import html
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from taciturn.report.read import Run
from taciturn.report.tables import Method, human_bytes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKED = 40  # lines with more points are drawn without markers
NAME = "<b>%{fullData.name}</b><br>"

Curve = list[tuple[int, float, float]]  # (round, value, what was spent: bytes, or simulated time)


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure with its heading and caption; `plot` is None where no run has the data, and the caption says so."""

    key: str
    title: str
    caption: str
    plot: Any | None


def text(label: str, width: int = 36) -> str:
    """A name as plotly text of up to three lines of `width` letters, shown as it is: markup in it stays letters."""
    return "<br>".join(html.escape(line, quote=False) for line in _wrap(label, width))


def _wrap(label: str, width: int) -> list[str]:
    return textwrap.wrap(label, width, max_lines=3, placeholder=" \u2026") or [label]


def layout(x: dict[str, Any], y: dict[str, Any], names: Sequence[str], height: int = 380) -> dict[str, Any]:
    """Axes, and a legend of `names` below the plot; `meta` tells the page how much room the legend needs."""
    parts = [name.split("<br>") for name in names]
    room = {"longest": max((len(part) for each in parts for part in each), default=0), "items": len(names)}
    room |= {"height": height, "lines": max(map(len, parts), default=0)}
    axis = {
        "automargin": True,
        "gridcolor": "rgba(128,128,128,0.25)",
        "zeroline": False,
        "showline": True,
        "linecolor": "#888",
    }
    return {
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "margin": {"l": 20, "r": 16, "t": 32, "b": 20},
        "xaxis": axis | x,
        "yaxis": axis | y,
        "legend": {
            "orientation": "h",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "x": 0,
            "traceorder": "normal",
        },
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#888888", "activecolor": "#888888"},
        "meta": room,
    }


def rows_axis(labels: Sequence[str]) -> dict[str, Any]:
    """Rows from the top, at 0, 1, ...: names that look like numbers or dates stay names."""
    ticks = [text(label, 20) for label in labels]
    return {
        "tickvals": list(range(len(ticks))),
        "ticktext": ticks,
        "range": [len(ticks) - 0.5, -0.5],
        "showgrid": False,
    }


def faded(color: str) -> str:
    """The color of a band around a line of this color."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.2)"


def _mean(curves: Sequence[Curve]) -> tuple[Curve, list[float]]:
    """The mean over seeds and its sample standard deviation, in the rounds that every seed has."""
    tables = [{at: (value, count) for at, value, count in points} for points in curves]
    shared = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    mean, spread = [], []
    for at in shared:
        values = [table[at][0] for table in tables]
        mean.append((at, statistics.fmean(values), statistics.fmean(table[at][1] for table in tables)))
        spread.append(statistics.stdev(values) if len(values) > 1 else 0.0)
    return mean, spread


def lines(
    groups: Sequence[Method],
    points_of: Callable[[Run], Curve],
    over_spent: bool,
    value: str,
    spent: Callable[[float], str] = human_bytes,
) -> list[Any]:
    """One line a method over rounds or what was spent, with a band of one standard deviation where there are several seeds.

    spent: how that number reads.
    """
    traces = []
    for index, group in enumerate(groups):
        mean, spread = _mean([points_of(run) for run in group.runs])
        if not mean:
            continue
        color, several = COLORS[index % len(COLORS)], len(group.runs) > 1
        x = [count if over_spent else at for at, _, count in mean]
        y = [middle for _, middle, _ in mean]
        if several:
            upper = [middle + half for middle, half in zip(y, spread, strict=True)]
            lower = [middle - half for middle, half in zip(y, spread, strict=True)]
            band = {"x": x + x[::-1], "y": upper + lower[::-1], "fill": "toself", "fillcolor": faded(color)}
            quiet = {"hoverinfo": "skip", "showlegend": False, "legendgroup": str(index), "mode": "lines"}
            traces.append(go.Scatter(**band, **quiet, line={"width": 0}))
        seeds = f" ({len(group.runs)} seeds)" if several else ""
        traces.append(
            go.Scatter(
                x=x,
                y=y,
                name=text(group.label + seeds),
                legendgroup=str(index),
                showlegend=True,
                mode="lines+markers" if len(mean) <= MARKED else "lines",
                line={"color": color, "dash": DASHES[index % len(DASHES)], "width": 2.2},
                marker={"size": 5},
                customdata=[[at, spent(count)] for at, _, count in mean],
                hovertemplate=f"{NAME}%{{y:{value}}}<br>round %{{customdata[0]}}, %{{customdata[1]}}<extra></extra>",
            )
        )
    return traces


def line_figure(traces: list[Any], x: dict[str, Any], y: dict[str, Any]) -> Any:
    """The lines between their axes, with a legend."""
    return go.Figure(traces, layout(x, y, [str(trace.name) for trace in traces if trace.showlegend]))
