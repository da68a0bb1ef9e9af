"""Low-rank aggregation in a report: what the broadcast pair of each layer loses of its clients' factors, round by round.

Read from "aggregate" of a line of the record (`aggregation/mismatch.py` says what each value is); runs that aggregate
otherwise and old records have none, and a report without any such run has none of these figures.

Symbols: (B_i, A_i) a client's factors of a layer, M the mean of B_i A_i, (P, Q) the pair that is sent to all.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from taciturn.report.plot import NAME, Figure, color_of, faded, first_seed, line_figure, text, worded
from taciturn.report.read import Run, number
from taciturn.report.tables import Method
from taciturn.report.words import Text, passage, say

THIN = 12  # a run with more layers shows their range instead of a thin line each
HEIGHT = 280

Told = dict[str, dict[int, float]]  # layer -> round -> value


@dataclass(frozen=True, slots=True)
class Shown:
    """A figure: its values in the record, the solid one first; its words are those of its key (words.toml)."""

    key: str
    values: tuple[str, ...]
    logarithmic: bool = True


FIGURES = (
    Shown("product", ("product",)),
    Shown("truncation", ("truncation",)),
    Shown("client_gap", ("clients",)),
    Shown("factor_gaps", ("gauge", "raw")),
    Shown("imbalance", ("imbalance",)),
    Shown("ranks", ("entropy_sent", "entropy_mean"), logarithmic=False),
)


def told(run: Run, value: str, logarithmic: bool = False) -> Told:
    """A value of each layer and round; what is not finite is left out and, for a logarithmic axis, what is not above 0."""
    found: Told = {}
    for line in run.rounds:
        for layer, values in _aggregate(line).items():
            known = number(values.get(value)) if isinstance(values, Mapping) else None
            if known is not None and (known > 0 or not logarithmic):
                found.setdefault(str(layer), {})[int(line["round"])] = known
    return found


def _aggregate(line: Mapping[str, Any]) -> Mapping[str, Any]:
    aggregate = line.get("aggregate")
    return aggregate if isinstance(aggregate, Mapping) else {}


def has_adapters(run: Run) -> bool:
    """Whether the run's operator told what it did to the factors of a layer."""
    return any(told(run, value) for figure in FIGURES for value in figure.values)


def adapter_figures(groups: Sequence[Method]) -> list[Figure]:
    """The figures of low-rank aggregation, in the order of the page; none where no run has them."""
    if not any(has_adapters(run) for group in groups for run in group.runs):
        return []
    note = passage(say("adapters_note", n=THIN), first_seed(groups))
    return [Figure("adapters", say("adapters"), note, None), *(_figure(groups, shown) for shown in FIGURES)]


def _figure(groups: Sequence[Method], shown: Shown) -> Figure:
    traces: list[Any] = []
    for index, group in enumerate(groups):
        for value, dash in zip(shown.values, ("solid", "dash"), strict=False):
            found = told(group.runs[0], value, shown.logarithmic)
            if found:
                name = say(f"of_{value}", name=group.label) if len(shown.values) > 1 else group.label
                traces += _lines(found, name, color_of(group), dash, f"{index} {value}")
    title = say(shown.key)
    if not traces:
        return Figure(shown.key, title, say("not_recorded"), None)
    y: dict[str, Any] = {"title": say(f"{shown.key}_axis")}
    y |= _logarithmic(traces) if shown.logarithmic else {"rangemode": "tozero"}
    plot = line_figure(traces, {"title": say("axis_round")}, y, HEIGHT)
    return Figure(shown.key, title, say(f"{shown.key}_note"), plot)


def _logarithmic(traces: Sequence[Any]) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times powers of ten, or at powers only where they would crowd."""
    values = [value for trace in traces for value in trace.y]
    return {"type": "log", "exponentformat": "power", "dtick": "D2" if max(values) < 300 * min(values) else None}


def _lines(found: Told, name: Text, color: str, dash: str, group: str) -> list[Any]:
    """The layers as thin lines or as their range, then their median."""
    rounds = sorted({at for values in found.values() for at in values})
    columns = [{layer: values[at] for layer, values in found.items() if at in values} for at in rounds]
    quiet = {"showlegend": False, "legendgroup": group, "mode": "lines"}
    hover = say("hover_layer", name=NAME, y="%{y:.3g}", round="%{x}", layer="%{text}")
    traces: list[Any] = []
    if 1 < len(found) <= THIN:
        for layer, values in found.items():
            traces.append(
                go.Scatter(
                    x=list(values),
                    y=list(values.values()),
                    **worded(name, hover),
                    line={"color": color, "dash": dash, "width": 0.8},
                    opacity=0.6,
                    text=text(layer, 60),
                    **quiet,
                )
            )
    elif len(found) > THIN:
        edges = [max(column.values()) for column in columns] + [min(column.values()) for column in columns[::-1]]
        area = {"x": rounds + rounds[::-1], "y": edges, "fill": "toself", "fillcolor": faded(color)}
        traces.append(go.Scatter(**area, **quiet, hoverinfo="skip", line={"width": 0}))
    most = [max(column, key=lambda layer, column=column: column[layer]) for column in columns]  # type: ignore[misc]
    several = {"n": "%{customdata[0]}", "most": "%{customdata[1]}", "layer": "%{customdata[2]}"}
    traces.append(
        go.Scatter(
            x=rounds,
            y=[statistics.median(column.values()) for column in columns],
            **worded(
                name, say("hover_median", name=NAME, y="%{y:.3g}", round="%{x}", **several) if len(found) > 1 else hover
            ),
            text=text(next(iter(found)), 60),
            legendgroup=group,
            showlegend=True,
            mode="lines",
            line={"color": color, "dash": dash, "width": 2.2},
            customdata=[
                [len(column), f"{column[layer]:.3g}", text(layer, 60)] for column, layer in zip(columns, most, strict=True)
            ],
        )
    )
    return traces
