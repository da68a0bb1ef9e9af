"""Dynamic synchronisation in a report: how long rounds were and why they ended, who drifted, what was paid and watched.

Read from "sync" of a line of the record; runs of a fixed rule and old records have none, and a report without any
dynamic run has none of these figures.

Symbols: |u|^2 squared norm of a client's drift, how far its parameters moved in the round; H the rule's estimate of the
models' variance at a look; Theta the threshold, H > Theta ends the round; a block is a local epoch unless the rule says
otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from taciturn.report.plot import COLORS, MARKED, NAME, Curve, Figure, layout, line_figure, lines, rows_axis, text
from taciturn.report.read import Run, number
from taciturn.report.tables import Method, by_kind, human_bytes, settings

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")
CLIENTS = 40  # clients of the figure of drifts: half of them from the top, half from the bottom

Client = tuple[object, str]  # index or name in the record, name


@dataclass(frozen=True, slots=True)
class Seen:
    """A look at the clients: the round, blocks done in it, H, Theta; `at`: round - 1 + the fraction of the round done."""

    at: float
    round: int
    blocks: float
    estimate: float | None
    threshold: float | None


def told(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the rule told of a round; empty for a fixed rule and in records older than dynamic rules."""
    sync = line.get("sync")
    return sync if isinstance(sync, Mapping) else {}


def is_dynamic(run: Run) -> bool:
    """Whether the run's rule decided how long its rounds are."""
    return any(map(told, run.rounds))


def looks(run: Run) -> list[Seen]:
    """Every look of a run; H and Theta are None where they are not above 0 and finite. Empty if nobody looked."""
    found = []
    for line in run.rounds:
        whole = number(told(line).get("blocks"))
        for look in told(line).get("looks") or []:
            blocks = number(look.get("blocks"))
            if whole and blocks is not None:
                at = line["round"] - 1 + min(1.0, blocks / whole)
                found.append(Seen(at, line["round"], blocks, _above(look.get("estimate")), _above(look.get("threshold"))))
    return found


def _above(value: object) -> float | None:
    known = number(value)
    return known if known is not None and known > 0 else None


def relative_drift(run: Run) -> dict[Client, float]:
    """|u|^2 of a client / the mean |u|^2 of its round, mean over the client's rounds; values not finite are left out."""
    found: dict[Client, list[float]] = {}
    for line in run.rounds:
        cohort, drift = line.get("cohort") or [], told(line).get("drift") or []
        if len(cohort) != len(drift):
            continue
        pairs = [(client, value) for client, value in zip(cohort, map(number, drift), strict=True) if value is not None]
        mean = sum(value for _, value in pairs) / max(1, len(pairs))
        if mean > 0 and math.isfinite(mean):
            for client, value in pairs:
                found.setdefault((client, run.client(client)), []).append(value / mean)
    return {client: sum(values) / len(values) for client, values in found.items()}


# Figures -------------------------------------------------------------------------------------------------------------


def drift_figures(groups: Sequence[Method]) -> list[Figure]:
    """The figures of dynamic synchronisation, in the order of the page; none where every run has a fixed rule."""
    if not any(is_dynamic(run) for group in groups for run in group.runs):
        return []
    return [work_figure(groups), looks_figure(groups), who_figure(groups)]


def _first_seed(groups: Sequence[Method]) -> str:
    return " First seed of each method." if any(len(group.runs) > 1 for group in groups) else ""


def work_figure(groups: Sequence[Method]) -> Figure:
    """Blocks of local work over rounds, a line a method."""
    title = "Local work of each round"

    def points(run: Run) -> Curve:
        done = [(line, number(told(line).get("blocks"))) for line in run.rounds]
        return [
            (line["round"], blocks, line["bytes_up"] + line["bytes_down"]) for line, blocks in done if blocks is not None
        ]

    traces = lines(groups, points, over_spent=False, value=".3g")
    if not traces:
        return Figure("work", title, "No run recorded how much local work its rounds were.", None)
    y = {"title": {"text": "local work (blocks)"}, "rangemode": "tozero"}
    caption = "A block is a local epoch unless the rule's configuration says otherwise."
    if any(len(group.runs) > 1 for group in groups):
        caption += " Bands: one standard deviation over seeds."
    if not all(any(map(points, group.runs)) for group in groups):
        caption += " Methods with a fixed amount of local work are not shown."
    return Figure("work", title, caption, line_figure(traces, {"title": {"text": "communication round"}}, y))


