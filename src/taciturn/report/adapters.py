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

from taciturn.report.plot import COLORS, NAME, Figure, faded, layout, text
from taciturn.report.read import Run, number
from taciturn.report.tables import Method

THIN = 12  # a run with more layers shows their range instead of a thin line each
HEIGHT = 280

Told = dict[str, dict[int, float]]  # layer -> round -> value


@dataclass(frozen=True, slots=True)
class Shown:
    """A figure: its values in the record, the solid and the dashed one with their words, and how to read it."""

    key: str
    title: str
    axis: str
    values: tuple[tuple[str, str], ...]
    reading: str
    logarithmic: bool = True


FIGURES = (
    Shown(
        "product",
        "Error of the product",
        "‖PQ - M‖ / ‖M‖",
        (("product", ""),),
        "How far what is sent is from the mean of the clients' products: 0.1 means that a tenth of it is lost or added; "
        "rounding is near 10⁻⁷.",
    ),
    Shown(
        "truncation",
        "Least error of this rank",
        "‖M - [M]ᵣ‖",
        (("truncation", ""),),
        "What any pair of this rank must lose of the mean product: where it grows, the rank is too small for what the "
        "clients learn.",
    ),
    Shown(
        "client_gap",
        "Distance from the clients' products",
        "mean ‖PQ - BᵢAᵢ‖²",
        (("clients", ""),),
        "The paper's weak condition: how far the clients' adapters are from the one that all go on from; most of it is "
        "their disagreement, which no operator removes.",
    ),
    Shown(
        "factor_gaps",
        "Distance from the clients' factors",
        "mean ‖P - Bᵢ‖² + ‖Q - Aᵢ‖²",
        (("gauge", "up to a rotation"), ("raw", "as they are")),
        "The paper's strong condition; solid after the best rotation of the pair, which plain SGD does not see, dashed as "
        "they are: a gap between the two is a new gauge.",
    ),
    Shown(
        "imbalance",
        "Imbalance of the factors",
        "‖PᵀP - QQᵀ‖",
        (("imbalance", ""),),
        "Near 0, both factors learn equally fast; large, the small factor's gradients are large and one step size has to "
        "suit both.",
    ),
    Shown(
        "ranks",
        "Effective rank",
        "effective rank",
        (("entropy_sent", "sent"), ("entropy_mean", "mean of the clients' products")),
        "The exponential of the entropy of the singular values: solid of what is sent, dashed of the mean product; where "
        "the dashed line is far above, directions are cut off.",
        logarithmic=False,
    ),
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
    return any(told(run, value) for figure in FIGURES for value, _ in figure.values)


def adapter_figures(groups: Sequence[Method]) -> list[Figure]:
    """The figures of low-rank aggregation, in the order of the page; none where no run has them."""
    if not any(has_adapters(run) for group in groups for run in group.runs):
        return []
    caption = "Of every layer with adapters and every round. A thick line is the median over the layers of a method, "
    caption += f"thin lines are its layers (with more than {THIN}, a band is their range); point at one to see its name. "
    caption += "Logarithmic axes leave out zeros and values that are not finite."
    if any(len(group.runs) > 1 for group in groups):
        caption += " First seed of each method."
    return [
        Figure("adapters", "What aggregation does to the adapters", caption, None),
        *(_figure(groups, s) for s in FIGURES),
    ]


def _figure(groups: Sequence[Method], shown: Shown) -> Figure:
    traces: list[Any] = []
    for index, group in enumerate(groups):
        for (value, words), dash in zip(shown.values, ("solid", "dash"), strict=False):
            found = told(group.runs[0], value, shown.logarithmic)
            if found:
                name = text(f"{group.label}, {words}" if words else group.label)
                traces += _lines(found, name, COLORS[index % len(COLORS)], dash, f"{index} {value}")
    if not traces:
        return Figure(shown.key, shown.title, "No run recorded it.", None)
    x = {"title": {"text": "communication round"}}
    y: dict[str, Any] = {"title": {"text": shown.axis}}
    y |= _logarithmic(traces) if shown.logarithmic else {"rangemode": "tozero"}
    names = [str(trace.name) for trace in traces if trace.showlegend]
    return Figure(shown.key, shown.title, shown.reading, go.Figure(traces, layout(x, y, names, height=HEIGHT)))


def _logarithmic(traces: Sequence[Any]) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times powers of ten, or at powers only where they would crowd."""
    values = [value for trace in traces for value in trace.y]
    return {"type": "log", "exponentformat": "power", "dtick": "D2" if max(values) < 300 * min(values) else None}


def _lines(found: Told, name: str, color: str, dash: str, group: str) -> list[Any]:
    """The layers as thin lines or as their range, then their median."""
    rounds = sorted({at for values in found.values() for at in values})
    columns = [{layer: values[at] for layer, values in found.items() if at in values} for at in rounds]
    quiet = {"showlegend": False, "legendgroup": group, "mode": "lines"}
    traces: list[Any] = []
    if 1 < len(found) <= THIN:
        for layer, values in found.items():
            traces.append(
                go.Scatter(
                    x=list(values),
                    y=list(values.values()),
                    name=name,
                    line={"color": color, "dash": dash, "width": 0.8},
                    opacity=0.6,
                    text=text(layer, 60),
                    hovertemplate=f"{NAME}%{{text}}<br>%{{y:.3g}}, round %{{x}}<extra></extra>",
                    **quiet,
                )
            )
    elif len(found) > THIN:
        edges = [max(column.values()) for column in columns] + [min(column.values()) for column in columns[::-1]]
        band = {"x": rounds + rounds[::-1], "y": edges, "fill": "toself", "fillcolor": faded(color)}
        traces.append(go.Scatter(**band, **quiet, hoverinfo="skip", line={"width": 0}))
    most = [max(column, key=lambda layer, column=column: column[layer]) for column in columns]  # type: ignore[misc]
    traces.append(
        go.Scatter(
            x=rounds,
            y=[statistics.median(column.values()) for column in columns],
            name=name,
            legendgroup=group,
            showlegend=True,
            mode="lines",
            line={"color": color, "dash": dash, "width": 2.2},
            customdata=[_hover(column, layer) for column, layer in zip(columns, most, strict=True)],
            hovertemplate=f"{NAME}%{{y:.3g}}, round %{{x}}<br>%{{customdata}}<extra></extra>",
        )
    )
    return traces


def _hover(column: Mapping[str, float], most: str) -> str:
    """What a point of the median is: its only layer, or how many and the one with the most."""
    layer = text(most, 60)
    return layer if len(column) == 1 else f"median of {len(column)} layers, most {column[most]:.3g}: {layer}"
