"""An advice in words, for a terminal: first whether plain FedAvg is enough, then codecs, then part after part."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from taciturn.advisor.advice import LIMITS, Advice
from taciturn.advisor.part import Part


def show(advice: Advice) -> Group:
    """Verdict, pilot, table of codecs, every part, the whole method's fragment and limits."""
    pilot, whole = advice.known.pilot, advice.whole
    cost = pilot.cost
    head = (
        f"pilot: {cost['rounds']:.0f} rounds without compression, then {cost['messages']:.0f} messages at loss "
        f"{pilot.loss:.4g}, in {cost['seconds']:.0f} s (the other parts took {advice.seconds:.1f} s more); d = {pilot.d}, "
        f"{pilot.cohort_clients} clients a round, {pilot.steps:.3g} local steps; {advice.known.basis.note}"
    )
    lines: list[Any] = [*([whole.plain, ""] if whole.plain else []), head, ""]
    if "codec" in whole.parts:
        lines += [_codecs(advice), "", f"recommended: {advice.best.name}", *(f"- {reason}" for reason in advice.reasons)]
        lines += [f"- {row.name}: not predicted, {row.why}" for row in advice.apart] + [""]
    for part in whole.parts.values():
        lines += _part(part)
    changed = [f"{part.name}: {part.choice}" for part in whole.parts.values() if part.changes]
    lines += [f"advised: {'your method without a codec' if whole.plain else '; '.join(changed) or 'your method as it is'}"]
    lines += [f"- {note}" for note in whole.notes]
    lines += ["", whole.toml.rstrip(), "", "limits:", *(f"- {limit}" for limit in LIMITS)]
    return Group(*(Text(line) if isinstance(line, str) else line for line in lines))


def _codecs(advice: Advice) -> Table:
    linked = advice.budget.mbit is not None
    headings = ["", "codec", "bytes", "rounds", "step", "loss (90 %)", "Q (90 %)", *(["to target"] if linked else [])]
    table = Table(box=None, header_style="bold")
    for heading in headings:
        wide = heading in ("loss (90 %)", "Q (90 %)")  # these give way where the terminal is narrow
        table.add_column(heading, no_wrap=not wide, min_width=None if wide else len(heading))
    for place, row in enumerate(advice.ranked, 1):
        mark = "tie" if row.name in advice.tied or (advice.tied and place == 1) else str(place)
        loss, ratio = _span(row.loss, row.low, row.high), _span(row.ratio, row.ratio_low, row.ratio_high)
        when = [f"{row.seconds:.3g} s" if math.isfinite(row.seconds) else "never"] if linked else []
        table.add_row(mark, escape(row.name), f"{row.bytes:.0f}", str(row.rounds), f"{row.factor:g}", loss, ratio, *when)
    for row in advice.apart:
        table.add_row("-", escape(row.name), f"{row.bytes:.0f}", str(row.rounds), *(["-"] * len(headings[4:])))
    return table


def _part(part: Part) -> list[Any]:
    """Name and choice, its table, what is said, how sure it is."""
    lines: list[Any] = [f"{part.name}: {part.choice}"]
    if part.rows:
        head, *rows = part.rows
        table = Table(box=None, header_style="bold")
        for place, heading in enumerate(head):
            table.add_column(escape(heading), justify="left" if place == 0 else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        lines.append(table)
    return [*lines, *(f"- {said}" for said in part.said), f"- certainty: {part.sure}", ""]


def _span(value: float, low: float, high: float) -> str:
    return f"{value:.3g} ({low:.3g} {high:.3g})"