def looks_figure(groups: Sequence[Method]) -> Figure:
    """H and Theta at each look of the first seed: a line with markers and a dashed line of the same color a method."""
    title = "Drift and threshold at each look"
    traces = []
    for index, group in enumerate(groups):
        seen = looks(group.runs[0])
        for letter, values in (("H", [look.estimate for look in seen]), ("Θ", [look.threshold for look in seen])):
            shown = [(look, value) for look, value in zip(seen, values, strict=True) if value is not None]
            if shown:
                traces.append(_look_line(shown, letter, group.label, index))
    if not traces:
        why = "No run has a look at its clients' drift to show: clients that stop themselves tell none during a round."
        return Figure("looks", title, why, None)
    x = {"title": {"text": "communication round"}}
    y = {"title": {"text": "squared norm of the drift"}, "type": "log", "dtick": "D2", "exponentformat": "power"}
    caption = "Solid: H, the rule's estimate of the variance of the clients' models. Dashed: Θ, the threshold; H above it "
    caption += "ends the round. A look at 2.5 is in round 3, after half of its local work. Logarithmic axis; values that "
    caption += "are not finite or not above 0 are left out."
    return Figure("looks", title, caption + _first_seed(groups), line_figure(traces, x, y))


def _look_line(shown: Sequence[tuple[Seen, float]], letter: str, label: str, index: int) -> Any:
    dash, fill, few = ("solid", "", True) if letter == "H" else ("dash", "-open", len(shown) <= MARKED)
    return go.Scatter(
        x=[look.at for look, _ in shown],
        y=[value for _, value in shown],
        name=f"{letter}, {text(label)}",
        showlegend=True,
        mode="lines+markers" if few else "lines",
        line={"color": COLORS[index % len(COLORS)], "dash": dash, "width": 1.6},
        marker={"size": 6 if len(shown) <= MARKED else 3, "symbol": SYMBOLS[index % len(SYMBOLS)] + fill},
        customdata=[[look.round, f"{look.blocks:.3g}"] for look, _ in shown],
        hovertemplate=f"{NAME}%{{y:.4g}}<br>round %{{customdata[0]}}, %{{customdata[1]}} blocks<extra></extra>",
    )


