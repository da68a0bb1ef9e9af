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

from taciturn.report.plot import (
    GUIDE,
    MARKED,
    NAME,
    SYMBOLS,
    Curve,
    Figure,
    bands,
    color_of,
    first_seed,
    line_figure,
    lines,
    row_height,
    rows_axis,
    text,
    worded,
)
from taciturn.report.read import Run, number
from taciturn.report.tables import Method, by_kind, human_bytes, settings
from taciturn.report.words import Words, known, listed, passage, say

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


def work_figure(groups: Sequence[Method]) -> Figure:
    """Blocks of local work over rounds, a line a method."""

    def points(run: Run) -> Curve:
        done = [(line, number(told(line).get("blocks"))) for line in run.rounds]
        return [
            (line["round"], blocks, line["bytes_up"] + line["bytes_down"]) for line, blocks in done if blocks is not None
        ]

    traces = lines(groups, points, over_spent=False, value=".3g")
    if not traces:
        return Figure("work", say("work"), say("no_work"), None)
    y = {"title": say("axis_work"), "rangemode": "tozero"}
    fixed = None if all(any(map(points, group.runs)) for group in groups) else say("fixed_not_shown")
    plot = line_figure(traces, {"title": say("axis_round")}, y)
    return Figure("work", say("work"), passage(say("work_note"), bands(groups), fixed), plot)


def looks_figure(groups: Sequence[Method]) -> Figure:
    """H and Theta at each look of the first seed: a line with markers and a dashed line of the same color a method."""
    traces = []
    for group in groups:
        seen = looks(group.runs[0])
        for letter, values in (("H", [look.estimate for look in seen]), ("Θ", [look.threshold for look in seen])):
            shown = [(look, value) for look, value in zip(seen, values, strict=True) if value is not None]
            if shown:
                traces.append(_look_line(shown, letter, group))
    if not traces:
        return Figure("looks", say("looks"), say("no_looks"), None)
    y = {"title": say("axis_drift"), "type": "log", "dtick": "D2", "exponentformat": "power"}
    plot = line_figure(traces, {"title": say("axis_round")}, y)
    return Figure("looks", say("looks"), passage(say("looks_note"), first_seed(groups)), plot)


def _look_line(shown: Sequence[tuple[Seen, float]], letter: str, group: Method) -> Any:
    dash, fill, few = ("solid", "", True) if letter == "H" else ("dash", "-open", len(shown) <= MARKED)
    hover = say("hover_look", name=NAME, round="%{customdata[0]}", blocks="%{customdata[1]}")
    return go.Scatter(
        x=[look.at for look, _ in shown],
        y=[value for _, value in shown],
        **worded(f"{letter}, {group.label}", hover),
        showlegend=True,
        mode="lines+markers" if few else "lines",
        line={"color": color_of(group), "dash": dash, "width": 1.6},
        marker={"size": 6 if len(shown) <= MARKED else 3, "symbol": SYMBOLS[group.place % len(SYMBOLS)] + fill},
        customdata=[[look.round, f"{look.blocks:.3g}"] for look, _ in shown],
    )


