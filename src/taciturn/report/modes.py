"""Which client trained in which mode, round by round, in a report.

Read from "knobs" of a line of the record; runs of one mode without bits have none, and no such figure.
"""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from taciturn.report.plot import COLORS, NAME, SYMBOLS, Figure, first_seed, line_figure, row_height, rows_axis, text, worded
from taciturn.report.read import Run
from taciturn.report.tables import Method
from taciturn.report.words import passage, say

CLIENTS = 40  # of a figure
METHODS = 4  # figures
KNOBS = ("train", "send", "inputs", "bfloat16")  # in the order of `mode_of`


def mode_of(train: int, send: int, inputs: int = 0, bfloat16: int = 0) -> str:
    """The mode of the knobs of a client, levels L = 2^(b-1) - 1 or 0: float, ptq of b bits sent, qat of b bits trained
    with, and of so many for the inputs of layers; bfloat16.

    >>> mode_of(0, 0), mode_of(0, 7), mode_of(3, 3), mode_of(3, 3, 127), mode_of(0, 0, bfloat16=1)
    ('float', 'ptq4', 'qat3', 'qat3, inputs 8', 'bfloat16')
    """
    if bfloat16:
        return "bfloat16"
    taken = f", inputs {(inputs + 1).bit_length()}" if inputs else ""
    bits = ((train or send) + 1).bit_length()
    return f"qat{bits}{taken}" if train else f"ptq{bits}" if send else "float"


def played(run: Run) -> list[tuple[int, int, str]]:
    """(round, client, mode) of everybody who was told one."""
    found = []
    for line in run.rounds:
        knobs, cohort = line.get("knobs") or {}, line.get("cohort") or []
        rows = zip(cohort, *(knobs.get(name, [0] * len(cohort)) for name in KNOBS), strict=True)
        found += [(int(line["round"]), int(i), mode_of(*told)) for i, *told in rows if knobs]
    return found


def mode_figures(groups: Sequence[Method]) -> list[Figure]:
    """A figure for each of the first methods with several modes."""
    told = [(group, played(group.runs[0])) for group in groups]
    several = [(group, rows) for group, rows in told if len({mode for *_, mode in rows}) > 1]
    return [_figure(group, rows, f"modes-{place}") for place, (group, rows) in enumerate(several[:METHODS])]


def _figure(group: Method, rows: Sequence[tuple[int, int, str]], key: str) -> Figure:
    everyone = sorted({client for _, client, _ in rows})
    clients = everyone[:CLIENTS]
    place, traces = {client: row for row, client in enumerate(clients)}, []
    names = [group.runs[0].client(client) for client in clients]
    modes = sorted({mode for *_, mode in rows})
    hover = say("hover_client_round", name=NAME, client="%{customdata}", round="%{x}")
    for index, mode in enumerate(modes):
        mine = [(at, place[client]) for at, client, found in rows if found == mode and client in place]
        traces.append(
            go.Scatter(
                x=[at for at, _ in mine],
                y=[row for _, row in mine],
                **worded(mode, hover),
                showlegend=True,
                mode="markers",
                marker={"color": COLORS[index % len(COLORS)], "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 8},
                customdata=[text(names[row]) for _, row in mine],
            )
        )
    y = rows_axis(names)
    plot = line_figure(traces, {"title": say("axis_round")}, y, 120 + row_height(y, 0))
    cut = say("first_clients", n=CLIENTS, all=len(everyone)) if len(clients) < len(everyone) else None
    return Figure(key, say("modes", name=group.label), passage(say("modes_note"), cut, first_seed([group])), plot)
