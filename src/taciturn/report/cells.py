"""Tables of a report as text, for the page and for files beside it: summary, clients, traffic by kind, clients left out.

Heads and fixed words are in both languages; names and numbers are as they are.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taciturn.core.errors import RunError
from taciturn.core.state import write_atomic
from taciturn.report.tables import Method, by_kind, by_scenario, clients_of, is_fraction
from taciturn.report.words import (
    NONE,
    Text,
    Words,
    count,
    duration,
    exact,
    known,
    metric_value,
    percent,
    plain,
    say,
    size,
)

SHOWN = 50  # rows of a table
SCENARIOS = 4  # with a table of their clients


@dataclass(frozen=True, slots=True)
class Table:
    """Heads, rows of cells, and how many rows more there are; the first `names` columns are words, not numbers."""

    title: Text
    heads: list[Text]
    rows: list[list[Text]]
    more: int = 0
    names: int = 1
    note: Words | None = None


def summary_table(rows: Sequence[Mapping[str, Any]], fraction: bool) -> Table:
    """The summary; mean +/- standard deviation where there are several seeds."""
    metric = known("metric", rows[0]["metric"])

    def value(number: float) -> str:
        return metric_value(number, fraction)

    columns: list[tuple[str, Callable[[float], str]]] = [
        ("final", value),
        ("final_error", value),
        ("worst_decile", value),
        ("rounds", count),
        ("rounds_to_target", count),
        ("bytes_up", size),
        ("bytes_down", size),
        ("bytes_to_target", size),
        ("ratio", lambda number: f"{number:.3g}\u00d7"),
        ("traffic_saved", percent),
        ("simulated", duration),
        ("simulated_to_target", duration),
        ("seconds", lambda number: f"{number:.3g}" if number < 100 else f"{number:.0f}"),
        ("left_out", count),
    ]
    if not fraction:
        columns = [column for column in columns if column[0] != "final_error"]  # it would repeat the metric
    if all(row["simulated"] is None for row in rows):  # old records
        columns = [column for column in columns if not column[0].startswith("simulated")]
    body: list[list[Text]] = []
    for row in rows:
        seeds = len(row["seeds"])
        cells: list[Text] = [say("n_seeds", name=row["name"], n=seeds) if seeds > 1 else plain(row["name"])]
        for key, show in columns:
            cell = NONE if row[key] is None else show(row[key])
            if row["spread"].get(key):
                cell += f" \u00b1\u00a0{show(row['spread'][key])}"
            if key == "traffic_saved" and row[key] is not None and row["traffic_saved_basis"] == "whole run":
                cell += "*"
            cells.append(cell)
        body.append(cells)
    heads: list[Text] = [say("head_method"), *(say(f"head_{key}", metric=metric) for key, _ in columns)]
    return Table(say("summary"), heads, body)


def client_tables(groups: Sequence[Method], most: int = SHOWN) -> list[Table]:
    """The metric of each client by method in the last per-client evaluation, mean over the seeds that have it: a table for
    each of the first scenarios, the client that any method serves worst on top. Empty if nobody was evaluated so.
    """
    fraction, found = is_fraction([run for group in groups for run in group.runs]), []
    for scenario, mine in list(by_scenario(groups).items())[:SCENARIOS]:
        values: dict[str, dict[int, list[float]]] = {}
        for place, group in enumerate(mine):
            for run in group.runs:
                for client, value in clients_of(run):
                    values.setdefault(client, {}).setdefault(place, []).append(value)
        means = {client: {place: statistics.fmean(seeds) for place, seeds in row.items()} for client, row in values.items()}
        sign = 1 if mine[0].runs[0].goal == "max" else -1
        order = sorted(means, key=lambda client: min(sign * value for value in means[client].values()))
        rows: list[list[Text]] = [
            [client, *(metric_value(row[k], fraction) if k in row else NONE for k in range(len(mine)))]
            for client, row in ((client, means[client]) for client in order)
        ]
        if rows:
            heads: list[Text] = [say("head_client"), *(group.short for group in mine)]
            found.append(Table(scenario, heads, rows[:most], max(0, len(rows) - most)))
    return found


def left_out_table(groups: Sequence[Method]) -> Table:
    """Clients that a round left out of the mean: method, seed, client, why, and in which rounds."""
    found: dict[tuple[str, int, str, str], list[int]] = {}
    for group in groups:
        for run in group.runs:
            for line in run.rounds:
                for entry in line.get("left_out") or []:
                    key = (group.label, run.seed, run.client(entry.get("client")), str(entry.get("why")))
                    found.setdefault(key, []).append(line["round"])
    rows: list[list[Text]] = []
    for (label, seed, client, why), rounds in found.items():
        shown: Text = ", ".join(map(str, rounds[:8]))
        if len(rounds) > 8:
            shown = say("and_more", names=str(shown), n=len(rounds) - 8)
        rows.append([label, str(seed), client, known("why", why), shown])
    heads: list[Text] = [say(f"head_{name}") for name in ("method", "seed", "client", "why", "in_rounds")]
    return Table(say("left_out"), heads, rows[:SHOWN], max(0, len(rows) - SHOWN), names=5)


def ledger(group: Method) -> Table:
    """Direction, kind, payload, frames, both, messages of the whole run; means over seeds."""
    totals: dict[str, list[float]] = {}
    for run in group.runs:
        for kind, counts in by_kind(run).items():
            entry = totals.setdefault(kind, [0.0, 0.0, 0.0])
            for index, name in enumerate(("payload", "frame", "messages")):
                entry[index] += counts[name] / len(group.runs)
    rows: list[list[Text]] = []
    for kind, (payload, frame, messages) in sorted(totals.items(), key=lambda item: -sum(item[1][:2])):
        direction, _, what = kind.partition("/")
        sizes = [exact(payload), exact(frame), exact(payload + frame), size(payload + frame), exact(messages)]
        rows.append([known("way", direction), known("kind", what), *sizes])
    heads: list[Text] = [say(f"head_{name}") for name in ("way", "kind", "payload", "frames", "both", "size", "messages")]
    return Table(group.label, heads, rows, names=2, note=_ledger_note(group))


def _ledger_note(group: Method) -> Words | None:
    """Whether the kinds add up to the record's totals, and what evaluation cost."""
    notes = []
    evaluated = sum(run.bytes_evaluate for run in group.runs) / len(group.runs)
    if evaluated:
        notes.append(say("evaluation_moved", size=size(evaluated)))
    for run in group.runs:
        kinds = {kind: counts["payload"] + counts["frame"] for kind, counts in by_kind(run).items()}
        every = sum(kinds.values())
        trained = every - sum(size for kind, size in kinds.items() if kind.endswith("/evaluate"))
        total = run.bytes_up + run.bytes_down
        if kinds and total not in (every, trained):
            notes.append(say("kinds_differ", seed=run.seed, kinds=exact(every), total=exact(total)))
    return Words(" ".join(n.en for n in notes), "".join(n.ja for n in notes)) if notes else None


