"""What the figures of a report share: looks, names in two languages, axes, and lines with a band over seeds.

A figure holds English; what reads otherwise in Japanese stands beside it, under "ja" in the `meta` of a trace or of the
layout: path -> text ("xaxis.title.text"). The page puts it in when the language is switched, so data are there once.

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
from unicodedata import east_asian_width

import plotly.graph_objects as go

from taciturn.report.read import Run
from taciturn.report.tables import Method, human_bytes
from taciturn.report.words import Text, Words, plain, say

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")
GUIDE = {"line_dash": "dot", "line_width": 1.5, "line_color": "#888888"}  # of lines that are no data
MARKED = 40  # lines with more points are drawn without markers
NAME = "<b>%{fullData.name}</b><br>"

Curve = list[tuple[int, float, float]]  # (round, value, what was spent: bytes, or simulated time)


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure with its heading and caption; `plot` is None where no run has the data, and the caption says so."""

    key: str
    title: Words
    caption: Words
    plot: Any | None


def text(label: str, width: int = 36) -> str:
    """A name as plotly text of up to three lines of `width` letters, shown as it is: markup in it stays letters."""
    return "<br>".join(html.escape(line, quote=False) for line in _wrap(label, width))


def _wrap(label: str, width: int) -> list[str]:
    return textwrap.wrap(label, width, max_lines=3, placeholder=" \u2026") or [label]


def shown(label: Text, width: int = 36) -> Words:
    """The same of words, in each language."""
    words = plain(label) if isinstance(label, str) else label
    return Words(text(words.en, width), text(words.ja, width))


def worded(name: Text, hover: Text) -> dict[str, Any]:
    """The name of a trace (escaped here) and its hover template: English, and Japanese in "meta" where it differs."""
    pairs = {"name": shown(name), "hovertemplate": plain(hover) if isinstance(hover, str) else hover}
    found: dict[str, Any] = {key: words.en for key, words in pairs.items()}
    other = {key: words.ja for key, words in pairs.items() if words.ja != words.en}
    return found | ({"meta": {"ja": other}} if other else {})


def color_of(group: Method) -> str:
    """A method has one color in every figure and scenario."""
    return COLORS[group.place % len(COLORS)]


def symbol_of(group: Method, scenario: int = 0) -> str:
    """A marker for the scenario; open for methods beyond the number of colors."""
    return SYMBOLS[scenario % len(SYMBOLS)] + ("-open" if group.place // len(COLORS) % 2 else "")


def first_seed(groups: Sequence[Method]) -> Words | None:
    """That only the first seed is shown, where there are several."""
    return say("first_seed") if any(len(group.runs) > 1 for group in groups) else None


def _columns(line: str) -> int:
    """Width of a text in letters: Japanese ones are twice as wide."""
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in html.unescape(line))


def layout(x: dict[str, Any], y: dict[str, Any], names: Sequence[Text], height: int = 380) -> dict[str, Any]:
    """Axes with a title (Words), and a legend of `names` below the plot, escaped already; `meta` tells the page how much
    room the legend needs, and what reads otherwise in Japanese.
    """
    rows = [_room(names, language) for language in ("en", "ja")]
    room: dict[str, Any] = {key: max(row[key] for row in rows) for key in rows[0]} | {"items": len(names), "height": height}
    room["ja"] = _japanese("xaxis", x) | _japanese("yaxis", y)
    x, y = _english(x), _english(y)
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


def _room(names: Sequence[Text], language: str) -> dict[str, int]:
    parts = [(name.of(language) if isinstance(name, Words) else name).split("<br>") for name in names]
    longest = max((_columns(part) for each in parts for part in each), default=0)
    return {"longest": longest, "lines": max(map(len, parts), default=0)}


def _english(axis: dict[str, Any]) -> dict[str, Any]:
    title = {"title": {"text": axis["title"].en}} if "title" in axis else {}
    return {key: value for key, value in axis.items() if key != "ja"} | title


