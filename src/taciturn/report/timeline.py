"""One round in simulated time in a report: which client receives, computes, sends and waits, and when the round ends.

Read from "simulated" of a line of the record; old records have none, and a report without any has no such figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from taciturn.report.plot import COLORS, NAME, Figure, layout, rows_axis, text
from taciturn.report.read import Run, number, simulated
from taciturn.report.tables import Method, human_seconds, settings, time_unit

CLIENTS = 24  # of a figure: the slowest half and the quickest
METHODS = 4  # figures
PHASES = (  # in the order of a round: name in the record, words, color, pattern
    ("down", "receives", COLORS[5], ""),
    ("compute", "computes", COLORS[0], "x"),
    ("up", "sends", COLORS[1], "/"),
    ("wait", "waits", COLORS[6], "."),
)


def shown_round(run: Run) -> Mapping[str, Any] | None:
    """The line of the round of median duration; None in old records."""
    lines = [line for line in run.rounds if simulated(line) is not None and line["simulated"].get("compute")]
    lines.sort(key=lambda line: float(number(line["simulated"].get("round")) or 0.0))
    return lines[(len(lines) - 1) // 2] if lines else None


def timeline_figures(groups: Sequence[Method]) -> list[Figure]:
    """A figure for each of the first methods; none where no run has simulated time."""
    found = [(group, line) for group in groups if (line := shown_round(group.runs[0])) is not None]
    return [_figure(group, line, f"timeline-{place}") for place, (group, line) in enumerate(found[:METHODS])]


def _figure(group: Method, line: Mapping[str, Any], key: str) -> Figure:
    run, times = group.runs[0], line["simulated"]
    busy = [sum(parts) for parts in zip(*(times[name] for name, *_ in PHASES[:3]), strict=True)]
    order = sorted(range(len(busy)), key=lambda place: -busy[place])
    half = CLIENTS // 2
    rows = order if len(order) <= CLIENTS else order[:half] + order[-half:]
    unit, second = time_unit(max(busy))
    why = {str(entry.get("client")): str(entry.get("why")) for entry in line.get("left_out") or []}
    clients = [run.client(line["cohort"][place]) for place in rows]
    labels = [name + (f" ({why[name]})" if name in why else "") for name in clients]
    devices = [_device(run, times, place) for place in rows]
    traces = []
    for name, words, color, pattern in PHASES:
        spent = [times[name][place] for place in rows]
        traces.append(
            go.Bar(
                x=[seconds / second for seconds in spent],
                y=list(range(len(rows))),
                name=words,
                orientation="h",
                marker={"color": color, "pattern": {"shape": pattern, "fillmode": "overlay", "size": 6, "solidity": 0.2}},
                customdata=[
                    [text(label), text(device), human_seconds(seconds)]
                    for label, device, seconds in zip(labels, devices, spent, strict=True)
                ],
                hovertemplate=f"{NAME}%{{customdata[0]}}<br>%{{customdata[1]}}<br>%{{customdata[2]}}<extra></extra>",
            )
        )
    x = {"title": {"text": f"simulated time ({unit})"}, "rangemode": "tozero"}
    look = layout(x, rows_axis(labels), [words for _, words, *_ in PHASES], height=120 + 24 * len(rows))
    plot = go.Figure(traces, look | {"barmode": "stack", "bargap": 0.25})
    end = float(times["round"])
    plot.add_vline(x=end / second, line_dash="dot", line_width=1.5, line_color="#888888")
    caption = (
        f"Round {line['round']}, the one of median duration, took {human_seconds(end)} (the dotted line). Where clients "
    )
    caption += "are looked at during a round, each of their phases is summed up."
    if len(rows) < len(order):
        caption += f" The {half} slowest and the {half} quickest of {len(order)} clients."
    if len(group.runs) > 1:
        caption += " First seed."
    return Figure(key, f"A round of {group.label}", caption, plot)


def _device(run: Run, times: Mapping[str, Any], place: int) -> str:
    profiles = (run.header.get("fleet") or {}).get("profiles") or []
    number = times["device"][place]
    return str(profiles[number]) if number < len(profiles) else ""


def fleet_facts(group: Method) -> dict[str, str]:
    """Devices and deadline of a method in words; empty for old records."""
    run = group.runs[0]
    fleet = run.header.get("fleet")
    if not isinstance(fleet, Mapping):
        return {}
    rows = zip(fleet["profiles"], fleet["clients"], fleet["step_seconds"], strict=True)
    asked = settings(run)
    deadline = number(asked.get("deadline"))
    late = {"drop": "late clients are left out", "discount": "late clients count less"}.get(str(asked.get("late")), "")
    return {
        "devices": "; ".join(f"{count} {name}, a step {human_seconds(step)}" for name, count, step in rows if count),
        "deadline": "" if deadline is None else f"{human_seconds(deadline)} a round; {late}",
    }