# Files ---------------------------------------------------------------------------------------------------------------


def write_tables(rows: Sequence[Mapping[str, Any]], groups: Sequence[Method], folder: Path) -> list[Path]:
    """Write the summary, the clients and the traffic as Markdown, as in the page, and as CSV, as exact numbers.

    Files: summary.md, summary.csv (a row of `tables.summary` a line), clients.md, clients.csv, traffic.md, traffic.csv. All
    clients are in them. Errors: `RunError` for a folder that cannot be written.
    """
    fraction = is_fraction([run for group in groups for run in group.runs])
    keys = [key for key in rows[0] if key != "spread"]
    spread = sorted({key for row in rows for key in row["spread"]})
    numbers = [[*keys, *(f"{key}_spread" for key in spread)]]
    numbers += [[*(row[key] for key in keys), *(row["spread"].get(key) for key in spread)] for row in rows]
    clients: list[list[Any]] = [["scenario", "method", "seed", "client", str(rows[0]["metric"])]]
    traffic: list[list[Any]] = [["scenario", "method", "seed", "direction", "kind", "payload", "frame", "messages"]]
    for group in groups:
        for run in group.runs:
            who = [group.scenario, group.short, run.seed]
            clients += [[*who, client, value] for client, value in clients_of(run)]
            traffic += [[*who, *kind.split("/", 1), *counts.values()] for kind, counts in by_kind(run).items()]
    files = {
        "summary.md": markdown([summary_table(rows, fraction)]),
        "clients.md": markdown(client_tables(groups, most=10**9)),
        "traffic.md": markdown([ledger(group) for group in groups]),
        "summary.csv": _csv(numbers),
        "clients.csv": _csv(clients),
        "traffic.csv": _csv(traffic),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror or error}") from error
    for name, content in files.items():
        write_atomic(folder / name, [content.encode()])
    return [folder / name for name in files]


def markdown(tables: Sequence[Table]) -> str:
    """Tables as Markdown, in English; `|` and what could be markup in a name is escaped."""
    parts = []
    for table in tables:
        marks = [":---" if place < table.names else "---:" for place in range(len(table.heads))]
        lines = [_line(table.heads), f"| {' | '.join(marks)} |", *(_line(row) for row in table.rows)]
        title = _mark(table.title)
        parts.append((f"### {title}\n\n" if title else "") + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _line(cells: Sequence[Text]) -> str:
    return f"| {' | '.join(_mark(cell) for cell in cells)} |"


def _mark(cell: Text) -> str:
    words = " ".join((cell.en if isinstance(cell, Words) else cell).split())
    return "".join(f"\\{letter}" if letter in "\\|`*_<>[]#" else letter for letter in words)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    plain = io.StringIO()
    writer = csv.writer(plain, lineterminator="\n")
    for row in rows:
        writer.writerow(
            ["" if cell is None else " ".join(map(str, cell)) if isinstance(cell, list) else cell for cell in row]
        )
    return plain.getvalue()