def who_figure(groups: Sequence[Method]) -> Figure:
    """Drift of the clients that drifted most and least in the first seed: a row a client, a marker a method."""
    title = "Who drifted"
    found = {index: relative_drift(group.runs[0]) for index, group in enumerate(groups)}
    ratios: dict[Client, list[float]] = {}
    for table in found.values():
        for client, ratio in table.items():
            ratios.setdefault(client, []).append(ratio)
    if not ratios:
        return Figure("drift", title, "No run recorded the drift of its clients.", None)
    order = sorted(ratios, key=lambda client: -sum(ratios[client]) / len(ratios[client]))
    half = CLIENTS // 2
    rows = order if len(order) <= CLIENTS else order[:half] + order[-half:]
    traces = []
    for index, table in found.items():
        shown = [(row, client) for row, client in enumerate(rows) if client in table]
        if shown:
            traces.append(
                go.Scatter(
                    x=[table[client] for _, client in shown],
                    y=[row for row, _ in shown],
                    name=text(groups[index].label),
                    showlegend=True,
                    mode="markers",
                    cliponaxis=False,
                    marker={"color": COLORS[index % len(COLORS)], "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 8},
                    customdata=[[text(name)] for _, (_, name) in shown],
                    hovertemplate=f"{NAME}%{{customdata[0]}}<br>%{{x:.3g}} times the mean<extra></extra>",
                )
            )
    x = {"title": {"text": "squared drift / its round's mean"}, "rangemode": "tozero"}
    names = [str(trace.name) for trace in traces]
    y = rows_axis([name for _, name in rows]) | {"showgrid": True}
    height = 130 + len(rows) * (6 + 17 * max(1 + tick.count("<br>") for tick in y["ticktext"]))
    plot = go.Figure(traces, layout(x, y, names, height=height))
    plot.add_vline(x=1, line_dash="dot", line_width=1.5, line_color="#888888")
    caption = "Squared norm of a client's drift over the mean of its round's cohort; mean over the rounds that it "
    caption += "was in. 1, the dotted line: as the others."
    if len(rows) < len(order):
        caption += f" The {half} that drifted most and the {half} that drifted least, of {len(order)} clients."
    return Figure("drift", title, caption + _first_seed(groups), plot)


# Facts ---------------------------------------------------------------------------------------------------------------


def sync_facts(group: Method) -> dict[str, str]:
    """Work, price, exchanges and monitoring of a method in words; empty for a fixed rule. Means over rounds and seeds."""
    if not any(map(is_dynamic, group.runs)):
        return {}
    rounds = [line for run in group.runs for line in run.rounds]
    last = next((told(line) for line in reversed(group.runs[0].rounds) if told(line)), {})
    blocks, steps = _mean([told(line).get("blocks") for line in rounds]), _mean([line.get("longest") for line in rounds])
    exchanges = _mean([(line.get("traffic") or {}).get("exchanges") for line in rounds])
    rho = number(last.get("rho"))
    work = [f"{blocks:.3g} blocks" if blocks is not None else ""]
    work += [f"{steps:.4g} local steps of the slowest client" if steps is not None else ""]
    facts = {
        "local work a round": ", ".join(filter(None, work)),
        "price in use": _price(last.get("price"), group.runs[0]),
        "messages of a round cost": f"{rho:.3g} blocks of local work (last round)" if rho is not None else "",
        "exchanges a round": f"{exchanges:.3g} round trip{'' if exchanges == 1 else 's'}" if exchanges is not None else "",
        "monitoring traffic": _monitoring(group),
    }
    return {key: fact for key, fact in facts.items() if fact}


def _mean(values: Sequence[object]) -> float | None:
    known = [value for value in map(number, values) if value is not None]
    return sum(known) / len(known) if known else None


def _price(price: object, run: Run) -> str:
    if not isinstance(price, Mapping):
        return ""
    step, latency = number(price.get("step_seconds")), number(price.get("latency"))
    parts = [f"{step:.3g} s a local step" if step is not None else ""]
    for way in ("up", "down"):
        rate = number(price.get(way))
        if rate is not None:
            parts.append(f"{human_bytes(rate)}/s {way}")
        elif price.get(way) == math.inf:
            parts.append(f"no limit {way}")
    parts.append(f"{latency:.3g} s a round trip" if latency is not None else "")
    asked = settings(run)
    given = asked.get("method.sync.name") in (None, "custom") or any(key.startswith("method.sync.price.") for key in asked)
    return ", ".join(filter(None, parts)) + ("" if given else " (the rule's own: none was given)")


def _monitoring(group: Method) -> str:
    """Bytes of kind "monitor", both ways, of all bytes but those of evaluation."""
    sizes: dict[str, int] = {}
    for run in group.runs:
        for kind, counts in by_kind(run).items():
            what = kind.rpartition("/")[2]
            sizes[what] = sizes.get(what, 0) + counts["payload"] + counts["frame"]
    sent, total = sizes.get("monitor", 0), sum(size for what, size in sizes.items() if what != "evaluate")
    if not total:
        return ""
    seeds = len(group.runs)
    return f"{human_bytes(sent / seeds)} of {human_bytes(total / seeds)}, {100 * sent / total:.3g} % of all traffic"
