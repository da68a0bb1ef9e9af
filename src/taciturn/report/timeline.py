"""One round in simulated time in a report: which client receives, computes, sends and waits, and when the round ends.

Read from "simulated" of a line of the record; old records have none, and a report without any has no such figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from taciturn.report.plot import COLORS, GUIDE, NAME, Figure, first_seed, line_figure, row_height, rows_axis, text, worded
from taciturn.report.read import Run, number, simulated
from taciturn.report.tables import Method, human_seconds, settings, time_unit
from taciturn.report.words import SEMICOLON, Words, known, listed, passage, plain, say

CLIENTS = 24  # of a figure: the slowest half and the quickest
METHODS = 4  # figures
PHASES = (  # in the order of a round: name in the record, color, pattern
    ("down", COLORS[5], ""),
    ("compute", COLORS[0], "x"),
    ("up", COLORS[1], "/"),
    ("wait", COLORS[6], "."),
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
    labels = [
        say("client_why", client=name, why=known("why", why[name])) if name in why else plain(name) for name in clients
    ]
    devices = [_device(run, times, place) for place in rows]
    traces = []
    for name, color, pattern in PHASES:
        spent = [times[name][place] for place in rows]
        traces.append(
            go.Bar(
                x=[seconds / second for seconds in spent],
                y=list(range(len(rows))),
                **worded(
                    known("phase", name),
                    f"{NAME}%{{customdata[0]}}<br>%{{customdata[1]}}<br>%{{customdata[2]}}<extra></extra>",
                ),
                showlegend=True,
                orientation="h",
                marker={"color": color, "pattern": {"shape": pattern, "fillmode": "overlay", "size": 6, "solidity": 0.2}},
                customdata=[
                    [text(label.en), text(device), human_seconds(seconds)]
                    for label, device, seconds in zip(labels, devices, spent, strict=True)
                ],
            )
        )
    y = rows_axis(labels)
    plot = line_figure(traces, {"title": say("axis_time", unit=unit), "rangemode": "tozero"}, y, 120 + row_height(y, 7))
    plot.update_layout(barmode="stack", bargap=0.25)
    end = float(times["round"])
    plot.add_vline(x=end / second, **GUIDE)
    cut = say("slowest", half=half, n=len(order)) if len(rows) < len(order) else None
    note = say("timeline_note", round=line["round"], took=human_seconds(end))
    return Figure(key, say("timeline", name=group.label), passage(note, cut, first_seed([group])), plot)


def _device(run: Run, times: Mapping[str, Any], place: int) -> str:
    profiles = (run.header.get("fleet") or {}).get("profiles") or []
    number = times["device"][place]
    return str(profiles[number]) if number < len(profiles) else ""


def fleet_facts(group: Method) -> dict[str, Words]:
    """Devices and deadline of a method in words; empty for old records."""
    run = group.runs[0]
    fleet = run.header.get("fleet")
    if not isinstance(fleet, Mapping):
        return {}
    rows = zip(fleet["profiles"], fleet["clients"], fleet["step_seconds"], strict=True)
    asked = settings(run)
    deadline = number(asked.get("deadline"))
    devices = [say("device", count=n, name=name, step=human_seconds(step)) for name, n, step in rows if n]
    facts = {"devices": listed(devices, SEMICOLON)}
    if deadline is not None:
        facts["deadline"] = say("deadline_of", took=human_seconds(deadline), late=known("late", str(asked.get("late"))))
    return facts