def _japanese(name: str, axis: dict[str, Any]) -> dict[str, Any]:
    title = {f"{name}.title.text": axis["title"].ja} if "title" in axis else {}
    return title | (
        {f"{name}.ticktext": axis["ja"]} if axis.get("ja", axis.get("ticktext")) != axis.get("ticktext") else {}
    )


def rows_axis(labels: Sequence[Text]) -> dict[str, Any]:
    """Rows from the top, at 0, 1, ...: names that look like numbers or dates stay names."""
    ticks = [shown(label, 20) for label in labels]
    return {
        "tickvals": list(range(len(ticks))),
        "ticktext": [tick.en for tick in ticks],
        "ja": [tick.ja for tick in ticks],
        "range": [len(ticks) - 0.5, -0.5],
        "showgrid": False,
    }


def row_height(axis: dict[str, Any], space: int) -> int:
    """Pixels of all rows of an axis: `space`, and 17 for a line of the longest label."""
    ticks: list[str] = axis["ticktext"]
    return len(ticks) * (space + 17 * max(1 + tick.count("<br>") for tick in ticks))


def annotate(figure: Any, words: Words, **where: Any) -> None:
    """A guide line with words: `where` goes to `add_hline`."""
    place = len(figure.layout.annotations)
    figure.add_hline(**where, **GUIDE, annotation_text=text(words.en))
    meta = figure.layout.meta
    figure.layout.meta = meta | {"ja": meta["ja"] | {f"annotations.{place}.text": text(words.ja)}}


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
        x = [count if over_spent else at for at, _, count in mean]
        y = [middle for _, middle, _ in mean]
        if len(group.runs) > 1:
            traces.append(band(x, y, spread, color_of(group), str(index)))
        traces.append(
            go.Scatter(
                x=x,
                y=y,
                **worded(seeded(group), say("hover_round", name=NAME, y=f"%{{y:{value}}}", round="%{customdata[0]}")),
                legendgroup=str(index),
                showlegend=True,
                mode="lines+markers" if len(mean) <= MARKED else "lines",
                line={"color": color_of(group), "dash": DASHES[group.place % len(DASHES)], "width": 2.2},
                marker={"size": 5},
                customdata=[[at, spent(count)] for at, _, count in mean],
            )
        )
    return traces


def seeded(group: Method) -> Words:
    """The method's name, with the number of its seeds where there are several."""
    return say("n_seeds", name=group.label, n=len(group.runs)) if len(group.runs) > 1 else plain(group.label)


def band(x: Sequence[Any], y: Sequence[float], spread: Sequence[float], color: str, group: str) -> Any:
    """The area of one standard deviation around a line."""
    upper = [middle + half for middle, half in zip(y, spread, strict=True)]
    lower = [middle - half for middle, half in zip(y, spread, strict=True)]
    quiet = {"hoverinfo": "skip", "showlegend": False, "legendgroup": group, "mode": "lines", "line": {"width": 0}}
    x, y = [*x, *x[::-1]], upper + lower[::-1]
    return go.Scatter(x=x, y=y, fill="toself", fillcolor=faded(color), **quiet)


def bands(groups: Sequence[Method]) -> Words | None:
    """What bands are, where there are several seeds."""
    return say("bands") if any(len(group.runs) > 1 for group in groups) else None


def names_of(traces: Sequence[Any]) -> list[Text]:
    """What stands in the legend, in both languages."""
    named = [trace for trace in traces if trace.showlegend]
    return [Words(str(each.name), str(((each.meta or {}).get("ja") or {}).get("name", each.name))) for each in named]


def line_figure(traces: list[Any], x: dict[str, Any], y: dict[str, Any], height: int = 380) -> Any:
    """The lines between their axes, with a legend."""
    return go.Figure(traces, layout(x, y, names_of(traces), height))