def who_figure(groups: Sequence[Method]) -> Figure:
    """Drift of the clients that drifted most and least in the first seed: a row a client, a marker a method."""
    found = [(group, relative_drift(group.runs[0])) for group in groups]
    ratios: dict[Client, list[float]] = {}
    for _, table in found:
        for client, ratio in table.items():
            ratios.setdefault(client, []).append(ratio)
    if not ratios:
        return Figure("drift", say("drift"), say("no_drift"), None)
    order = sorted(ratios, key=lambda client: -sum(ratios[client]) / len(ratios[client]))
    half = CLIENTS // 2
    rows = order if len(order) <= CLIENTS else order[:half] + order[-half:]
    traces = []
    for group, table in found:
        shown = [(row, client) for row, client in enumerate(rows) if client in table]
        if shown:
            traces.append(
                go.Scatter(
                    x=[table[client] for _, client in shown],
                    y=[row for row, _ in shown],
                    **worded(group.label, say("hover_drift", name=NAME, client="%{customdata[0]}", ratio="%{x:.3g}")),
                    showlegend=True,
                    mode="markers",
                    cliponaxis=False,
                    marker={"color": color_of(group), "symbol": SYMBOLS[group.place % len(SYMBOLS)], "size": 8},
                    customdata=[[text(name)] for _, (_, name) in shown],
                )
            )
    y = rows_axis([name for _, name in rows]) | {"showgrid": True}
    plot = line_figure(traces, {"title": say("axis_relative"), "rangemode": "tozero"}, y, 130 + row_height(y, 6))
    plot.add_vline(x=1, **GUIDE)
    cut = say("most_and_least", half=half, n=len(order)) if len(rows) < len(order) else None
    return Figure("drift", say("drift"), passage(say("drift_note"), cut, first_seed(groups)), plot)


# Facts ---------------------------------------------------------------------------------------------------------------


def sync_facts(group: Method) -> dict[str, Words]:
    """Work, price, exchanges and monitoring of a method in words, by key; empty for a fixed rule. Means over rounds and
    seeds.
    """
    if not any(map(is_dynamic, group.runs)):
        return {}
    rounds = [line for run in group.runs for line in run.rounds]
    last = next((told(line) for line in reversed(group.runs[0].rounds) if told(line)), {})
    blocks, steps = _mean([told(line).get("blocks") for line in rounds]), _mean([line.get("longest") for line in rounds])
    exchanges = _mean([(line.get("traffic") or {}).get("exchanges") for line in rounds])
    rho = number(last.get("rho"))
    work = [say("blocks", n=f"{blocks:.3g}")] if blocks is not None else []
    work += [say("local_steps", n=f"{steps:.4g}")] if steps is not None else []
    facts = {
        "local_work": listed(work),
        "price": _price(last.get("price"), group.runs[0]),
        "rho": say("rho_is", n=f"{rho:.3g}") if rho is not None else listed([]),
        "exchanges": say("round_trips", n=f"{exchanges:.3g}") if exchanges is not None else listed([]),
        "monitoring": _monitoring(group),
    }
    return {key: fact for key, fact in facts.items() if fact.en}


def _mean(values: Sequence[object]) -> float | None:
    known = [value for value in map(number, values) if value is not None]
    return sum(known) / len(known) if known else None


def _price(price: object, run: Run) -> Words:
    if not isinstance(price, Mapping):
        return listed([])
    step, latency = number(price.get("step_seconds")), number(price.get("latency"))
    parts = [say("price_step", n=f"{step:.3g}")] if step is not None else []
    for way in ("up", "down"):
        rate = number(price.get(way))
        if rate is not None:
            parts.append(say("price_rate", rate=human_bytes(rate), way=known("way", way)))
        elif price.get(way) == math.inf:
            parts.append(say("price_free", way=known("way", way)))
    parts += [say("price_latency", n=f"{latency:.3g}")] if latency is not None else []
    asked = settings(run)
    given = asked.get("method.sync.name") in (None, "custom") or any(key.startswith("method.sync.price.") for key in asked)
    return listed(parts) if given else say("price_own", price=listed(parts))


def _monitoring(group: Method) -> Words:
    """Bytes of kind "monitor", both ways, of all bytes but those of evaluation."""
    sizes: dict[str, int] = {}
    for run in group.runs:
        for kind, counts in by_kind(run).items():
            what = kind.rpartition("/")[2]
            sizes[what] = sizes.get(what, 0) + counts["payload"] + counts["frame"]
    sent, total = sizes.get("monitor", 0), sum(size for what, size in sizes.items() if what != "evaluate")
    if not total:
        return listed([])
    part, seeds = f"{100 * sent / total:.3g} %", len(group.runs)
    return say("monitored", sent=human_bytes(sent / seeds), total=human_bytes(total / seeds), part=part)
