"""A comparison on a terminal: progress while it runs, and the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from taciturn.compare.jobs import Job
from taciturn.compare.session import Progress as Told
from taciturn.report.tables import human_bytes, human_seconds


def comparison(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of an outcome as a table; a dash: not reached, or not measured."""
    heads = [
        "method",
        "scenario",
        "reached",
        "bytes to target",
        "times fewer",
        "rounds",
        "simulated",
        "final",
        "worst tenth",
    ]
    scenarios, tuned = any(row["scenario"] for row in rows), any(row["tuned"] is not None for row in rows)
    if not scenarios:
        heads.remove("scenario")
    table = Table(*heads, *(["tuned"] if tuned else []), box=None, header_style="bold")
    for row in rows:
        cells = [row["method"], *([row["scenario"]] if scenarios else []), f"{row['reached']}/{len(row['seeds'])}"]
        cells += [_text(row["bytes_to_target"], human_bytes), _text(row["byte_ratio"], lambda ratio: f"{ratio:.3g} x")]
        cells += [_text(row["rounds_to_target"], "{:.0f}".format), _text(row["simulated_to_target"], human_seconds)]
        cells += [_text(row["final"], "{:.4g}".format), _text(row["worst_decile"], "{:.4g}".format)]
        if tuned:
            cells.append(_text(row["tuned"], str) + (" (edge)" if row.get("at_edge") else ""))
        table.add_row(*(escape(cell) for cell in cells))
    return table


def _text(value: Any, show: Any) -> str:
    return "-" if value is None else str(show(value))


@contextmanager
def progress(console: Console, silent: bool) -> Iterator[Told | None]:
    """A bar of the runs and what is in work on a terminal; nothing elsewhere."""
    if silent or not console.is_terminal:
        yield None
        return
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def told(stage: str, ended: int, total: int, active: Mapping[Job, int]) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, note="")
            work = ", ".join(f"{job.table['name']} {done}/{job.rounds}" for job, done in active.items())
            bar.update(tasks[stage], completed=ended, note=escape(f"{ended}/{total}  {work}"))

        yield told
